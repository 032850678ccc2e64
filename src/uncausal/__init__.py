"""Turn any decoder-only language model into a strong, fast text encoder, on Triton kernels.

Public names are resolved on first use, so that `import uncausal` stays fast and needs neither torch nor a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "flash_attn_func": "kernels.attention",
    "flash_attn_varlen_func": "kernels.attention",
    "flash_attn_kvpacked_func": "kernels.attention_packed",
    "flash_attn_qkvpacked_func": "kernels.attention_packed",
    "flash_attn_varlen_kvpacked_func": "kernels.attention_packed",
    "flash_attn_varlen_qkvpacked_func": "kernels.attention_packed",
    "InfoNCE": "kernels.info_nce",
    "info_nce": "kernels.info_nce",
    "info_nce_prefixes": "kernels.info_nce_prefixes",
    "LatentAttentionPooling": "kernels.latent_pooling",
    "latent_attention_pool": "kernels.latent_pooling",
    "PackedLayout": "kernels.packing",
    "pack": "kernels.packing",
    "unpack": "kernels.packing",
    "assert_bidirectional": "encoder.conversion",
    "make_bidirectional": "encoder.conversion",
    "InfoNCELoss": "encoder.training.losses",
    "masked_next_token_loss": "encoder.training.losses",
    "EncoderSpec": "encoder.loading",
    "Encoder": "encoder.model",
    "LatentPooling": "encoder.pooling",
    "pool_packed": "encoder.pooling",
    "l3prune": "encoder.pruning",
    "layer_losses": "encoder.pruning",
    "prune_layers": "encoder.pruning",
    "load_recipe": "encoder.training.recipes",
    "run_recipe": "encoder.training.follow",
    "MNTP": "encoder.training.stages.mntp",
    "Contrastive": "encoder.training.stages.contrastive",
    "Distill": "encoder.training.stages.distill",
    "Instruction": "encoder.training.stages.instruction",
    "Mining": "encoder.training.mining",
    "SimCSE": "encoder.training.stages.simcse",
    "train": "encoder.training.run",
}
__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from uncausal.encoder.conversion import assert_bidirectional, make_bidirectional
    from uncausal.encoder.loading import EncoderSpec
    from uncausal.encoder.model import Encoder
    from uncausal.encoder.pooling import LatentPooling, pool_packed
    from uncausal.encoder.pruning import l3prune, layer_losses, prune_layers
    from uncausal.encoder.training.mining import Mining
    from uncausal.encoder.training.losses import InfoNCELoss, masked_next_token_loss
    from uncausal.encoder.training.follow import run_recipe
    from uncausal.encoder.training.recipes import load_recipe
    from uncausal.encoder.training.run import train
    from uncausal.encoder.training.stages.contrastive import Contrastive
    from uncausal.encoder.training.stages.distill import Distill
    from uncausal.encoder.training.stages.instruction import Instruction
    from uncausal.encoder.training.stages.mntp import MNTP
    from uncausal.encoder.training.stages.simcse import SimCSE
    from uncausal.kernels.attention import flash_attn_func, flash_attn_varlen_func
    from uncausal.kernels.attention_packed import (
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
    )
    from uncausal.kernels.info_nce import InfoNCE, info_nce
    from uncausal.kernels.info_nce_prefixes import info_nce_prefixes
    from uncausal.kernels.latent_pooling import LatentAttentionPooling, latent_attention_pool
    from uncausal.kernels.packing import PackedLayout, pack, unpack


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'uncausal' has no attribute {name!r}")
    value = getattr(import_module(f"uncausal.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
