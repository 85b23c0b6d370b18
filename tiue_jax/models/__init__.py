"""Flax modules of the Stable Diffusion stack, with the parameter names that diffusers and transformers use."""
