"""Distillation: settings, losses, the training step, checkpoints and everything else that a run needs."""
