"""Commands that make one model of another: convert, prune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from uncausal.encoder.cli.options import Json, Loading, LoadingWhole, check_writable, facts, report
from uncausal.encoder.files import check_replaceable


def convert(
    model: Positional[str],
    output: Positional[Path],
    /,
    *,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Turn a causal checkpoint into an encoder folder.

    Args:
        model: Hugging Face id, model folder or .gguf file.
        output: folder to write.
    """
    check_writable(output, folder=True)
    check_replaceable(output)
    encoder = loading.load(model)
    encoder.save_pretrained(str(output))
    report(facts(encoder, output), as_json)


def prune(
    model: Positional[str],
    output: Positional[Path],
    /,
    *,
    pairs: str | None = None,
    keep: str | None = None,
    drop: float | None = None,
    limit: int | None = None,
    min_score: float | None = None,
    loading: LoadingWhole = LoadingWhole(),
    as_json: Json = False,
) -> None:
    """Keep the first layers of a model, as many as L3Prune says.

    Args:
        model: encoder folder, or anything `convert` takes.
        output: folder to write; the curve is saved in it as layer_losses.png.
        pairs: file of pairs or triplets for the loss of every layer.
        keep: small, large (the default), or a number of layers.
        drop: fraction of the layers to drop instead.
        limit: read at most so many pairs (6400 by default, as in the paper).
        min_score: of scored pairs, take those whose score is at least this.
    """
    from uncausal.encoder.pruning import Pruning, plot_layer_losses

    if keep is not None and drop is not None:
        raise ValueError("give --keep or --drop: both say how many layers stay")
    given = {"keep": int(keep) if keep and keep.isdigit() else keep, "drop": drop, "triplets": limit}
    given["min_score"] = min_score
    if keep not in (None, "small", "large") and not keep.isdigit():
        raise ValueError(f"--keep takes small, large or a number of layers, not {keep!r}")
    pruning = Pruning(**{name: value for name, value in given.items() if value is not None})  # pyright: ignore
    if not pruning.needs_data and (pairs, limit, min_score) != (None, None, None):
        raise ValueError("--pairs, --limit and --min-score choose a depth, which --keep N or --drop P says")
    if pruning.needs_data and pairs is None:
        raise ValueError("L3Prune needs --pairs FILE to choose a depth; or give --keep N or --drop P")
    check_writable(output, folder=True)
    check_replaceable(output)
    encoder = loading.load(model)
    depth = encoder.num_layers
    choice = pruning.choose(encoder, pairs)
    encoder.prune(choice.kept)
    encoder.save_pretrained(str(output))
    figures: dict[str, Any] = {**facts(encoder, output), "layers_before": depth}
    if choice.losses is not None and choice.depths is not None:
        plot = output / "layer_losses.png"
        plot_layer_losses(choice.losses, choice.depths, plot, choice.kept)
        figures |= {**choice.depths._asdict(), "plot": str(plot)}
        if as_json:
            figures["losses"] = choice.losses
    report(figures, as_json)
