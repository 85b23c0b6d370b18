"""Converts checkpoints: imports them, merges LoRAs, exports students, and checks that PyTorch computes the same."""
