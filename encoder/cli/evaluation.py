"""Commands that say how good an encoder is: eval."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from uncausal.encoder.cli.options import Json, Loading, report


def evaluate(
    model: Positional[str],
    data: Positional[Path],
    /,
    *,
    split: Literal["train", "dev", "test"] = "dev",
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Print the Spearman correlation on an STS set, and tokens a second.

    Args:
        model: encoder folder, or anything `convert` takes.
        data: STS Benchmark file, or the folder that holds sts-SPLIT.csv.
        split: of the folder.
    """
    from uncausal.encoder.evaluation.sts import evaluate_sts, read_sts

    try:
        pairs = read_sts(data, split)
    except UnicodeDecodeError as error:
        raise ValueError(f"{data}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    if len(pairs) < 2:
        raise ValueError(f"{data}: a correlation needs at least 2 scored pairs, and there are {len(pairs)}")
    result = evaluate_sts(loading.load(model), pairs, show_progress_bar=sys.stderr.isatty())
    figures = {"spearman": round(result.spearman, 2), "tokens_per_second": round(result.tokens_per_second, 1)}
    report({**figures, "pairs": len(pairs)}, as_json)
