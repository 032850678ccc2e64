"""Turn any decoder-only language model into a strong, fast text encoder, on Triton kernels.

Public names are resolved on first use, so that `import uncausal` stays fast and needs neither torch nor a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "flash_attn_func": "kernels.attention",
    "flash_attn_varlen_func": "kernels.attention",
    "PackedLayout": "kernels.packing",
    "pack": "kernels.packing",
    "unpack": "kernels.packing",
    "Encoder": "encoder.model",
    "make_bidirectional": "encoder.conversion",
    "assert_bidirectional": "encoder.conversion",
    "layer_losses": "encoder.pruning",
    "l3prune": "encoder.pruning",
    "prune_layers": "encoder.pruning",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from uncausal.encoder.conversion import assert_bidirectional, make_bidirectional
    from uncausal.encoder.model import Encoder
    from uncausal.encoder.pruning import l3prune, layer_losses, prune_layers
    from uncausal.kernels.attention import flash_attn_func, flash_attn_varlen_func
    from uncausal.kernels.packing import PackedLayout, pack, unpack


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'uncausal' has no attribute {name!r}")
    value = getattr(import_module(f"uncausal.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
