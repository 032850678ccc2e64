"""Sentence-level evaluation: Spearman correlation on STS sets, and the encoding speed measured on the way."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch.nn.functional import cosine_similarity

from uncausal.encoder.inputs import check_finite

if TYPE_CHECKING:
    from uncausal.encoder.model import Encoder


class ScoredPair(NamedTuple):
    """Two sentences and their similarity as people judged it."""

    first: str
    second: str
    score: float


class STSResult(NamedTuple):
    """Spearman correlation in points (0 to 100) and the speed it was computed at."""

    spearman: float
    tokens_per_second: float


def read_sts(path: str | Path, split: str | None = None) -> list[ScoredPair]:
    """Read an STS Benchmark file, or the split of that name in a folder.

    The format is the benchmark's own: tab-separated, no header, score in the fifth column, sentences in the
    next two.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line does not have that form, the message gives its number; or a split of a file.
    """
    path = Path(path)
    if path.is_dir():
        path /= f"sts-{split or 'test'}.csv"
    elif split is not None and path.exists():
        raise ValueError(f"{path}: is one file, and has no split {split!r}: name its folder, or no split")
    csv.field_size_limit(2**31 - 1)
    pairs = []
    with open(path, encoding="utf8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            try:
                pairs.append(ScoredPair(row[5], row[6], float(row[4])))
                if not math.isfinite(pairs[-1].score):
                    raise ValueError(f"the score is {row[4]}")
            except (IndexError, ValueError) as error:
                raise ValueError(f"{path}:{number}: not an STS Benchmark line ({error})") from error
    return pairs


def evaluate_sts(encoder: Encoder, pairs: Sequence[ScoredPair], **encode_options) -> STSResult:
    """Return Spearman's correlation of cosines with the gold scores, times 100, and tokens a second.

    Every sentence is encoded once, in one call; the clock covers tokenisation and encoding.

    Raises:
        ValueError: a vector is not finite, or there is no correlation, as all are alike.
    """
    [result] = evaluate_sts_by_pooling(encoder, pairs, 1, **encode_options)
    return result


def evaluate_sts_by_pooling(
    encoder: Encoder, pairs: Sequence[ScoredPair], num_poolings: int, **encode_options
) -> list[STSResult]:
    """Score each of `num_poolings` vectors that a combined pooling lays side by side, all from one pass."""
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))
    row = {text: index for index, text in enumerate(texts)}
    tokens = sum(map(len, encoder.tokenizer(texts)["input_ids"]))
    start = time.perf_counter()
    vectors = encoder.encode(texts, convert_to_tensor=True, **encode_options)
    speed = tokens / (time.perf_counter() - start)
    first = torch.tensor([row[pair.first] for pair in pairs])
    second = torch.tensor([row[pair.second] for pair in pairs])
    gold = [pair.score for pair in pairs]
    check_finite(vectors.float().cpu().numpy(), texts)
    results = []
    for part in vectors.float().cpu().chunk(num_poolings, dim=1):
        cosines = cosine_similarity(part[first], part[second]).numpy()
        correlation: Any = spearmanr(cosines, gold)[0]
        if not math.isfinite(correlation):
            raise ValueError("there is no correlation: all gold scores, or all cosines, are the same")
        results.append(STSResult(100 * float(correlation), speed))
    return results
