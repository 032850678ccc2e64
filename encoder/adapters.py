"""Low-rank adapters on a headless backbone: checked, loaded, merged.

The tensors of every adapter made here are named `base_model.model.layers.N...`. Those of an adapter trained
on a `...ForCausalLM` are named `base_model.model.model.layers.N...`; peft would load nothing of it into a
headless model and only warn: such an adapter is refused in training, and mapped when it is loaded to encode.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
LOST_IN_MERGE = 0.05


def check_adapter(backbone: nn.Module, path: str | Path, *, headless: bool = True) -> str:
    """Refuse an adapter whose tensors do not belong to this headless backbone.

    Args:
        backbone: the headless model.
        path: folder of the adapter.
        headless: False also takes an adapter trained on a model with a head, if none of it is on the head.

    Returns:
        What the names of the adapter's modules have before the backbone's own: "" or the path to it under a
        head.

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
    modules = {name.replace(".base_layer", "") for name, _ in backbone.named_modules()} - {""}
    prefixes = set()
    for name in names:
        module = name.removeprefix(PREFIX).partition(".lora_")[0]
        layer = max((known for known in modules if f".{module}".endswith(f".{known}")), key=len, default=None)
        if layer is None or not name.startswith(PREFIX):
            raise ValueError(f"{file}: the tensor {name!r} fits no module of {type(backbone).__name__}")
        prefixes.add(module.removesuffix(layer))
    found = min(prefixes, default="")
    if prefixes - {found} or (found and headless):
        raise ValueError(
            f"{file}: was trained on a model with a head: its tensors start with {PREFIX + max(prefixes)!r}, "
            f"those of a headless {type(backbone).__name__} start with {PREFIX!r}. "
            "Train it on the headless model."
        )
    return found


def load_adapter(backbone: Any, path: str | Path, *, headless: bool = True) -> None:
    """Merge a saved adapter into a headless backbone, in place; the rest is as in `check_adapter`."""
    prefix = check_adapter(backbone, path, headless=headless)
    mapping = {f"^{re.escape(prefix)}": ""} if prefix else None
    config = PeftConfig.from_pretrained(str(path))
    config.task_type = None  # peft's class for causal models asks for a head's methods
    merge_lora(PeftModel.from_pretrained(backbone, str(path), config=config, key_mapping=mapping))


def merge_attached(backbone: Any) -> bool:
    """Merge the adapters that transformers attached to a model (`load_adapter`, `add_adapter`), in place.

    Returns:
        Whether there were any.
    """
    if not getattr(backbone, "_hf_peft_config_loaded", False):
        return False
    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent = backbone.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.get_base_layer())
    _forget(backbone)
    backbone._hf_peft_config_loaded = False
    # loading an adapter also taught save_pretrained the adapter's names
    backbone._weight_conversions = [
        conversion
        for conversion in getattr(backbone, "_weight_conversions", None) or []
        if not any(re.search(r"base_model\.|lora_", pattern) for pattern in conversion.source_patterns)
    ]
    return True


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
    return _share(lost, wanted, backbone.dtype)


@torch.no_grad()
def lost_in_rounding(before: Sequence[tuple[nn.Parameter, Tensor]]) -> float:
    """What `merge_lora` returns, of parameters trained in float32 that will have their dtype of before."""
    wanted = lost = 0.0
    for parameter, value in before:
        update = parameter.float() - value.float()
        kept = parameter.to(value.dtype).float() - value.float()
        wanted += update.square().sum().item()
        lost += (kept - update).square().sum().item()
    return _share(lost, wanted, before[0][1].dtype) if before else 0.0


def _share(lost: float, wanted: float, dtype: torch.dtype) -> float:
    share = (lost / wanted) ** 0.5 if wanted else 0.0
    if share > LOST_IN_MERGE:
        logger.warning(
            "%s weights rounded away %.0f%% of what was trained; to train, load the encoder with "
            "dtype='float32' (matrix products still run in bfloat16 where the hardware has it)",
            str(dtype).removeprefix("torch."),
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
