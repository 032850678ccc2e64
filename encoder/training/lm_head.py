"""Finds the frozen language-model head that MNTP needs beside a headless backbone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from uncausal.encoder.loading import hub_only

NAMES = ("lm_head", "embed_out", "output")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def find_head(
    backbone: Any, source: str | None = None, hub: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the head's weight (V, d) and bias (V,) or None, on the backbone's device and in its dtype.

    Args:
        backbone: headless model. With tied weights its input embedding is the head, shared, not copied.
        source: folder or model id of the causal checkpoint; by default where the model was loaded from.
        hub: how a model id is looked for there (`EncoderSpec.hub`); its revision is of the default source.

    Raises:
        ValueError: the weights are not tied and no checkpoint in safetensors holds a head of this width.
    """
    if backbone.config.get_text_config().tie_word_embeddings and source is None:
        return backbone.get_input_embeddings().weight, None
    options = dict(hub_only(hub or {}), **({} if source is None else {"revision": None}))
    source = source or str(getattr(backbone.config, "_name_or_path", ""))
    file = source and (_file(source, INDEX, options) or _file(source, SINGLE, options))
    found = _read(Path(file), source, options) if file else {}
    for name in NAMES:
        weight = found.get(f"{name}.weight")
        if weight is not None and weight.shape[1] == backbone.config.get_text_config().hidden_size:
            bias = found.get(f"{name}.bias")
            like = {"device": backbone.device, "dtype": backbone.dtype}
            return weight.to(**like), None if bias is None else bias.to(**like)
    raise ValueError(
        f"no language-model head for MNTP in {source or 'memory'!r}: the embeddings are not tied, and an "
        "encoder is saved without its head. Name the causal checkpoint: MNTP(head='<folder or model id>')."
    )


def _file(source: str, name: str, options: dict[str, Any]) -> str | None:
    if Path(source).is_dir():
        path = Path(source) / name
        return str(path) if path.exists() else None
    try:
        return cached_file(source, name, **options, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None


def _read(file: Path, source: str, options: dict[str, Any]) -> dict[str, Tensor]:
    wanted = {f"{name}.{kind}" for name in NAMES for kind in ("weight", "bias")}
    shards = {name: file for name in wanted}
    if file.name == INDEX:
        places = json.loads(file.read_text())["weight_map"]
        shards = {name: Path(_file(source, places[name], options) or "") for name in wanted & places.keys()}
    tensors: dict[str, torch.Tensor] = {}
    for shard in set(shards.values()):
        with safe_open(shard, "pt") as weights:
            for name in wanted & set(weights.keys()):
                tensors[name] = weights.get_tensor(name)
    return tensors
