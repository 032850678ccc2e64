"""Reads texts and pairs from files, stdin or a dataset of the hub, and says where the input is wrong.

Formats by suffix, each but Parquet also as .gz: .txt (a text a line), .jsonl, .csv, .tsv, .parquet. Anything
else that is no file is the name of a dataset, `name`, `name:configuration` or `name:configuration@split`.
"""

import csv
import gzip
import json
import math
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
PAIR_COLUMNS = (
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("query", "positive", "negative"),
    ("query", "positive"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
)


class DataError(ValueError):
    """Input that cannot be read; the message starts with the file and the line or row."""


def read_texts(source: str | Path, column: str = "text", *, limit: int | None = None) -> Iterator[str]:
    """Read texts one at a time, skipping blank ones.

    Args:
        source: a file, a dataset's name, or "-" for stdin (text, or JSONL if the first line starts with "{").
        column: the field that holds the text, where the format has fields.
        limit: stop after so many texts.

    Returns:
        The texts, in order.

    Raises:
        FileNotFoundError: no such file.
        DataError: not UTF-8, a malformed line or a missing field; the message has the line number.
    """
    count = 0
    for where, row in read_rows(source):
        if limit is not None and count >= limit:
            return
        text = _field(row, "text" if _is_plain(row) else column, where)
        if text.strip():
            count += 1
            yield text


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
        if _is_plain(row):
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
            value = _field(row, name, where)
            if not value.strip():
                raise DataError(f"{where}: the field {name!r} is empty")
            values.append(value)
    if not any(texts.values()):
        kept = "" if min_score is None else f" with {score_column} >= {min_score}"
        raise DataError(f"{source}: holds no pair{kept}")
    return texts


def chunk_texts(
    texts: Iterable[str], tokenizer: Any, length: int, *, limit: int | None = None, seed: int = 0
) -> Tensor:
    """Join tokenised texts and cut them into chunks without padding, for MNTP.

    Args:
        texts: any number of texts; a list is shuffled, a stream is taken in its order.
        tokenizer: adds its special tokens to every text.
        length: tokens per chunk. The remainder at the end is dropped.
        limit: stop tokenising at so many chunks.
        seed: of the shuffle.

    Returns:
        (n, length) int32.

    Raises:
        ValueError: the texts together are shorter than one chunk.
    """
    stream = iter(texts)
    if isinstance(texts, Sequence):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        stream = (str(texts[index]) for index in order)
    wanted, found = math.inf if limit is None else limit * length, 0
    pieces: list[np.ndarray] = []
    while found < wanted and (batch := list(islice(stream, 256))):
        for ids in tokenizer(batch, verbose=False, return_attention_mask=False)["input_ids"]:
            pieces.append(np.asarray(ids, dtype=np.int32))
            found += len(ids)
    if found < length:
        raise ValueError(
            f"the text holds {found} tokens, less than one chunk of {length}: add text or cut shorter"
        )
    joined = torch.from_numpy(np.concatenate(pieces))
    return joined[: found - found % length].view(-1, length)[:limit]


def read_rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read rows of any supported format as (place, fields); a line of plain text is `{"": line}`."""
    name = str(source)
    if name == "-":
        yield from _stdin_rows(sys.stdin.buffer)
        return
    path = Path(name).expanduser()
    suffixes = [s for s in path.suffixes if s != ".gz"][-1:]
    if not path.exists():
        if suffixes and suffixes[0] in SUFFIXES or name.startswith(("/", ".", "~")):
            raise FileNotFoundError(f"no such file: {name}")
        yield from _hub_rows(name)
        return
    if path.is_dir():
        raise DataError(f"{name}: is a folder; give one of its files ({', '.join(SUFFIXES)})")
    kind = suffixes[0] if suffixes else ".txt"
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    if kind not in SUFFIXES:
        raise DataError(f"{name}: the suffix {kind!r} is none of {', '.join(SUFFIXES)}")
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        yield from _parse(_lines(file, name), kind, name)


def sentences(text: str, *, min_words: int = 1, max_words: int | None = None) -> Iterator[str]:
    """Split English prose into sentences: at . ! ? before a capital, a digit or a quote, and at line breaks.

    A full stop after an initial or a common abbreviation ends nothing.

    Args:
        text: any text.
        min_words: shorter sentences are left out.
        max_words: longer sentences are left out.
    """
    for line in text.splitlines():
        start = 0
        for match in _BOUNDARY.finditer(line):
            before = line[start : match.start(1)].rsplit(None, 1)[-1:]
            if match[1] == "." and before and _ABBREVIATION.fullmatch(before[0]):
                continue
            yield from _wanted(line[start : match.end(1)], min_words, max_words)
            start = match.end()
        yield from _wanted(line[start:], min_words, max_words)


_BOUNDARY = re.compile(r"([.!?]['\")\]]*)\s+(?=['\"(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"['\"(\[]*(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Mt|Gen|Col|Lt|Capt|Sgt|Rev|Hon|Gov|Sen|Rep"
    r"|vs|etc|cf|ca|approx|No|Nos|Vol|pp|ed|eds|Fig|Inc|Ltd|Co|Corp|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec)"
)


def _wanted(sentence: str, min_words: int, max_words: int | None) -> Iterator[str]:
    sentence = sentence.strip()
    words = len(sentence.split())
    if words >= max(min_words, 1) and (max_words is None or words <= max_words):
        yield sentence


def _is_plain(row: dict[str, Any]) -> bool:
    return row.keys() == {""}


def _field(row: dict[str, Any], name: str, where: str) -> str:
    if _is_plain(row):
        return row[""]
    if name not in row:
        raise DataError(f"{where}: no field {name!r}; there is {', '.join(map(repr, row)) or 'none'}")
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {name!r} holds {type(value).__name__} {value!r}, not text")
    return value


def _score(row: dict[str, Any], name: str, where: str) -> float:
    try:
        return float(row[name])
    except KeyError:
        raise DataError(f"{where}: no field {name!r}; there is {', '.join(map(repr, row))}") from None
    except (TypeError, ValueError):
        raise DataError(f"{where}: the field {name!r} is no number: {row[name]!r}") from None


def _lines(file: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Decode line by line, so that an error has a line number; the file is never held whole."""
    number = 0
    try:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                byte, column = raw[error.start], error.start + 1
                raise DataError(
                    f"{name}:{number}: not UTF-8: byte 0x{byte:02x} at byte {column} of the line"
                ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}:{number + 1}: damaged gzip data ({error})") from None


def _parse(lines: Iterator[tuple[int, str]], kind: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if kind == ".txt":
        for number, line in lines:
            yield f"{name}:{number}", {"": line.rstrip("\r\n")}
    elif kind == ".jsonl":
        for number, line in lines:
            if line.strip():
                yield f"{name}:{number}", _json_object(line, f"{name}:{number}")
    else:
        yield from _csv_rows(lines, "\t" if kind == ".tsv" else ",", name)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON at column {error.colno}: {error.msg}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _csv_rows(
    lines: Iterator[tuple[int, str]], delimiter: str, name: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields of 128 KiB, and articles are longer
    # Tab-separated corpora write bare quotation marks inside fields.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        for values in reader:
            where = f"{name}:{reader.line_num}"
            if not values:
                continue
            if len(values) != len(header):
                raise DataError(f"{where}: {len(values)} fields, but the header has {len(header)}")
            yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: malformed CSV ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet ({error})") from None


def _stdin_rows(file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = _lines(file, "<stdin>")
    first = next(lines, None)
    if first is None:
        return
    kind = ".jsonl" if first[1].lstrip().startswith("{") else ".txt"
    yield from _parse(_chain(first, lines), kind, "<stdin>")


def _chain(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _hub_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    path, _, split = name.partition("@")
    path, _, configuration = path.partition(":")
    try:
        dataset = load_dataset(path, configuration or None, split=split or "train")
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise DataError(f"{name}: neither a file nor a dataset that can be loaded ({error})") from error
    for number, row in enumerate(dataset, 1):
        yield f"{name}: row {number}", dict(row)
