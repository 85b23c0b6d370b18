"""Model folders: finds them, downloads them, and reads and writes their tensors. safetensors only, no PyTorch."""
