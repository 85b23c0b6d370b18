"""Checkpoints in and out: import, merge, export, and the proof that PyTorch computes the same."""
