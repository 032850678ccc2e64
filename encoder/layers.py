"""Finds the parts of a decoder-only model: the text decoder, its layers, the norm behind the last of them."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm", "layer_norm")


def find_decoder(model: nn.Module) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the outermost transformers model, and the text decoder within.

    Raises:
        TypeError: there is no transformers model inside.
    """
    pretrained = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if pretrained is None:
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    decoder = pretrained.get_decoder()
    return pretrained, decoder if isinstance(decoder, PreTrainedModel) else pretrained


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers, from the first to the last.

    Args:
        model: a decoder-only transformers model, with or without a head or peft adapters.

    Raises:
        ValueError: the model has no such list.
    """
    _, decoder = find_decoder(model)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)  # experts, not layers
        if isinstance(module, nn.ModuleList) and len(module) and not inner:
            lists[name] = module
    if not lists:
        raise ValueError(f"found no decoder layers in {type(decoder).__name__}")
    depth = decoder.config.get_text_config().num_hidden_layers
    return max(lists.values(), key=lambda x: (len(x) == depth, len(x)))


def final_norm(model: nn.Module) -> nn.Module:
    """Return the norm that follows the last layer, or the identity where the model has none."""
    layers: Any = decoder_layers(model)
    owner = next((m for m in model.modules() if any(c is layers for c in m.children())), model)
    norms = (getattr(owner, name, None) for name in FINAL_NORMS)
    return next((norm for norm in norms if norm is not None), nn.Identity())
