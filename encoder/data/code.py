"""Pairs from Python source: what a docstring says, and the code that does it.

`definitions` takes a file apart, `code_pairs` makes rows of it; sources.py finds the files.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from uncausal.encoder.data.duplicates import NearDuplicates
from uncausal.encoder.data.sources import SourceFile, folder_licence

PairKind = Literal["function", "class", "module", "signature", "comment", "commit"]
MAX_BYTES = 1 << 20  # of a file; a longer one is a table or a bundle
MAX_LINE = 10_000  # characters; a file with a longer line was not written by hand
MAX_CODE = 20_000  # characters of a positive

_GENERATED = re.compile(rb"(?i)@generated|do not edit|auto-?generated|automatically generated")
_ROLE = re.compile(r":(?:[a-z]+:)+`[~!.]*([^`<]+?)(?:\s*<[^`]*>)?`")
_NO_PROSE = re.compile(
    r"(?i)^(?:>>>|\.\.|:|@|[-=*~]{3}|todo|see (?:also|base)|input shape|\*?\w+ *\([^)]*\) *:"
    r"|(?:parameters?|arg(?:ument)?s?|returns?|yields?|raises?|examples?|notes?)\s*:?\s*$)"
)


class Definition(NamedTuple):
    """A function, class or module.

    Attributes:
        kind: "function" (a method too), "class" or "module".
        name: qualified inside its module; the module's own is "".
        line: where it starts, decorators included, from 1.
        end_line: where it ends, inclusive.
        doc: the docstring, cleaned; "" if it has none.
        header: decorators and signature, up to the body.
        code: without the docstring. A class keeps the headers of its methods, a module those of all in it.
        has_body: whether code follows the docstring.
    """

    kind: Literal["function", "class", "module"]
    name: str
    line: int
    end_line: int
    doc: str
    header: str
    code: str
    has_body: bool


def decode(raw: bytes) -> str:
    """Decode Python source by its byte order mark or coding line, with newlines as `ast` counts them.

    Raises:
        SyntaxError: the encoding is unknown, or the bytes are not in it.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    try:
        return raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except (UnicodeDecodeError, LookupError) as error:  # rot13 is a codec, but none of text
        raise SyntaxError(f"not {encoding}") from error


def definitions(text: str) -> list[Definition]:
    """Return the module, its classes, and its functions that lie in no other function, in order of line.

    Raises:
        SyntaxError: the text is not Python 3.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes of old code
            tree = ast.parse(text)
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, nesting
        raise SyntaxError(str(error)) from error
    lines = text.encode().split(b"\n")
    try:
        return [_definition(node, name, lines) for node, name in [(tree, ""), *_walk(tree, "")]]
    except RecursionError as error:  # a chain of a thousand elif, which `ast` still takes
        raise SyntaxError(str(error)) from error


def _walk(node: Any, prefix: str) -> Iterator[tuple[Any, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, prefix + child.name
        elif isinstance(child, ast.ClassDef):
            yield child, prefix + child.name
            yield from _walk(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _walk(child, prefix)


def _definition(node: Any, name: str, lines: list[bytes]) -> Definition:
    """Cut a node out of the lines; columns are bytes, as in `ast`."""
    docstring = ast.get_docstring(node)
    body = node.body[docstring is not None :]
    holes = [(*_docstring_hole(node, lines), b"")] if docstring is not None else []
    if isinstance(node, ast.Module):
        rows = max(len(lines) - (lines[-1] == b""), 1)
        kind, start, end, header = "module", (1, 0), (rows, len(lines[rows - 1])), b""
    else:
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        start, end = _start(node), _end(node)
        header = _cut(lines, start, _start(node.body[0]))
    if kind != "function":
        inner = (child for child, path in _walk(node, "") if "." not in path)
        holes += [(_start(child.body[0]), _end(child), b"...") for child in inner]
    code, cursor = b"", start
    for hole_start, hole_end, replacement in holes:
        code += _cut(lines, cursor, hole_start) + replacement
        cursor = hole_end
    code += _cut(lines, cursor, end)
    indent = start[1]
    return Definition(
        kind,
        name,
        start[0],
        end[0],
        docstring or "",
        _dedent(header, indent).strip(),
        _dedent(code, indent).strip("\n").rstrip(),
        bool(body),
    )


def _docstring_hole(node: Any, lines: list[bytes]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the place of the docstring with what must go with it: a semicolon, or the rest of its lines."""
    start, end = _start(node.body[0]), _end(node.body[0])
    semicolon = re.match(rb"[ \t]*;[ \t]*", lines[end[0] - 1][end[1] :])
    if semicolon:
        return start, (end[0], end[1] + semicolon.end())
    if len(node.body) == 1 or lines[start[0] - 1][: start[1]].strip():
        return start, end
    row = end[0] + 1
    while not lines[row - 1].strip():
        row += 1
    return (start[0], 0), (row, 0)


def _start(node: Any) -> tuple[int, int]:
    decorators = getattr(node, "decorator_list", ())
    return min([node.lineno, *(d.lineno for d in decorators)]), node.col_offset


def _end(node: Any) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


def _cut(lines: list[bytes], start: tuple[int, int], end: tuple[int, int]) -> bytes:
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    between = lines[start[0] : end[0] - 1]
    return b"\n".join([lines[start[0] - 1][start[1] :], *between, lines[end[0] - 1][: end[1]]])


def _dedent(code: bytes, indent: int) -> str:
    head, *rest = code.split(b"\n")
    rest = [line[indent:] if not line[:indent].strip() else line for line in rest]
    return b"\n".join([head, *rest]).decode()


