"""Pairs and triplets: read from any source into columns, anchor first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uncausal.encoder.data.rows import DataError, is_plain, read_rows, text_field

PAIR_COLUMNS = (
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("query", "positive", "negative"),
    ("query", "positive"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
)


def read_pairs(
    source: str | Path,
    columns: Sequence[str] | None = None,
    *,
    min_score: float | None = None,
    score_column: str = "score",
) -> dict[str, list[str]]:
    """Read training pairs (anchor, positive) or triplets with a hard negative.

    Args:
        source: as in `read_texts`; plain text has no fields and is refused.
        columns: the fields to read, anchor first; by default the first of the usual names that the rows have.
        min_score: keep only rows whose `score_column` is at least this.

    Returns:
        One list of texts per column, anchor first, all of the same length.

    Raises:
        FileNotFoundError: no such file.
        DataError: as in `read_texts`, or no row is left.
    """
    texts: dict[str, list[str]] = {name: [] for name in columns or ()}
    for where, row in read_rows(source):
        if is_plain(row):
            raise DataError(f"{where}: pairs need fields, and a plain text file has none: use .jsonl or .tsv")
        if not texts:
            names = next((names for names in PAIR_COLUMNS if row.keys() >= set(names)), None)
            if names is None:
                raise DataError(
                    f"{where}: no pair among the fields {sorted(row)}; pass columns=(anchor, positive)"
                )
            texts = {name: [] for name in names}
        if min_score is not None and _score(row, score_column, where) < min_score:
            continue
        for name, values in texts.items():
            value = text_field(row, name, where)
            if not value.strip():
                raise DataError(f"{where}: the field {name!r} is empty")
            values.append(value)
    if not any(texts.values()):
        kept = "" if min_score is None else f" with {score_column} >= {min_score}"
        raise DataError(f"{source}: holds no pair{kept}")
    return texts


def _score(row: dict[str, Any], name: str, where: str) -> float:
    try:
        return float(row[name])
    except KeyError:
        raise DataError(f"{where}: no field {name!r}; there is {', '.join(map(repr, row))}") from None
    except (TypeError, ValueError):
        raise DataError(f"{where}: the field {name!r} is no number: {row[name]!r}") from None
