"""Writing so that an interruption, even SIGKILL, or a full disk leaves the earlier file or folder whole."""

from __future__ import annotations

import ctypes
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

    Raises:
        ValueError: as `check_replaceable`.
    """
    check_replaceable(path)
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
        if not (path.exists() and _exchange(staging, path)):
            if path.exists():
                path.rename(former)
            staging.rename(path)
    finally:
        if former.exists() and not path.exists():
            former.rename(path)
        for rest in (staging, former):
            shutil.rmtree(rest, ignore_errors=True)


def check_replaceable(path: Path) -> None:
    """Raise ValueError if another folder cannot take the place of this one, as `staged` has it do."""
    path = path.resolve()
    if Path.cwd().is_relative_to(path):
        raise ValueError(f"{path}: is the folder you are in, and would be replaced whole; name another")
    if path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"{path}: cannot be replaced by a new folder; name one inside it")


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


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that neither name is ever without one; False where that cannot be."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2) and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


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
