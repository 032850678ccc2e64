"""Low-rank adapters on a headless backbone: attached, saved, loaded, merged; and attention dropout.

Every stage trains the same kind of adapter: its tensors are named `base_model.model.layers.N...`. Those of an
adapter trained on a `...ForCausalLM` are named `base_model.model.model.layers.N...`; peft would load nothing
of it into a headless model and only warn, so it is refused here.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from uncausal.encoder.pruning import decoder_layers
from uncausal.encoder.stages import LORA_TARGETS

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
EXTRA_FILE = "trainable.safetensors"
PREFIX = "base_model.model."
LOST_IN_MERGE = 0.05


def attach_lora(
    backbone: Any,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str] = LORA_TARGETS,
    layers: Sequence[int] | None = None,
) -> PeftModel:
    """Put a fresh low-rank adapter into the backbone, in place; everything else is frozen.

    Args:
        backbone: headless Hugging Face model; stays usable as before.
        r: rank. alpha: the update is scaled by alpha / r. dropout: on the adapter's input.
        target_modules: names of linear layers. The default names are Llama's; a model with other names gets
            an adapter on every linear layer of its decoder layers.
        layers: decoder layers to adapt, from 0; all by default. The backward pass stops below the lowest.

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
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    missing = [target for target in target_modules if target not in linear]
    if missing and tuple(target_modules) != LORA_TARGETS:
        raise ValueError(f"{type(backbone).__name__} has no linear layer {missing}; it has {sorted(linear)}")
    if missing:
        logger.info("adapting every linear layer of %s: %s", type(backbone).__name__, sorted(linear))
    outside = [index for index in layers or () if not 0 <= index < len(decoder)]
    if outside:
        raise ValueError(f"layers {outside} do not exist: the model has the layers 0 to {len(decoder) - 1}")
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(linear) if missing else list(target_modules),
        # Without the pattern peft wants a parent module before "layers", and a headless model has none.
        layers_to_transform=None if layers is None else list(layers),
        layers_pattern=None if layers is None else name.rsplit(".", 1)[-1],
    )
    if getattr(backbone, "peft_config", None):
        raise ValueError("the backbone already carries an adapter: merge or unload it first")
    return get_peft_model(backbone, config)


def save_trainable(model: nn.Module, adapter: PeftModel | None, path: Path) -> None:
    """Save the adapter in peft's format, and what else is trained: a pooling layer, or all without LoRA."""
    path.mkdir(parents=True, exist_ok=True)
    if adapter is not None:
        adapter.save_pretrained(str(path))
        (path / "README.md").unlink(missing_ok=True)  # peft's empty model card
    extra = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    if extra:
        save_file(extra, path / EXTRA_FILE)


