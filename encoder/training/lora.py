"""What a stage trains: a fresh low-rank adapter, or all weights; saved and loaded as checkpoints need it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from uncausal.encoder.adapters import check_adapter
from uncausal.encoder.layers import decoder_layers

logger = logging.getLogger(__name__)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXTRA_FILE = "trainable.safetensors"


def attach_lora(
    backbone: Any,
    *,
    r: int,
    alpha: int,
    dropout: float,
    rslora: bool = False,
    target_modules: Sequence[str] = LORA_TARGETS,
    trainable_layers: Sequence[int] | None = None,
) -> PeftModel:
    """Put a fresh low-rank adapter into the backbone, in place; everything else is frozen.

    Args:
        backbone: headless Hugging Face model; stays usable as before.
        r: rank. alpha: the update is scaled by alpha / r. dropout: on the adapter's input.
        rslora: scale by alpha / sqrt(r) instead.
        target_modules: names of linear layers. The default names are Llama's; a model with other names gets
            an adapter on every linear layer of its decoder layers.
        trainable_layers: decoder layers to adapt, from 0; all by default. The backward pass stops
            below the lowest.

    Returns:
        peft's view of the same backbone.

    Raises:
        ValueError: a target or a layer that the model does not have.
    """
    decoder = decoder_layers(backbone)
    name = next(name for name, module in backbone.named_modules() if module is decoder)
    linear = {
        path.rsplit(".", 1)[-1]
        for path, module in decoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    missing = [target for target in target_modules if target not in linear]
    if missing and tuple(target_modules) != LORA_TARGETS:
        raise ValueError(f"{type(backbone).__name__} has no linear layer {missing}; it has {sorted(linear)}")
    if missing:
        logger.info("adapting every linear layer of %s: %s", type(backbone).__name__, sorted(linear))
    check_layers(decoder, trainable_layers)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=sorted(linear) if missing else list(target_modules),
        # Without the pattern peft wants a parent module before "layers", and a headless model has none.
        layers_to_transform=None if trainable_layers is None else list(trainable_layers),
        layers_pattern=None if trainable_layers is None else name.rsplit(".", 1)[-1],
    )
    if getattr(backbone, "peft_config", None):
        raise ValueError("the backbone already carries an adapter: merge or unload it first")
    adapter = get_peft_model(backbone, config)
    for module in adapter.modules():
        if type(module) is LoraLinear:
            module.__class__ = LowRankLinear
        if isinstance(module, LoraLayer):
            for name, layer in module.lora_dropout.items():
                if isinstance(layer, nn.Dropout):
                    module.lora_dropout[name] = InputDropout(layer.p)
    return adapter


class LowRankLinear(LoraLinear):
    """peft's, which scales what comes out of B, adds it in a pass of its own, and casts its input twice.

    Here r numbers a token are scaled, B's product adds to the layer's, and autocast finds what it wants.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = len(self.active_adapters) == 1 and self.active_adapters[0] in self.lora_A
        if not plain or args or kwargs or self.disable_adapters or self.merged or self.lora_variant:
            return super().forward(x, *args, **kwargs)
        [name] = self.active_adapters
        a: Any = self.lora_A[name]
        own = a.weight.dtype
        if torch.is_autocast_enabled(x.device.type):
            own = torch.get_autocast_dtype(x.device.type)
            x = x.to(own)
        out = self.base_layer(x)
        b: Any = self.lora_B[name]
        dropout: Any = self.lora_dropout[name]
        down = a(dropout(x.to(own))) * self.scaling[name]
        if down.dtype != out.dtype or b.bias is not None:
            return out + b(down).to(out.dtype)
        return torch.addmm(out.flatten(0, -2), down.flatten(0, -2), b.weight.t()).view_as(out)


class InputDropout(nn.Dropout):
    """Dropout that on a CPU draws four values of 16 bits at once: one by one they took a fifth of a step.

    There p is rounded to a multiple of 2^-16.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        dropped = min(round(self.p * 65536), 65535)
        words = torch.randint(
            -(1 << 63), (1 << 63) - 1, (-(-input.numel() // 4),)
        )  # compiles; random_ does not
        draws = words.view(torch.int16)[: input.numel()].view(input.shape)
        return input * (draws >= dropped - 32768).to(input.dtype).mul_(65536 / (65536 - dropped))


def check_layers(decoder: Any, trainable_layers: Sequence[int] | None) -> None:
    """Refuse numbers of layers that the model does not have, and none."""
    if trainable_layers is not None and not len(trainable_layers):
        raise ValueError("trainable_layers is empty; None are all of them")
    outside = [index for index in trainable_layers or () if not 0 <= index < len(decoder)]
    if outside:
        raise ValueError(f"layers {outside} do not exist: the model has the layers 0 to {len(decoder) - 1}")


def save_trainable(
    model: nn.Module, adapter: PeftModel | None, path: Path, loss: nn.Module | None = None
) -> None:
    """Save the adapter in peft's format, and what else is trained: pooling, a loss, all without LoRA."""
    path.mkdir(parents=True, exist_ok=True)
    if adapter is not None:
        adapter.save_pretrained(str(path))
        (path / "README.md").unlink(missing_ok=True)  # peft's empty model card
    trained = _beside_adapter(model, loss)
    if extra := {name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()}:
        save_file(extra, path / EXTRA_FILE)


def load_trainable(
    model: nn.Module, adapter: PeftModel | None, path: Path, loss: nn.Module | None = None
) -> None:
    """Load what `save_trainable` wrote into a model prepared in the same way.

    Raises:
        ValueError: the tensors are not those of this model; the message names one.
    """
    trained = _beside_adapter(model, loss)
    extra = load_file(path / EXTRA_FILE) if (path / EXTRA_FILE).exists() else {}
    if extra.keys() != trained.keys():
        odd = sorted(extra.keys() ^ trained.keys())[0]
        raise ValueError(f"{path}: {odd!r} is trained here or saved there, but not both")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(extra[name])
    if adapter is not None:
        check_adapter(adapter.get_base_model(), path)
        adapter.load_adapter(str(path), "default", is_trainable=True)


def _beside_adapter(model: nn.Module, loss: nn.Module | None) -> dict[str, nn.Parameter]:
    """What is trained but the adapter: of the model, and of a loss that has weights of its own."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    if loss is not None:
        # a model inside the loss guides it, and is not trained (GISTEmbed)
        models = [model, *(part for part in loss.modules() if isinstance(part, SentenceTransformer))]
        of_model = {id(parameter) for one in models for parameter in one.parameters()}
        own = ((name, p) for name, p in loss.named_parameters() if p.requires_grad and id(p) not in of_model)
        trained |= {f"loss.{name}": parameter for name, parameter in own}
    return trained
