"""Training data: prompts, and text embeddings that were made from them."""
