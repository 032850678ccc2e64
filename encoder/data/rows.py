"""Reads rows from files, stdin or a dataset of the hub, and says where the input is wrong.

Formats by suffix, each but Parquet also as .gz: .txt (a text a line), .jsonl, .csv, .tsv, .parquet. A pattern
(`parts/*.jsonl.gz`, `**` for any folders) stands for its files in order of their names. Anything else that is
no file is the name of a dataset, `name`, `name:configuration` or `name:configuration@split`; one of a single
column of texts is plain text.
"""

import csv
import gzip
import json
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from os.path import normpath
from pathlib import Path
from typing import IO, Any

from uncausal.encoder.files import staged_file

SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")


class DataError(ValueError):
    """Input that cannot be read; the message starts with the file and the line or row."""


@contextmanager
def named(place: str) -> Iterator[None]:
    """Put a place before the message of a DataError that does not start with it."""
    try:
        yield
    except DataError as error:
        if str(error).startswith((place, normpath(place), "<stdin>")):
            raise
        raise DataError(f"{place}: {error}") from error


def check_source(source: str | Path) -> None:
    """Raise as `read_rows` does where it is plain without reading: no such file, a folder, no known format.

    Raises:
        FileNotFoundError, DataError: as told. A dataset's name is not looked up.
    """
    name = str(source)
    path = Path(name).expanduser()
    suffix = [s for s in path.suffixes if s != ".gz"][-1:]
    if name == "-":
        return
    if path.is_dir():
        raise DataError(f"{name}: is a folder; give one of its files ({', '.join(SUFFIXES)})")
    if path.exists():
        if suffix and suffix[0] not in SUFFIXES:
            raise DataError(f"{name}: the suffix {suffix[0]!r} is none of {', '.join(SUFFIXES)}")
    elif _is_pattern(name):
        if not any(Path(file).is_file() for file in glob(str(path), recursive=True)):
            raise FileNotFoundError(f"no file fits {name}")
    elif suffix and suffix[0] in SUFFIXES or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"no such file: {name}")


def _is_pattern(name: str) -> bool:
    """Whether the name of no file stands for several; a bracket behind @ is a slice of a dataset's split."""
    return bool(set(name) & set("*?")) or "[" in name.partition("@")[0]


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Tell what cannot be read, whatever is wrong with its bytes or fields."""
    try:
        yield
    except DataError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, LookupError, ValueError) as error:
        raise DataError(f"{what}: cannot be read ({type(error).__name__}: {error})") from error


def read_rows(source: str | Path, *, streaming: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read rows of any supported format as (place, fields); a line of plain text is `{"": line}`.

    With `streaming`, a dataset of the hub is read as it comes, without a copy on the disk.
    """
    name = str(source)
    if name == "-":
        yield from _stdin_rows(sys.stdin.buffer)
        return
    path = Path(name).expanduser()
    check_source(name)
    if not path.exists() and _is_pattern(name):
        for file in sorted(file for file in glob(str(path), recursive=True) if Path(file).is_file()):
            yield from read_rows(file)
        return
    if not path.exists():
        yield from _hub_rows(name, streaming)
        return
    kind = ([s for s in path.suffixes if s != ".gz"] or [".txt"])[-1]
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        yield from _parse(_lines(file, name), kind, name)


def is_plain(row: dict[str, Any]) -> bool:
    """Whether the row is a line of plain text, which has no fields."""
    return row.keys() == {""}


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """Return the text in a field of a row, or raise a DataError that starts with `where`."""
    if is_plain(row) and isinstance(row[""], str):
        return row[""]
    if name not in row:
        raise DataError(f"{where}: no field {name!r}; there is {', '.join(map(repr, row)) or 'none'}")
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {name!r} holds {type(value).__name__} {value!r}, not text")
    return value


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
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deep") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise DataError(f"{where}: {error}") from None
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

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (UnicodeDecodeError, OverflowError) as error:  # of a value, which Python has no form of
        raise DataError(f"{path}: a row behind {number} is not readable ({error})") from None
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


def _hub_rows(name: str, streaming: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    path, _, split = name.partition("@")
    path, _, configuration = path.partition(":")
    try:
        dataset = load_dataset(path, configuration or None, split=split or "train", streaming=streaming)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise DataError(f"{name}: neither a file nor a dataset that can be loaded ({error})") from error
    for number, row in enumerate(dataset, 1):
        fields = dict(row)
        if len(fields) == 1 and isinstance(text := next(iter(fields.values())), str):
            fields = {"": text}
        yield f"{name}: row {number}", fields


def write_rows(rows: Iterable[dict[str, Any]], path: str | Path) -> int:
    """Write rows as JSONL, all or nothing; return their number.

    Raises:
        DataError: the suffix is not .jsonl, or there is no row.
    """
    if Path(path).suffix != ".jsonl":
        raise DataError(f"{path}: rows are written as .jsonl")
    count = 0
    with staged_file(Path(path)) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode("utf8", "replace") + b"\n")
            count += 1
        if not count:
            raise DataError(f"{path}: not written, for there is no row")
    return count
