"""Python files and their licences: of a folder, a wheel, or every package of the environment."""

from __future__ import annotations

import errno
import os
import re
import sysconfig
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from email.parser import BytesParser
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from uncausal.encoder.data.rows import readable

HELD_OUT_DEV = ("fsspec", "networkx", "rich")
HELD_OUT_TEST = ("jinja2", "matplotlib", "pandas", "requests", "sympy")
HELD_OUT = HELD_OUT_DEV + HELD_OUT_TEST
"""Distributions that code search is evaluated on: by default no pair is made of them."""

_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_NOT_SOURCE = re.compile(
    r"(?:^|/)(?:tests?|[^/]*_tests?|_?vendor(?:ed)?|_?externals?|extern|third_party"
    r"|test_[^/]*\.py|[^/]*_tests?\.py|conftest\.py)(?:/|$)"
)


class SourceFile(NamedTuple):
    """A file of Python: where it is said to be, its package's licence, and how to read it."""

    path: str
    licence: str
    read: Callable[[], bytes]


def walk_files(root: Path, suffixes: tuple[str, ...], unread: list[Path] | None = None) -> Iterator[Path]:
    """Find files by suffix, in order, without hidden, built or installed folders; links are not followed.

    Args:
        root, suffixes: where, and of which.
        unread: receives the folders that cannot be listed or entered.

    Raises:
        OSError: the root is one.
    """

    def failed(error: OSError) -> None:
        if Path(error.filename) == root:
            raise error
        if unread is not None:
            unread.append(Path(error.filename))

    for folder, folders, files in os.walk(root, onerror=failed):
        if not os.access(folder, os.X_OK):  # of which names are told, and no more
            failed(PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder))
            folders.clear()
            continue
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
        licence = folder_licence(path)
        unread: list[Path] = []
        for file in walk_files(path, (".py",), unread):
            shown = file.relative_to(path)
            if _NOT_SOURCE.search(shown.as_posix()):
                skipped["test or vendored"] += 1
            else:
                yield SourceFile((path.name / shown).as_posix(), licence, file.read_bytes)
        if unread:
            skipped["unreadable"] += len(unread)
    elif not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    elif path.suffix == ".py":
        yield SourceFile(path.name, folder_licence(path.parent), path.read_bytes)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            about = next((n for n in names if n.endswith((".dist-info/METADATA", "/PKG-INFO"))), None)
            licence = "unknown" if about is None else _licence(BytesParser().parsebytes(archive.read(about)))
            for name in sorted(name for name in names if name.endswith(".py")):
                if _NOT_SOURCE.search(name):
                    skipped["test or vendored"] += 1
                else:
                    yield SourceFile(name, licence, partial(_member, archive, path, name))
    else:
        raise ValueError(f"{path}: give a folder, a .py file, a wheel or a zip file")


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> bytes:
    with readable(f"{path}: {name}"):
        return archive.read(name)


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
    built = name in ("build", "dist") and not os.path.exists(folder / "__init__.py")
    environment = os.path.exists(folder / "pyvenv.cfg")  # False where one may not look
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


def folder_licence(folder: Path) -> str:
    """Return the licence of a package or repository, by its metadata, its project file or its LICENSE."""
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