def summary(doc: str) -> str:
    """Return a docstring's first paragraph, up to a section of arguments, on one line without markup."""
    lines = []
    for line in doc.strip().split("\n"):
        if not line.strip() or _NO_PROSE.match(line.strip()):
            break
        lines.append(line)
    return " ".join(_ROLE.sub(r"\1", " ".join(lines)).replace("`", "").split())


def code_pairs(
    files: Iterable[SourceFile],
    kinds: Collection[PairKind] = ("function",),
    *,
    min_words: int = 3,
    min_lines: int = 3,
    known: NearDuplicates | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Make pairs of the definitions in files, no anchor twice and no positive much like an earlier one.

    "function", "class" and "module" pair the docstring's first paragraph with the definition without it (see
    `Definition.code`), "signature" a function's header with its body, "comment" a comment on lines of its own
    with the lines below it.

    Args:
        files: from sources.py.
        kinds: which pairs to make; "commit" is made by `commit_pairs`.
        min_words: an anchor with fewer words is left out.
        min_lines: a positive with fewer lines is left out.
        known: texts that no positive may be much like; positives are added to it.
        skipped: counts what is left out, by reason.

    Returns:
        Rows of anchor, positive, path, line, name and licence.
    """
    if unknown := set(kinds) - set(get_args(PairKind)):
        raise ValueError(f"kinds {sorted(unknown)} are unknown: choose from {', '.join(get_args(PairKind))}")
    known = NearDuplicates() if known is None else known
    skipped = Counter() if skipped is None else skipped
    anchors: set[str] = set()
    for file in files:
        raw = file.read()
        try:
            if len(raw) > MAX_BYTES or max(map(len, raw.split(b"\n"))) > MAX_LINE:
                raise _Left("too long")
            if _GENERATED.search(raw, 0, 2000):
                raise _Left("generated")
            text = decode(raw)
            found = definitions(text)
        except SyntaxError:
            skipped["not Python 3"] += 1
            continue
        except _Left as reason:
            skipped[str(reason)] += 1
            continue
        candidates = [pair for definition in found for pair in _pairs_of(definition, kinds)]
        if "comment" in kinds:
            candidates += _comment_pairs(text)
        for anchor, positive, line, name in candidates:
            if len(anchor.split()) < min_words:
                skipped["short text"] += 1
            elif positive.count("\n") + 1 < min_lines or len(positive) > MAX_CODE:
                skipped["short or long code"] += 1
            elif (key := anchor.lower().rstrip(".")) in anchors or known.seen(positive):
                skipped["duplicate"] += 1
            else:
                anchors.add(key)
                row = {"anchor": anchor, "positive": positive, "path": file.path, "line": line}
                yield {**row, "name": name, "licence": file.licence}


class _Left(Exception):
    """A file is left out, for the reason given."""


def _pairs_of(definition: Definition, kinds: Collection[str]) -> Iterator[tuple[str, str, int, str]]:
    """Yield (anchor, positive, line, name); special methods and stubs say too little."""
    last = definition.name.rpartition(".")[2]
    if not definition.has_body or last.startswith("__") or last.startswith("test"):
        return
    where = definition.line, definition.name
    if definition.kind in kinds and (anchor := summary(definition.doc)):
        yield anchor, definition.code, *where
    if definition.kind == "function" and "signature" in kinds:
        body = definition.code[len(definition.header) :].strip("\n")
        yield definition.header, re.sub(r"(?m)^ {4}", "", body), *where


def _comment_pairs(text: str) -> Iterator[tuple[str, str, int, str]]:
    """Yield each comment that has lines of its own, with the code below it up to a blank line or a dedent."""
    lines = text.split("\n")
    own = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
                own[token.start[0]] = token.start[1]
    except (tokenize.TokenError, SyntaxError):
        return
    for first in own:
        if own.get(first - 1) == own[first]:
            continue
        last = first
        while own.get(last + 1) == own[first]:
            last += 1
        words = " ".join(line.strip().lstrip("#").strip() for line in lines[first - 1 : last])
        below = last
        while below < len(lines) and lines[below].strip() and not lines[below][: own[first]].strip():
            below += 1
        if re.search(r"[a-z]{2} [a-z]{2}", words) and not re.match(
            r"(?i)type:|noqa|pragma|pylint|todo", words
        ):
            yield words, "\n".join(line[own[first] :] for line in lines[last:below]), first, ""


def commit_pairs(
    repository: str | Path, *, min_words: int = 3, known: NearDuplicates | None = None
) -> Iterator[dict[str, Any]]:
    """Make a pair of each commit's subject with its diff of Python files; merges are left out.

    Raises:
        ValueError: the folder is in no git repository.
    """
    known = NearDuplicates() if known is None else known
    form = "--format=%x1e%h%x1f%s%x1f"
    command = [
        "git",
        "-C",
        str(repository),
        "log",
        "--no-merges",
        "--patch",
        "--no-color",
        form,
        "--",
        "*.py",
    ]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise ValueError(f"{repository}: {done.stderr.decode(errors='replace').strip()}")
    licence = folder_licence(Path(repository).resolve())
    for commit in done.stdout.decode(errors="replace").split("\x1e")[1:]:
        name, subject, diff = commit.split("\x1f", 2)
        diff = re.sub(r"(?m)^(?:index|diff --git|new file mode|---) .*\n", "", diff).strip()
        if len(subject.split()) >= min_words and diff and len(diff) <= MAX_CODE and not known.seen(diff):
            row = {"anchor": subject, "positive": diff, "path": str(repository), "line": 0}
            yield {**row, "name": name, "licence": licence}
