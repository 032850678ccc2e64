"""L3Prune (arXiv 2410.14578): keep the first layers of a model, as many as a contrastive loss asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import DatasetDict
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from uncausal.encoder.data.pairs import read_pairs, text_columns
from uncausal.encoder.data.rows import DataError
from uncausal.encoder.layers import decoder_layers, final_norm

if TYPE_CHECKING:
    from uncausal.encoder.model import Encoder


class Depths(NamedTuple):
    """The two depths of L3Prune, in layers kept."""

    small: int
    large: int


@dataclass(kw_only=True)
class Pruning:
    """How many of the first layers are kept.

    Args:
        keep: "small" or "large", chosen by the loss after every layer; or a number of layers.
        drop: fraction of the layers dropped, instead.
        triplets: rows for the losses, drawn from all sets, without instructions. temperature: of the loss.
        min_score: of scored pairs, take those whose score is at least this.
        max_length: longer texts are cut.
    """

    keep: str | int = "large"
    drop: float | None = None
    triplets: int = 6400
    temperature: float = 0.02
    min_score: float | None = None
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.keep not in ("small", "large") and (isinstance(self.keep, str) or self.keep < 1):
            raise ValueError(f"Pruning.keep is {self.keep!r}; it must be small, large or a number of layers")
        if self.drop is not None and not 0 <= self.drop < 1:
            raise ValueError(f"Pruning.drop is {self.drop!r}; it must be in [0, 1)")
        if self.triplets < 1:
            raise ValueError(f"Pruning.triplets is {self.triplets!r}; it must be at least 1")
        if self.max_length < 1:
            raise ValueError(f"Pruning.max_length is {self.max_length!r}; it must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"Pruning.temperature is {self.temperature!r}; it must be above 0")

    @property
    def needs_data(self) -> bool:
        return self.drop is None and isinstance(self.keep, str)

    def choose(self, encoder: Encoder, triplets: Any = None, *, show_progress_bar: bool = True) -> Choice:
        """Decide the depth of an encoder.

        Args:
            encoder: at full depth.
            triplets: a source for `read_pairs`; used where a curve decides.
            show_progress_bar: draw a bar over the batches.

        Raises:
            ValueError: a curve must decide and there are no triplets.
        """
        if self.drop is not None:
            return Choice(depth_from_fraction(encoder.num_layers, self.drop))
        if isinstance(self.keep, int):
            return Choice(self.keep)
        if triplets is None:
            raise ValueError(f"keep={self.keep!r} is read off the loss after every layer, which needs pairs")
        pairs = read_pairs(triplets, min_score=self.min_score)
        sets = list(pairs.values()) if isinstance(pairs, DatasetDict) else [pairs]
        width = min(len(text_columns(part)) for part in sets)  # rows of one batch have as many texts
        share = min(self.triplets / sum(map(len, sets)), 1)  # of every set, however many there are
        rows = [
            row
            for part in (part.shuffle(seed=0).select(range(math.ceil(share * len(part)))) for part in sets)
            for row in zip(*(part[name] for name in text_columns(part)[:width]), strict=True)
        ]
        losses = layer_losses(
            encoder,
            rows[: self.triplets],
            temperature=self.temperature,
            max_length=self.max_length,
            show_progress_bar=show_progress_bar,
        )
        depths = l3prune(losses)
        return Choice(getattr(depths, self.keep), depths, losses)


class Choice(NamedTuple):
    """A depth, and where a curve decided it, the curve.

    Attributes:
        kept: layers to keep.
        depths: L3Prune's two depths. losses: after every layer.
    """

    kept: int
    depths: Depths | None = None
    losses: list[float] | None = None


def layer_losses(
    encoder: Encoder,
    triplets: Sequence[Sequence[str]],
    *,
    batch_size: int = 64,
    temperature: float = 0.02,
    max_length: int | None = None,
    show_progress_bar: bool = True,
) -> list[float]:
    """Return the contrastive loss after every layer, all layers in one pass without gradients.

    After each layer come the final norm and the encoder's pooling; the loss is InfoNCE on cosines with
    in-batch negatives and, where given, each anchor's hard negatives.

    Args:
        encoder: the encoder, at full depth.
        triplets: (anchor, positive) or (anchor, positive, negative, ...) texts, all of one length; the paper
            uses about 6,400.
        batch_size: anchors a batch; the last incomplete batch is left out unless it is the only one.
        temperature: of the softmax.
        max_length: longer texts are cut, and what is longer than the encoder takes.
        show_progress_bar: draw a bar over the batches.

    Returns:
        One mean loss per layer, first layer first.
    """
    if not triplets:
        raise DataError("layer_losses needs at least one (anchor, positive[, negative]) row")
    if min(batch_size, len(triplets)) == 1 and len(triplets[0]) == 2:
        raise DataError(
            "a batch of one pair has no negative, and the loss is 0 at every depth: give more pairs"
        )
    layers, limit = decoder_layers(encoder.backbone), encoder.max_seq_length
    norm, weighed = final_norm(encoder.backbone), encoder.pooling == "sif"
    pooling = nn.Sequential(*list(encoder)[1 : 3 if weighed else 2])
    features: dict[str, Any] = {}
    embeddings: list[Tensor] = []

    def pool(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        embeddings.append(pooling({**features, "token_embeddings": norm(hidden)})["sentence_embedding"])

    batches = [triplets[i : i + batch_size] for i in range(0, len(triplets), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    losses = torch.zeros(len(layers), dtype=torch.float64)
    handles = [layer.register_forward_hook(pool) for layer in layers]
    encoder.eval()
    if max_length is not None:
        encoder.max_seq_length = min(max_length, limit or max_length)
    try:
        with torch.inference_mode():
            for rows in tqdm(batches, desc="Layer losses", unit="batch", disable=not show_progress_bar):
                columns: list[list[Tensor]] = []
                for texts in zip(*rows, strict=True):
                    embeddings.clear()
                    features.clear()
                    features.update(batch_to_device(encoder.preprocess(list(texts)), encoder.device))
                    encoder[0](dict(features))
                    columns.append(list(embeddings))
                losses += torch.tensor(
                    [_info_nce(layer, temperature) for layer in zip(*columns, strict=True)]
                )
    finally:
        encoder.max_seq_length = limit
        for handle in handles:
            handle.remove()
    return (losses / len(batches)).tolist()


def l3prune(losses: Sequence[float]) -> Depths:
    """Return the small and the large depth: the layer of least loss in either half of the model."""
    if len(losses) < 2:
        raise ValueError(f"L3Prune needs the losses of at least two layers, got {len(losses)}")
    if odd := [number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)]:
        raise ValueError(
            f"the loss after layer {odd[0]} is {losses[odd[0] - 1]}: load the model in another dtype"
        )
    middle = len(losses) // 2
    small = min(range(middle), key=losses.__getitem__) + 1
    large = min(range(middle, len(losses)), key=losses.__getitem__) + 1
    return Depths(small, large)


def depth_from_fraction(num_layers: int, fraction: float) -> int:
    """Return the layers kept when `fraction` of `num_layers` is dropped: int(N (1 - p))."""
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction of layers to drop must be in [0, 1), got {fraction}")
    return max(1, math.floor(num_layers * (1 - fraction) + 1e-9))


def prune_layers(model: nn.Module, num_layers: int) -> nn.Module:
    """Keep the first `num_layers` decoder layers of a headless Hugging Face model, in place.

    Every per-layer list of the configuration (`layer_types`, ...) is cut as well, or it could not be saved.

    Raises:
        ValueError: `num_layers` is not between 1 and the model's depth, or the model has more to a layer than
            its place in the list.
    """
    layers = decoder_layers(model)
    depth = len(layers)
    if not 1 <= num_layers <= depth:
        raise ValueError(f"cannot keep {num_layers} layers: the model has {depth}")
    config: Any = model.config
    config = config.get_text_config()
    if getattr(config, "hidden_size_per_layer_input", None) and num_layers < depth:
        raise ValueError(
            f"{type(model).__name__} has embeddings of every layer in one matrix, which is not cut: it "
            "cannot be pruned"
        )
    del layers[num_layers:]
    names: dict[str, Any] = {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): num_layers}
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth:
            names[name] = value[:num_layers]
    if "attention_types" in vars(config):  # GPT-Neo counts kinds of layers by repeated groups
        names["attention_types"] = [[names.get("attention_layers", config.attention_layers), 1]]
    if "scale_depth" in vars(config):  # MiniCPM3 divides it by the root of the depth, once, when it is built
        names["scale_depth"] = config.scale_depth * math.sqrt(num_layers / depth)
    for name, value in names.items():
        setattr(config, name, value)
    return model


def plot_layer_losses(
    losses: Sequence[float], depths: Depths, path: str | Path, kept: int | None = None
) -> None:
    """Save the curve of losses over depth with both of L3Prune's choices marked."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    axes.plot(range(1, len(losses) + 1), losses, marker="o", markersize=3)
    for name, depth, color in (("small", depths.small, "tab:green"), ("large", depths.large, "tab:orange")):
        axes.axvline(depth, color=color, linestyle="--", label=f"{name}: {depth} layers")
    if kept is not None and kept not in depths:
        axes.axvline(kept, color="tab:red", linestyle=":", label=f"kept: {kept} layers")
    axes.set(xlabel="layers kept", ylabel="contrastive loss", title="L3Prune: loss after every layer")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _info_nce(columns: Sequence[Tensor], temperature: float) -> float:
    anchor, *candidates = [F.normalize(column.float(), dim=-1) for column in columns]
    logits = anchor @ torch.cat(candidates).T / temperature
    return F.cross_entropy(logits, torch.arange(len(anchor), device=logits.device)).item()
