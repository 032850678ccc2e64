"""Training pairs: one format from any source, checked row by row.

A row has `anchor`, `positive` and any number of negatives (`negative`, `negative_1`, ..., or a list in one of
them); optional are `task` (a set of its own), `instruction` (put before the anchor), `document_instruction`
(before the positive and the negatives, where both sides are of one kind), `id` or `label` (equal ones are no
negatives of each other) and `score`. A set of `text` and `label` becomes triplets by `class_triplets`; its
instructions are of all texts.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from uncausal.encoder.data.rows import DataError, is_plain, read_rows, text_field

logger = logging.getLogger(__name__)

PAIR_NAMES = (
    ("anchor", "positive"),
    ("query", "positive"),
    ("question", "answer"),
    ("query", "answer"),
    ("sentence1", "sentence2"),
)
NEGATIVE = re.compile(r"negative(?:_(\d+))?")
TEXT, LABEL = "text", "label"
INSTRUCTION, DOCUMENT_INSTRUCTION = INSTRUCTIONS = ("instruction", "document_instruction")
NEGATIVE_LABELS = "negative_labels"
READ_WITH = "read_with"  # attribute of a Dataset that `read_pairs` returned: its options, its columns


@dataclass(kw_only=True)
class PairOptions:
    """How rows are read.

    Args:
        columns: the fields of anchor, positive and negatives; by default anchor and positive (or query and
            positive, question and answer, sentence1 and sentence2), and all that are named negative.
        negatives: of every row so many, the first; by default all, and as many in every row. A set of
            classes draws so many, one by default.
        min_score: only rows whose `score` is at least this are pairs.
        scored: keep `score`, where rows have it, as the label for a loss of scores.
        seed: of what a set of classes draws.
    """

    columns: Sequence[str] | None = None
    negatives: int | None = None
    min_score: float | None = None
    scored: bool = False
    seed: int = 0

    def agree_with(self, earlier: PairOptions | None) -> bool:
        """Whether what was read with the earlier options need not be read again."""
        if earlier is None or earlier.scored != self.scored:
            return False
        asked = (self.columns, self.negatives, self.min_score)
        known = (earlier.columns, earlier.negatives, earlier.min_score)
        return all(new in (None, old) for new, old in zip(asked, known, strict=True))


@dataclass
class Pair:
    """A row in the one format, and the place it came from."""

    place: str
    anchor: str
    positive: str
    negatives: list[str] = field(default_factory=list)
    id: Any = None
    negative_ids: list[Any] = field(default_factory=list)  # of each negative, where they are known
    score: float | None = None
    task: str | None = None
    instruction: str | None = None
    document_instruction: str | None = None


def read_pairs(source: Any, **options: Any) -> Dataset | DatasetDict:
    """Read training pairs, triplets or rows with many negatives from any source.

    Args:
        source: a file or a dataset's name (see `rows`), a list of rows (dicts, or tuples in the order anchor,
            positive, negatives), columns, a `Dataset`; or a dict of several of these, a set each.
        options: fields of `PairOptions`.

    What it returned it takes as it is.

    Returns:
        A Dataset with the columns anchor, positive, then negative or negative_1 to negative_K; further
        `label` (integers) where rows carry an id or a label, `negative_labels` (as many integers as
        negatives) of a set of classes, `score` where asked, `instruction` and `document_instruction` where
        rows have one, empty for none. For a dict, or rows with a `task`, a DatasetDict of those.

    Raises:
        FileNotFoundError: no such file.
        DataError: a row that is no pair; the message names file, row and field.
    """
    settings = PairOptions(**options)
    if isinstance(source, Mapping) and not _is_columns(source):
        if not source:
            raise DataError("the data hold no set")
        parts: dict[Any, Dataset] = {}
        for name, part in source.items():
            for task, rows in _read_sets(part, settings, f"{name}: ").items():
                key = name if task is None else f"{name}/{task}"
                if key in parts:
                    raise DataError(f"two sets have the name {key!r}: rename one")
                parts[key] = rows
        return DatasetDict(parts)
    parts = dict(_read_sets(source, settings))
    return parts[None] if parts.keys() == {None} else DatasetDict(parts)


def class_triplets(
    texts: Sequence[str],
    labels: Sequence[Any],
    *,
    negatives: int = 1,
    seed: int = 0,
    places: Sequence[str] | None = None,
) -> list[Pair]:
    """Make triplets of a set of classes (NV-Embed, arXiv 2405.17428, section 4.2).

    Every text is an anchor; its positive is another example of its class, its negatives are texts of other
    classes that its own has not too. The class becomes the id, and that of each negative its id, so that
    examples of one class can be kept from being negatives. A negative that stands in several classes counts
    as of the one it was drawn from.

    Args:
        texts: the examples. labels: the class of each. places: of each, for messages.
        negatives: for each anchor.
        seed: of the draws.

    Raises:
        DataError: only one class, or a class with one example.
    """
    places = places or [f"row {number}" for number in range(1, len(texts) + 1)]
    members: dict[Any, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    if len(members) < 2:
        raise DataError(f"{places[0]}: all rows have the label {labels[0]!r}: negatives need another class")
    rng = np.random.default_rng(seed)
    # the different texts of every class, and where each stands among them
    own = {
        label: {text: place for place, text in enumerate(dict.fromkeys(texts[index] for index in rows))}
        for label, rows in members.items()
    }
    listed = {label: list(found) for label, found in own.items()}
    outside: dict[Any, dict[str, Any]] = {}
    pairs = []
    for text, label, place in zip(texts, labels, places, strict=True):
        if len(own[label]) < 2:
            raise DataError(f"{place}: the label {label!r} has one example only, so it has no positive")
        wrong: dict[str, Any] = {}  # negative -> its class
        for _ in range(100 * negatives):
            if len(wrong) == negatives:
                break
            index = int(rng.integers(len(texts)))
            if texts[index] not in own[label]:
                wrong.setdefault(texts[index], labels[index])
        if len(wrong) < negatives:  # one class has nearly all rows: draw among the others themselves
            if label not in outside:
                others = zip(texts, labels, strict=True)
                outside[label] = {other: of for other, of in others if other not in own[label]}
            if len(outside[label]) < negatives:
                raise DataError(f"{place}: fewer than {negatives} examples of other classes than {label!r}")
            there = list(outside[label].items())
            wrong = dict(there[index] for index in rng.choice(len(there), negatives, replace=False))
        drawn = int(rng.integers(len(own[label]) - 1))
        positive = listed[label][drawn + (drawn >= own[label][text])]
        pairs.append(Pair(place, text, positive, [*wrong], id=label, negative_ids=[*wrong.values()]))
    return pairs


def text_columns(dataset: Dataset) -> list[str]:
    """The columns of a dataset of `read_pairs` that hold texts, anchor first."""
    return [c for c in dataset.column_names if c in ("anchor", "positive") or NEGATIVE.fullmatch(c)]


def _read_sets(source: Any, options: PairOptions, prefix: str = "") -> dict[Any, Dataset]:
    """Read one source into a Dataset a task; the key is None where rows have no task."""
    read, names = getattr(source, READ_WITH, (None, None))
    if isinstance(source, Dataset) and source.column_names == names and options.agree_with(read):
        return {None: source}
    if isinstance(source, DatasetDict):
        raise DataError(f"{prefix}a DatasetDict inside a set: give its parts as sets of their own")
    rows = [(prefix + place, row) for place, row in _rows(source)]
    if not rows:
        raise DataError(f"{prefix}{_name(source)} holds no rows")
    names = _pair_names(rows[0][1], rows[0][0], options)
    pairs = _classes(rows, options) if names is None else _pairs(rows, names, options)
    if not pairs:
        raise DataError(f"{prefix}{_name(source)} holds no pair with score >= {options.min_score}")
    tasks: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        tasks[pair.task].append(pair)
    if len(tasks) > 1 and None in tasks:
        raise DataError(
            f"{tasks[None][0].place}: no field 'task', and other rows have one: give every row one"
        )
    return {task: _dataset(part, options) for task, part in tasks.items()}


def _rows(source: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, fields) of every row of one source."""
    if isinstance(source, str | Path):
        for place, row in read_rows(source):
            if is_plain(row):
                raise DataError(f"{place}: pairs need fields, and plain text has none: use .jsonl or .tsv")
            yield place, row
        return
    if isinstance(source, Mapping):
        lengths = {name: len(values) for name, values in source.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"columns of unequal length: {lengths}")
        names, columns = list(source), list(source.values())
        source = (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
    kind = None
    for number, row in enumerate(source, 1):
        place = f"row {number}"
        if not isinstance(row, Mapping | tuple | list):
            raise DataError(f"{place}: expected a dict or a tuple, found {type(row).__name__} {row!r}")
        if kind not in (None, isinstance(row, Mapping)):
            raise DataError(f"{place}: dicts and tuples are mixed")
        kind = isinstance(row, Mapping)
        if not isinstance(row, Mapping):
            if len(row) < 2:
                raise DataError(f"{place}: a tuple holds anchor, positive and negatives; found {row!r}")
            more = ["negative"] if len(row) == 3 else [f"negative_{n}" for n in range(1, len(row) - 1)]
            row = dict(zip(("anchor", "positive", *more), row, strict=True))
        yield place, dict(row)


def _pair_names(row: Mapping[str, Any], place: str, options: PairOptions) -> tuple[str, str] | None:
    """The fields of anchor and positive, or None for a set of classes."""
    if options.columns is not None:
        if len(options.columns) < 2:
            raise DataError(f"columns are anchor, positive and negatives; found {list(options.columns)}")
        return options.columns[0], options.columns[1]
    names = next((names for names in PAIR_NAMES if row.keys() >= set(names)), None)
    if names is None and not row.keys() >= {TEXT, LABEL}:
        raise DataError(
            f"{place}: no pair among the fields {sorted(row)}: name them anchor and positive, or text and "
            "label, or choose columns=(anchor, positive, ...)"
        )
    return names


def _pairs(
    rows: Sequence[tuple[str, Mapping[str, Any]]], names: tuple[str, str], options: PairOptions
) -> list[Pair]:
    # A label beside two sentences says how they relate (paraphrase, entailment), as a score does.
    relation = "score"
    if names == PAIR_NAMES[-1] and all("score" not in row and LABEL in row for _, row in rows):
        relation = LABEL
    needed = options.min_score is not None or options.scored and any(relation in row for _, row in rows)
    if relation != LABEL and any(_is_zero(row.get(LABEL)) and "id" not in row for _, row in rows):
        place, kinds = rows[0][0], {str(row.get(LABEL)) for _, row in rows}
        if kinds <= {"0", "1", "0.0", "1.0", "True", "False"}:
            raise DataError(
                f"{place}: the field {LABEL!r} is 0 or 1 in every row: if it says which positives are right, "
                "name it score and choose min_score=1; if it is a class, name it id"
            )
    found, unused = [], set()
    for place, row in rows:
        score = None
        if row.get(relation) is not None:
            score = _number(row[relation], relation, place)
        if needed:
            if score is None:
                raise DataError(f"{place}: no field {relation!r}; there is {', '.join(map(repr, row))}")
        elif score is not None:
            raise DataError(
                f"{place}: the field {relation!r} would be ignored and every pair be a positive: choose "
                "min_score, or a loss of scores"
            )
        if options.min_score is not None and score is not None and score < options.min_score:
            continue
        fields = _negative_fields(row, options)
        pair = Pair(place, _text(row, names[0], place), _text(row, names[1], place), score=score)
        for name in fields:
            if name not in row:
                text_field(dict(row), name, place)  # raises
            values = row[name] if isinstance(row[name], list | tuple) else [row[name]]
            for value in values:
                if value is None or value == "":  # how CSV and Parquet write that there is none
                    continue
                text = _text({name: value}, name, place)
                if text == pair.positive:
                    raise DataError(f"{place}: the field {name!r} equals the field {names[1]!r}: {text!r}")
                pair.negatives.append(text)
        pair.task, pair.instruction = _optional(row, "task", place), _optional(row, INSTRUCTION, place)
        pair.document_instruction = _optional(row, DOCUMENT_INSTRUCTION, place)
        named = row.get("id", None if relation == LABEL else row.get(LABEL))
        pair.id = None if named == "" else named  # how CSV writes that there is none
        _check_name(pair.id, place)
        unused |= row.keys() - {*names, *fields, relation, "task", *INSTRUCTIONS, "id"}
        if "id" not in row:
            unused.discard(LABEL)
        found.append(pair)
    _say_unused(rows, unused)
    return found


def _classes(rows: Sequence[tuple[str, Mapping[str, Any]]], options: PairOptions) -> list[Pair]:
    for place, row in rows:
        _text(row, TEXT, place)
        if row.get(LABEL) is None:
            raise DataError(f"{place}: no field {LABEL!r}; there is {', '.join(map(repr, row))}")
        _check_name(row[LABEL], place)
    if options.min_score is not None:
        raise DataError(f"{rows[0][0]}: no field 'score'; there is {', '.join(map(repr, rows[0][1]))}")
    _say_unused(rows, {name for _, row in rows for name in row} - {TEXT, LABEL, "task", *INSTRUCTIONS})
    tasks: dict[str | None, list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    for place, row in rows:
        tasks[_optional(row, "task", place)].append((place, row))
    found = []
    for task, part in tasks.items():
        places = [place for place, _ in part]
        texts, labels = [row[TEXT] for _, row in part], [row[LABEL] for _, row in part]
        count = 1 if options.negatives is None else options.negatives
        made = class_triplets(texts, labels, negatives=count, seed=options.seed, places=places)
        for pair, (place, row) in zip(made, part, strict=True):
            pair.task, pair.instruction = task, _optional(row, INSTRUCTION, place)
            pair.document_instruction = _optional(row, DOCUMENT_INSTRUCTION, place) or pair.instruction
        found += made
    return found


def _dataset(pairs: list[Pair], options: PairOptions) -> Dataset:
    """Columns of the pairs of one set, which must be alike."""
    if options.negatives is not None:
        for pair in pairs:
            pair.negatives = pair.negatives[: options.negatives]
    count = options.negatives if options.negatives is not None else max(len(p.negatives) for p in pairs)
    first = pairs[0]
    for pair in pairs:
        if len(pair.negatives) < count:
            name = "negative" if count == 1 else f"negative_{len(pair.negatives) + 1}"
            raise DataError(
                f"{pair.place}: no field {name!r}, and other rows have {count}: every row needs as many "
                "negatives; negatives=N takes the first N of each"
            )
        if (pair.id is None) != (first.id is None):
            raise DataError(f"{pair.place}: some rows of the set have an id or a label, and some have none")
    columns: dict[str, list[Any]] = {
        "anchor": [pair.anchor for pair in pairs],
        "positive": [pair.positive for pair in pairs],
    }
    for number in range(count):
        name = "negative" if count == 1 else f"negative_{number + 1}"
        columns[name] = [pair.negatives[number] for pair in pairs]
    if options.scored and first.score is not None:
        columns["score"] = [pair.score for pair in pairs]
    elif first.id is not None:
        numbers: dict[Any, int] = {}
        columns[LABEL] = [numbers.setdefault(pair.id, len(numbers)) for pair in pairs]
        if first.negative_ids and not options.scored:
            columns[NEGATIVE_LABELS] = [[numbers[of] for of in pair.negative_ids] for pair in pairs]
    for name in INSTRUCTIONS:
        told = [getattr(pair, name) or "" for pair in pairs]
        if any(told):
            columns[name] = told
    dataset = Dataset.from_dict(columns)
    setattr(dataset, READ_WITH, (options, dataset.column_names))  # which a renaming keeps
    return dataset


def _negative_fields(row: Mapping[str, Any], options: PairOptions) -> list[str]:
    if options.columns is not None:
        return list(options.columns[2:])
    numbers = {name: match[1] for name in row if (match := NEGATIVE.fullmatch(name))}
    return sorted(numbers, key=lambda name: int(numbers[name] or 0))


def _check_name(value: Any, place: str) -> None:
    if not isinstance(value, Hashable):
        raise DataError(f"{place}: an id or a label is a name or a number; found {value!r}")


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    value = text_field(dict(row), name, place)
    if not value.strip():
        raise DataError(f"{place}: the field {name!r} is empty")
    return value


def _optional(row: Mapping[str, Any], name: str, place: str) -> str | None:
    return None if row.get(name) in (None, "") else _text(row, name, place)


def _is_zero(value: Any) -> bool:
    return value is False or value in ("0", "0.0", "False") or isinstance(value, int | float) and value == 0


def _number(value: Any, name: str, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):  # which no comparison with min_score leaves out
        raise DataError(f"{place}: the field {name!r} is no number: {value!r}")
    return number


def _say_unused(rows: Sequence[tuple[str, Any]], unused: set[str]) -> None:
    if unused:
        source = rows[0][0].rpartition(":")[0] or "the rows"
        logger.warning("%s: not used: %s", source, ", ".join(map(repr, sorted(unused))))


def _is_columns(data: Mapping[str, Any]) -> bool:
    """Whether a dict holds the columns of one set, rather than several sets."""
    known = {name for names in PAIR_NAMES for name in names} | {TEXT}
    lists = [values for values in data.values() if isinstance(values, list | tuple)]
    flat = len(lists) == len(data) and not any(isinstance(v[0], Mapping | list | tuple) for v in lists if v)
    return bool(data) and not isinstance(data, DatasetDict) and (flat or bool(known & data.keys()))


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"
