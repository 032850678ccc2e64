"""Pairs from Python source: what a docstring says, and the code that does it.

`source_files` and `environment_files` find the files, `definitions` takes one apart, `code_pairs` makes rows.
"""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sysconfig
import tokenize
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from email.parser import BytesParser
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from uncausal.encoder.data.duplicates import NearDuplicates

HELD_OUT_DEV = ("fsspec", "networkx", "rich")
HELD_OUT_TEST = ("jinja2", "matplotlib", "pandas", "requests", "sympy")
HELD_OUT = HELD_OUT_DEV + HELD_OUT_TEST
"""Distributions that code search is evaluated on: by default no pair is made of them."""

PairKind = Literal["function", "class", "module", "signature", "comment", "commit"]
MAX_BYTES = 1 << 20  # of a file; a longer one is a table or a bundle
MAX_LINE = 10_000  # characters; a file with a longer line was not written by hand
MAX_CODE = 20_000  # characters of a positive

_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_NOT_SOURCE = re.compile(
    r"(?:^|/)(?:tests?|[^/]*_tests?|_?vendor(?:ed)?|_?externals?|extern|third_party"
    r"|test_[^/]*\.py|[^/]*_tests?\.py|conftest\.py)(?:/|$)"
)
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


class SourceFile(NamedTuple):
    """A file of Python: where it is said to be, its package's licence, and how to read it."""

    path: str
    licence: str
    read: Callable[[], bytes]


def decode(raw: bytes) -> str:
    """Decode Python source by its byte order mark or coding line, with newlines as `ast` counts them.

    Raises:
        SyntaxError: the encoding is unknown, or the bytes are not in it.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    try:
        return raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
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
    found = [_definition(tree, "", lines)]
    found += [_definition(node, name, lines) for node, name in _walk(tree, "")]
    return found


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


def walk_files(root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Find files by suffix, in order, without hidden, built or installed folders; links are not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if _is_source_folder(Path(folder, name)))
        for file in (Path(folder, name) for name in sorted(files) if name.endswith(suffixes)):
            if file.is_file() and not file.is_symlink():  # no pipe either
                yield file


def source_files(path: str | Path, skipped: Counter[str] | None = None) -> Iterator[SourceFile]:
    """Find the Python files of a package, repository, wheel or zip file, without tests and vendored code.

    Links are not followed. The licence is what `dist-info`, `pyproject.toml` or a LICENSE file says first.

    Args:
        path: a folder, a .py file, a .whl or .zip.
        skipped: counts what is left out, by reason.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is neither Python nor a zip file.
    """
    path, skipped = Path(path), Counter() if skipped is None else skipped
    if path.is_dir():
        licence = _folder_licence(path)
        for file in walk_files(path, (".py",)):
            shown = file.relative_to(path)
            if _NOT_SOURCE.search(shown.as_posix()):
                skipped["test or vendored"] += 1
            else:
                yield SourceFile((path.name / shown).as_posix(), licence, file.read_bytes)
    elif not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    elif path.suffix == ".py":
        yield SourceFile(path.name, _folder_licence(path.parent), path.read_bytes)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            about = next((n for n in names if n.endswith((".dist-info/METADATA", "/PKG-INFO"))), None)
            licence = "unknown" if about is None else _licence(BytesParser().parsebytes(archive.read(about)))
            for name in sorted(name for name in names if name.endswith(".py")):
                if _NOT_SOURCE.search(name):
                    skipped["test or vendored"] += 1
                else:
                    yield SourceFile(name, licence, lambda name=name: archive.read(name))
    else:
        raise ValueError(f"{path}: give a folder, a .py file, a wheel or a zip file")


def environment_files(
    exclude: Collection[str] = HELD_OUT, skipped: Counter[str] | None = None
) -> Iterator[SourceFile]:
    """Find the files of the standard library and of every installed distribution but the excluded."""
    skipped = Counter() if skipped is None else skipped
    unwanted = {_normal(name) for name in exclude}
    if "stdlib" not in unwanted:
        for file in source_files(sysconfig.get_path("stdlib"), skipped):
            yield file._replace(licence="PSF-2.0")
    found = {_normal(d.metadata["Name"]): d for d in metadata.distributions() if d.metadata["Name"]}
    for name in sorted(found.keys() - unwanted):
        yield from distribution_files(found[name], skipped)


def distribution_files(
    distribution: metadata.Distribution | str, skipped: Counter[str] | None = None
) -> Iterator[SourceFile]:
    """Find the files of one installed distribution.

    Raises:
        ValueError: no distribution of that name is installed.
    """
    skipped = Counter() if skipped is None else skipped
    if isinstance(distribution, str):
        try:
            distribution = metadata.distribution(distribution)
        except metadata.PackageNotFoundError:
            raise ValueError(f"{distribution!r} is not installed: pip install {distribution}") from None
    licence = _licence(distribution.metadata)
    for file in sorted(distribution.files or ()):
        if file.suffix != ".py" or ".." in file.parts or file.parts[0].startswith("__"):
            continue
        if _NOT_SOURCE.search(str(file)):
            skipped["test or vendored"] += 1
        elif (place := Path(str(file.locate()))).is_file():
            yield SourceFile(file.as_posix(), licence, place.read_bytes)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_source_folder(folder: Path) -> bool:
    name = folder.name
    built = name in ("build", "dist") and not (folder / "__init__.py").exists()
    environment = (folder / "pyvenv.cfg").exists()
    return not (
        name.startswith(".") or name in _SKIPPED_FOLDERS or built or environment or folder.is_symlink()
    )


def _licence(about: Any) -> str:
    """Return the licence in a package's metadata: an SPDX expression, a short name, or a classifier."""
    named = about.get("License-Expression") or about.get("License") or ""
    if named.strip() and "\n" not in named.strip() and named.strip().upper() != "UNKNOWN":
        return named.strip()
    classifiers = [c for c in about.get_all("Classifier") or () if c.startswith("License :: ")]
    return (
        classifiers[0].rsplit(" :: ", 1)[-1] if classifiers else named.strip().partition("\n")[0] or "unknown"
    )


def _folder_licence(folder: Path) -> str:
    for distribution in metadata.distributions(path=[str(folder.parent)]):
        if any(file.parts[0] == folder.name for file in distribution.files or ()):
            return _licence(distribution.metadata)
    project = re.search(
        r"^license\s*=\s*(?:\{\s*(?:text|file)\s*=\s*)?[\"']([^\"']+)",
        _text_of(folder / "pyproject.toml"),
        re.MULTILINE,
    )
    if project:
        return project[1]
    for file in sorted(folder.glob("LICEN[CS]E*")):
        return _text_of(file).strip().partition("\n")[0].strip() or "unknown"
    return "unknown"


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf8", errors="replace") if path.is_file() else ""


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
        files: from `source_files`, `environment_files` or `distribution_files`.
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
    licence = _folder_licence(Path(repository).resolve())
    for commit in done.stdout.decode(errors="replace").split("\x1e")[1:]:
        name, subject, diff = commit.split("\x1f", 2)
        diff = re.sub(r"(?m)^(?:index|diff --git|new file mode|---) .*\n", "", diff).strip()
        if len(subject.split()) >= min_words and diff and len(diff) <= MAX_CODE and not known.seen(diff):
            row = {"anchor": subject, "positive": diff, "path": str(repository), "line": 0}
            yield {**row, "name": name, "licence": licence}