def load_trainable(model: nn.Module, adapter: PeftModel | None, path: Path) -> None:
    """Load what `save_trainable` wrote into a model prepared in the same way.

    Raises:
        ValueError: the tensors are not those of this model; the message names one.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
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


def check_adapter(backbone: nn.Module, path: str | Path) -> None:
    """Refuse an adapter whose tensors do not belong to this headless backbone.

    Raises:
        FileNotFoundError: no adapter in safetensors at `path`.
        ValueError: it was trained on a model with a head, or on other layers; the message names the prefix.
    """
    file = Path(path) / ADAPTER_FILE
    if not file.exists():
        raise FileNotFoundError(f"no {ADAPTER_FILE} in {path} (only safetensors are read)")
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file}: not readable as safetensors ({error})") from None
    modules = {name.replace(".base_layer", "") for name, _ in backbone.named_modules()}
    for name in names:
        module = name.removeprefix(PREFIX).partition(".lora_")[0]
        if name.startswith(PREFIX) and module in modules:
            continue
        layer = next((known for known in sorted(modules) if known and module.endswith(f".{known}")), None)
        if layer is not None:
            found = name[: name.index(layer)]
            raise ValueError(
                f"{file}: was trained on a model with a head: its tensors start with {found!r}, those of a "
                f"headless {type(backbone).__name__} start with {PREFIX!r}. Train it on the headless model."
            )
        raise ValueError(f"{file}: the tensor {name!r} fits no module of {type(backbone).__name__}")


def load_adapter(backbone: Any, path: str | Path) -> None:
    """Merge a saved adapter into a headless backbone, in place.

    Raises:
        FileNotFoundError: no adapter in safetensors at `path`.
        ValueError: the adapter belongs to another model, or to one with a head.
    """
    check_adapter(backbone, path)
    merge_lora(PeftModel.from_pretrained(backbone, str(path)))


def merge_lora(adapter: PeftModel) -> float:
    """Add the adapter to the weights, in place, and remove it.

    Returns:
        The share of the update, by norm, lost in rounding to the weights' dtype: bfloat16 weights swallow an
        update smaller than their last place.
    """
    wanted = lost = 0.0
    for module in adapter.modules():
        if not hasattr(module, "get_delta_weight") or "default" not in getattr(module, "lora_A", {}):
            continue
        weight: Any = module.get_base_layer().weight  # type: ignore[operator]
        with torch.no_grad():
            delta = module.get_delta_weight("default").float()  # type: ignore[operator]
            kept = (weight.float() + delta).to(weight.dtype).float() - weight.float()
            wanted += delta.square().sum().item()
            lost += (kept - delta).square().sum().item()
    backbone: Any = adapter.merge_and_unload(safe_merge=True)
    _forget(backbone)
    share = (lost / wanted) ** 0.5 if wanted else 0.0
    if share > LOST_IN_MERGE:
        logger.warning(
            "merging the adapter into %s weights rounded away %.0f%% of it; to train, load the encoder with "
            "dtype='float32' (matrix products still run in bfloat16 where the hardware has it)",
            str(backbone.dtype).removeprefix("torch."),
            100 * share,
        )
    return share


def unload_lora(adapter: PeftModel) -> None:
    """Remove the adapter, in place, leaving the weights as they were before it."""
    _forget(adapter.unload())


def _forget(backbone: Any) -> None:
    # peft leaves its configuration behind and takes the next adapter for a second one beside the first.
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config


@contextmanager
def attention_dropout(backbone: Any, p: float) -> Iterator[None]:
    """Set the dropout of the attention probabilities for a while, where every module reads it.

    Attention modules copy the configuration's value when they are built (a float in Llama, an nn.Dropout in
    GPT-2, called `dropout` in OPT); some read it at each call: both are set. Falcon ignores it: refused.

    Raises:
        ValueError: the dropout does not change what the model computes in training mode.
    """
    names = ("attention_dropout", "attn_dropout", "attn_pdrop", "attn_dropout_p")
    saved: list[tuple[Any, str, float]] = []
    for owner in (backbone.config, *backbone.modules()):
        attention = type(owner).__name__.endswith("Attention")
        for name in (*names, "dropout") if attention else names:
            value = getattr(owner, name, None)
            if isinstance(value, nn.Dropout):
                saved.append((value, "p", value.p))
            elif isinstance(value, float | int) and not isinstance(value, bool):
                saved.append((owner, name, value))
    try:
        _set(saved, p)
        if p > 0:
            _assert_dropout_acts(backbone, p, saved)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


@torch.no_grad()
def _assert_dropout_acts(backbone: Any, p: float, saved: list[tuple[Any, str, float]]) -> None:
    device = next(backbone.parameters()).device
    ids = torch.arange(16, device=device)[None] % backbone.config.get_text_config().vocab_size
    outputs = []
    training = backbone.training
    backbone.train()
    # The same seed with and without, so that another dropout of the model cannot pass for this one.
    for value in (p, 0.0):
        _set(saved, value)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            outputs.append(backbone(input_ids=ids, use_cache=False).last_hidden_state)
    backbone.train(training)
    _set(saved, p)
    if torch.equal(*outputs):
        raise ValueError(
            f"attention dropout {p} has no effect on {type(backbone).__name__} with "
            f"{backbone.config._attn_implementation!r} attention: both views of a text would be the same"
        )


def _set(places: list[tuple[Any, str, float]], p: float) -> None:
    for owner, name, _ in places:
        setattr(owner, name, p)
