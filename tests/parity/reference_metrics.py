"""The packages that features and metrics are compared with: torch-fidelity, clean-fid, prdc and open_clip."""

import importlib
import sys
import types
from typing import Any

import transformers  # noqa: F401  # now, since it asks whether torchvision is there


def torch_fidelity_module(name: str) -> Any:
    """Imports a module of torch-fidelity. The package imports torchvision, of which these tests use nothing."""
    return _import_without_torchvision(f"torch_fidelity.{name}")


def open_clip_module(name: str) -> Any:
    """Imports a module of open_clip, which asks for torchvision as well."""
    return _import_without_torchvision(f"open_clip.{name}")


def _import_without_torchvision(name: str) -> Any:
    stand_ins = {}
    for module in ("", ".datasets", ".models", ".ops", ".ops.misc", ".transforms", ".transforms.functional"):
        module = f"torchvision{module}"
        if module not in sys.modules:
            stand_ins[module] = sys.modules[module] = _Anything(module)
    try:
        return importlib.import_module(name)
    finally:
        for module in stand_ins:  # transformers asks whether torchvision is there
            del sys.modules[module]


class _AnyClass(type):
    """The type of classes that have every name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyClass(name, (), {})


class _Anything(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or _AnyClass(name, (), {})


def clean_fid() -> Any:
    """clean-fid's module of distances."""
    return _import_without_torchvision("cleanfid.fid")


def clean_resizer() -> Any:
    """clean-fid's function that resizes an image uint8 [h w 3] to 299 pixels."""
    return _import_without_torchvision("cleanfid.resize").build_resizer("clean")
