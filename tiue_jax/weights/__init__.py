"""Model folders: where they are found, and how their tensors are read and written. safetensors only, no PyTorch."""
