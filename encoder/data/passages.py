"""Passages of a file, each with its lines: functions of Python, paragraphs of Markdown and text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from uncausal.encoder.data.code import MAX_BYTES, MAX_LINE, Definition, decode, definitions, summary

SUFFIXES = (".py", ".md", ".markdown", ".rst", ".txt")
MAX_PROSE = 1000  # characters of a passage of prose
MAX_CODE = 4000  # and of code: a longer function is several passages
VERSION = 2  # of the rules in this file; an index made by others is made again

_HEADING = re.compile(r"#{1,6}\s+(.+?)\s*#*$")
_FENCE = re.compile(r"\s{0,3}(`{3,}[^`]*$|~~~)")  # code between backticks on one line opens none


class Passage(NamedTuple):
    """A piece of a file: its lines, from 1 and inclusive, its name (function or heading), its text."""

    line: int
    end_line: int
    name: str
    text: str


def passages(path: str, raw: bytes) -> list[Passage]:
    """Take a file apart, by its suffix.

    Raises:
        ValueError: the file is not to be read; the message is a short reason that can be counted.
    """
    if len(raw) > MAX_BYTES or max(map(len, raw.split(b"\n"))) > MAX_LINE:
        raise ValueError("too long")
    if path.endswith(".py"):
        try:
            found = definitions(decode(raw))
        except SyntaxError:
            raise ValueError("not Python 3") from None
        return [passage for one in found if one.has_body for passage in _code_passages(one)]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if "\0" in text:
        raise ValueError("not text")
    return list(_prose_passages(text.replace("\r\n", "\n").split("\n"), path.endswith((".md", ".markdown"))))


def _code_passages(definition: Definition) -> Iterator[Passage]:
    """Yield what the docstring says before the code; of long code the header again before each piece."""
    said = summary(definition.doc)
    head = f"{said}\n" if said else ""
    pieces = list(_pieces(definition.code.split("\n"), MAX_CODE))
    left = sum(map(len, pieces))
    for number, lines in enumerate(pieces):
        text = head + ("" if number == 0 else f"{definition.header}\n") + "\n".join(lines)
        start, end = definition.line, definition.end_line
        if definition.kind == "function":  # whose docstring alone is missing in the code, near its start
            start = end - left + 1 if number else start
            left -= len(lines)
            end -= left
        yield Passage(start, end, definition.name, text)


def _prose_passages(lines: list[str], markdown: bool) -> Iterator[Passage]:
    """Yield paragraphs, short ones of one section together; a heading starts a section and names it."""
    name, fenced, start, size, blank = "", False, 0, 0, False

    def passage(end: int) -> Iterator[Passage]:
        first = next((i for i in range(start, end) if lines[i].strip()), end)
        text = "\n".join(lines[first:end]).rstrip()
        if re.search(r"\w", text):
            yield Passage(first + 1, first + 1 + text.count("\n"), name, text)

    for number, line in enumerate(lines):
        fenced ^= markdown and bool(_FENCE.match(line))
        heading = _HEADING.match(line) if markdown and not fenced else None
        # A paragraph that would not fit starts the next passage; so does a line that would not fit twice.
        full = (
            size + _paragraph_size(lines, number) > MAX_PROSE if blank else size + len(line) > 2 * MAX_PROSE
        )
        if heading or (size and full):
            yield from passage(number)
            start, size = number, 0
            name = heading[1] if heading else name
        size += len(line) + 1
        blank = not line.strip()
    yield from passage(len(lines))


def _paragraph_size(lines: list[str], start: int) -> int:
    size = 0
    for line in lines[start:]:
        if not line.strip() or size > MAX_PROSE:
            break
        size += len(line) + 1
    return size


def _pieces(lines: list[str], limit: int) -> Iterator[list[str]]:
    piece: list[str] = []
    size = 0
    for line in lines:
        if piece and size + len(line) > limit:
            yield piece
            piece, size = [], 0
        piece.append(line)
        size += len(line) + 1
    yield piece
