"""TiUE-JAX: distil Stable Diffusion into a loop-free student, train it on TPU pods, sample it anywhere."""
