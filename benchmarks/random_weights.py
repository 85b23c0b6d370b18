"""Random weights for torch modules that are compared with ours, here and in tests/parity."""

import math

import torch


@torch.no_grad()
def spread_(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws all parameters of a module again, in place. Initial values of 0 and 1 could hide errors.

    Weights are normal with variance 1/fan_in. With normal n, norm scales are 1 + 0.3 n, biases and other vectors 0.3 n.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(0.3 * noise + (1 if name.endswith("weight") else 0))
    return module.eval()
