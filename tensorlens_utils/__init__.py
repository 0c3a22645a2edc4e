"""Read transformers as tensors. Names are imported when first used, so ``import tensorlens_utils`` costs nothing."""

import importlib
import sys
import types

_HOMES = {
    "data": ("load_data",),
    "models": ("load_model", "zoo"),
    "linearize.rules": ("register_rule",),
    "linearize.values": ("UnsupportedOperation",),
    "linearize": ("linearize", "linearize_function"),
    "tensor": ("AttentionTensor",),
    "collapse.explaining": ("explain",),
    "exploring": ("explore",),
    "notation.networks": ("diagram_of",),
}
_HOME = {name: room for room, names in _HOMES.items() for name in names}
__all__ = [*_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"tensorlens_utils has no {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__


class _Package(types.ModuleType):
    """``linearize`` is the function; importing the module of that name must not put the module in its place."""

    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
