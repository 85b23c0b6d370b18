"""Training data: prompts for the distillation."""
