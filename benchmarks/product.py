"""The large matrix product with whose rate the rates of other programs are compared."""


def on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def product_side() -> int:
    """Returns the number of rows and columns of the matrices."""
    return 2**13 if on_gpu() else 2**11
