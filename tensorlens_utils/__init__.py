"""Read transformers as tensors. Names are imported when first used, so that ``import tensorlens_utils`` costs nothing."""

import importlib

_HOMES = {
    "data": ("load_data",),
    "models": ("load_model", "zoo"),
    "rules": ("register_rule",),
    "linearize": ("linearize", "linearize_function", "UnsupportedOperation"),
    "tensor": ("AttentionTensor",),
}
_HOME = {name: room for room, names in _HOMES.items() for name in names}
__all__ = [*_HOME]


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"tensorlens_utils has no {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__
