"""Writing so that an interruption or a full disk leaves the earlier file or folder as it was."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def staged(path: Path, outdated: str = "") -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place, all or nothing, if the block succeeds.

    What else lies in `path` comes along: entries that the block did not write, but for those whose name
    matches the pattern `outdated`, which an earlier save left.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    former = staging.with_name(f"{staging.name}.former")
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        for entry in path.iterdir() if path.exists() else ():
            kept = staging / entry.name
            if not kept.exists() and not (outdated and re.fullmatch(outdated, entry.name)):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.copytree(entry, kept, symlinks=True, copy_function=_link)
                else:
                    _link(entry, kept)
        if path.exists():
            path.rename(former)
        staging.rename(path)
    finally:
        if former.exists() and not path.exists():
            former.rename(path)
        for rest in (staging, former):
            shutil.rmtree(rest, ignore_errors=True)


@contextmanager
def staged_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file open for writing beside `path`, which becomes `path` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name for a file, or a copy where the file system has no such names."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
