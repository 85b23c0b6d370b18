"""Students and pipelines as folders for PyTorch diffusers: weights, card, one-pass sampling code, and the proof."""
