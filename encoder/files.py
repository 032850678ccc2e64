"""Writing so that SIGKILL, a full disk or a power cut leaves the earlier file or folder, or the new one.

What is not whole yet stands beside its place under a hidden name, locked by its process. The lock ends with
the process, and what nobody holds is removed by the next write to the same place.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def _machine() -> str:
    """Tells this machine from others by eight digits: a shared file system need not show them its locks."""
    own = Path("/etc/machine-id")  # containers may share a name
    said = os.uname().nodename + (own.read_text() if own.is_file() else "")
    return f"{zlib.crc32(said.encode()):08x}"


STAGED, FORMER = f".{_machine()}.staged", ".former"


@contextmanager
def staged(path: Path, outdated: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place, all or nothing, if the block succeeds.

    What else lies in `path` comes along: entries that the block did not write, but for those of the names
    `outdated`, which an earlier save left.

    Raises:
        ValueError: as `check_replaceable`.
    """
    check_replaceable(path)
    path = path.resolve()
    staging, lock = _begin(path, folder=True)
    former, placed = staging.with_name(staging.name + FORMER), False
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        for entry in path.iterdir() if path.exists() else ():
            kept = staging / entry.name
            if not kept.exists() and entry.name not in outdated:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.copytree(entry, kept, symlinks=True, copy_function=_link)
                else:
                    _link(entry, kept)
        flush_tree(staging)
        if not (path.exists() and _exchange(staging, path)):
            if path.exists():
                path.rename(former)
            staging.rename(path)
        placed = True
        _flush(path.parent)
    finally:
        if former.exists() and not placed and not path.exists():
            former.rename(path)
        for rest in (staging, former):
            shutil.rmtree(rest, ignore_errors=True)
        os.close(lock)


def check_replaceable(path: Path) -> None:
    """Raise ValueError if another folder cannot take the place of this one, as `staged` has it do."""
    path = path.resolve()
    if Path.cwd().is_relative_to(path):
        raise ValueError(f"{path}: is the folder you are in, and would be replaced whole; name another")
    if path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK)):
        raise ValueError(f"{path}: cannot be replaced by a new folder; name one inside it")


@contextmanager
def staged_file(path: Path, new: bool = False) -> Iterator[BinaryIO]:
    """Yield a file open for writing beside `path`, which becomes `path` only if the block succeeds.

    Raises:
        FileExistsError: with `new`, if there is a file by then; of two processes one is told.
    """
    path = path.resolve()  # a link stays, and what it leads to is written
    staging, lock = _begin(path, folder=False)
    try:
        with os.fdopen(os.dup(lock), "wb") as file:  # of the two, the lock ends with the last
            yield file
        staging.chmod(0o666 & ~_umask())
        os.fsync(lock)
        if new:
            _link_new(staging, path)
        else:
            os.replace(staging, path)
        _flush(path.parent)
    finally:
        staging.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for the block, against all who would hold it too; the lock ends with the process.

    It is made where there is none, and gone again if the block fails and left nothing in it.

    Raises:
        ValueError: another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = _lock(folder, fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is at work in {folder}: wait for it, or name another") from None
    except OSError:  # a file system without locks
        lock = None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise
    finally:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # which processes that were forked meanwhile hold too
            os.close(lock)


def _begin(path: Path, folder: bool) -> tuple[Path, int]:
    """Make an empty folder or file beside `path`, locked until the descriptor returned with it is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    affixes = (STAGED, f".{path.name}.", path.parent)
    while True:
        if folder:
            staging = Path(tempfile.mkdtemp(*affixes))
        else:
            made, name = tempfile.mkstemp(*affixes)
            os.close(made)
            staging = Path(name)
        with suppress(FileNotFoundError):  # before it was locked, another process took it for abandoned
            lock = _lock(staging)
            if staging.exists():
                return staging, lock
            os.close(lock)


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that have died left beside `path`; put back what one had moved out of the way."""
    pattern = rf"(\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(STAGED)})({re.escape(FORMER)})?"
    found = {match[1] for name in os.listdir(path.parent) if (match := re.fullmatch(pattern, name))}
    for staging in (path.with_name(name) for name in found):
        former = staging.with_name(staging.name + FORMER)
        # A process holds it, or is removing it too, or it is another user's.
        with suppress(OSError), ExitStack() as locked:
            if staging.exists():
                locked.callback(os.close, _lock(staging, fcntl.LOCK_NB))
            if former.exists() and not path.exists():
                former.rename(path)
            for rest in (staging, former):
                rest.unlink() if rest.is_file() else shutil.rmtree(rest, ignore_errors=True)


def _lock(staging: Path, flags: int = 0) -> int:
    """Lock a file or folder against all other processes, and return the descriptor that holds the lock.

    Raises:
        FileNotFoundError: it is gone.
        OSError: with LOCK_NB, a process holds it, or the file system has no locks.
    """
    descriptor = os.open(staging, os.O_RDONLY if staging.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except OSError:
        if flags & fcntl.LOCK_NB:
            os.close(descriptor)
            raise
        # Without locks nothing is ever taken for abandoned.
    return descriptor


def _flush(path: Path) -> None:
    """Wait until the disk holds what a file holds, or the names in a folder."""
    # Another user's file comes along as it is; not every file system does it for folders.
    with suppress(OSError if path.is_dir() else PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """`_flush` for all that lies below a folder, and for itself."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.is_file() and not path.is_symlink():
                _flush(path)
        _flush(Path(parent))


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


def _link_new(staging: Path, path: Path) -> None:
    """Give a whole file the name `path`, where there is none; raises FileExistsError where there is one."""
    try:
        os.link(staging, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without second names: the look comes a moment before the step
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(staging, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
