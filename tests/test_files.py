"""Writing all or nothing: what processes that are killed leave, and what others that are alive have begun."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from uncausal.encoder import files
from uncausal.encoder.files import FORMER, STAGED, held, staged, staged_file

KILLED = """
import os, signal, sys
from pathlib import Path
from uncausal.encoder.files import staged, staged_file
with {writer}(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "v.npy").symlink_to(tmp_path / "large" / "v.npy")
    with staged_file(tmp_path / "v.npy") as file:
        file.write(b"new")
    assert (tmp_path / "v.npy").is_symlink() and (tmp_path / "large" / "v.npy").read_bytes() == b"new"


@pytest.mark.parametrize("writer", [staged, staged_file])
def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path, writer):
    """Regression: it stayed for ever, as large as the model."""
    script = KILLED.format(writer=writer.__name__)
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "out"]).returncode == -signal.SIGKILL
    [left] = names(tmp_path)
    assert left.startswith(".out.") and left.endswith(STAGED)
    mine = [".out.settings", ".out.settings.staged", f".out.notes{STAGED}", f".outer.abcdefgh{STAGED}"]
    for name in mine:
        (tmp_path / name).touch()
    with writer(tmp_path / "out"):
        assert left not in names(tmp_path)
    assert names(tmp_path) == sorted([*mine, "out"])


@pytest.mark.parametrize("writer", [staged, staged_file])
def test_what_another_process_is_writing_stays(tmp_path, writer):
    """A lock is of an open file: two writes of one process stand for two processes."""
    with ExitStack() as both:
        first = both.enter_context(writer(tmp_path / "out"))
        begun = names(tmp_path)
        with writer(tmp_path / "out"):
            assert set(begun) < set(names(tmp_path))
        assert names(tmp_path) == [*begun, "out"]
        if writer is staged:
            (first / "first").touch()
        else:
            first.write(b"first")
    assert names(tmp_path) == ["out"]
    out = tmp_path / "out"
    assert names(out) == ["first"] if writer is staged else out.read_bytes() == b"first"


HOLDER = """
import sys, time
from pathlib import Path
from uncausal.encoder.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_until_that_ends(tmp_path):
    run = tmp_path / "new" / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"another process is at work in .*run: wait"), held(run):
            pytest.fail("both are at work")
        with held(tmp_path / "new"):  # that of another run
            pass
        other.kill()
    with held(run):
        pass
    with held(run):
        pass


def test_a_forked_process_does_not_keep_a_folder(tmp_path):
    """Regression: workers of a failed run held it against the next."""
    with pytest.raises(KeyError), held(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
        raise KeyError
    with held(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_fails_leaves_no_empty_folder(tmp_path):
    run = tmp_path / "new" / "run"
    with pytest.raises(KeyError), held(run):
        raise KeyError
    assert names(tmp_path) == []
    with pytest.raises(KeyError), held(run):
        (run / "checkpoint").touch()
        raise KeyError
    assert names(run) == ["checkpoint"]


def test_a_file_system_without_locks_holds_nobody(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path), held(tmp_path):
        pass


@pytest.mark.parametrize("links", [True, False])
def test_of_two_who_begin_a_new_file_one_is_told(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no second names here")))
    with pytest.raises(FileExistsError), staged_file(tmp_path / "out", new=True) as late:
        late.write(b"late")
        with staged_file(tmp_path / "out", new=True) as first:
            first.write(b"first")
    assert names(tmp_path) == ["out"] and (tmp_path / "out").read_bytes() == b"first"


def test_a_folder_that_a_killed_write_had_moved_away_is_put_back(tmp_path):
    """Where two folders cannot be swapped in one step, a kill between the two leaves neither in its place."""
    for name in (STAGED, STAGED + FORMER):
        (tmp_path / f".out.abcdefgh{name}").mkdir()
    (tmp_path / f".out.abcdefgh{STAGED}{FORMER}" / "whole").touch()
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["whole"]


@pytest.mark.parametrize("writer", [staged, staged_file])
def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch, writer):
    """Regression: after a power cut a shard had its name and no content."""
    events = []

    def held(status):
        return status.st_ino, status.st_size

    def noted(function, event):
        return lambda *arguments: (events.append(event(*arguments)), function(*arguments))[1]

    out = tmp_path / "out"
    if writer is staged:
        (out / "kept").mkdir(parents=True)
        (out / "kept" / "old").write_text("old")
    monkeypatch.setattr(os, "fsync", noted(os.fsync, lambda opened: held(os.fstat(opened))))
    monkeypatch.setattr(os, "replace", noted(os.replace, lambda *_: "placed"))
    monkeypatch.setattr(files, "_exchange", noted(files._exchange, lambda *_: "placed"))
    with writer(out) as opened:
        opened.write(b"new") if writer is staged_file else (opened / "new").write_text("new")
    wanted = [out, *out.rglob("*")] if writer is staged else [out]
    placed = events.index("placed")
    assert {held(path.stat()) for path in wanted} <= set(events[:placed])
    assert tmp_path.stat().st_ino in [inode for inode, _ in events[placed + 1 :]]
