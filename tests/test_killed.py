"""Commands that are killed leave what was there or what they make, and go on to the bits of a run left alone.

What a killed run leaves is what it had done to files, so it is killed at its n-th operation on one beside its
output: at an open for writing, a rename, a removal, a statement of SQLite, within a checkpoint or a save as
between them. `make kill` takes twenty moments of each command.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import PAIRS, TEXTS, save_checkpoint

KILLS = int(os.environ.get("KILLS", 1))  # of each command
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["uncausal.encoder.cli.training"])
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}
OPTIONS = ["--max-steps=4", "--save-steps=1", "--batch-size=4", "--bf16=False", "--learning-rate=1e-2"]
OPTIONS += ["--warmup-steps=0", "--logging-steps=1", "--dtype=float32", "--device=cpu"]


def operations(command: list[str], below: str, kill_at: int, count: Path) -> None:
    """Run the command in this process; write how many operations it took, or be killed before one of them."""
    from uncausal.encoder.cli.main import main

    torch.set_num_threads(1)
    done = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal done
        if event not in OPERATIONS or not str(arguments[0]).startswith(below):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        done += 1
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        database = plain_connect(*arguments, **options)
        database.set_trace_callback(lambda _: watch("os.truncate", (below,)))
        return database

    plain_connect, sqlite3.connect = sqlite3.connect, connect  # its files are opened behind Python's back
    sys.addaudithook(watch)
    status = main(command)
    assert not status, status
    count.write_text(str(done))


def run(command: list[str], output: Path, kill_at: int = 0) -> tuple[int | None, int]:
    """Run a command in a process of its own; return its status, and its operations if it ended."""
    count = output.with_name("count")
    process = CONTEXT.Process(target=operations, args=(command, str(output.parent), kill_at, count))
    process.start()
    process.join()
    return process.exitcode, int(count.read_text()) if not process.exitcode else 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, another, a folder to index, and data of every kind of stage."""
    folder = tmp_path_factory.mktemp("killed")
    save_checkpoint(folder / "model")
    save_checkpoint(folder / "deeper", num_hidden_layers=3)
    (folder / "project").mkdir()
    for number in range(3):
        (folder / "project" / f"{number}.py").write_text(f"def f{number}():\n    return {number}\n")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    rows = [
        {
            "anchor": a,
            "positive": p,
            "negative": PAIRS[i - 9][0],
            "instruction": "find it",
            "task": "ab"[i % 2],
        }
        for i, (a, p) in enumerate(PAIRS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(len(TEXTS), 16)))
    return folder


@pytest.mark.parametrize("kind", ["mntp", "simcse", "contrastive", "instruction", "distill"])
def test_killed_training_goes_on_to_the_same_bits(folder, kind, tmp_path):
    data = folder / ("texts.txt" if kind in ("mntp", "simcse", "distill") else "rows.jsonl")
    own = {
        "mntp": ["--chunk-tokens=16", "--lens-steps=3"],
        "distill": [f"--vectors={folder / 'vectors.npy'}"],
    }.get(kind, [])

    def train(output: Path, kill_at: int = 0) -> tuple[int | None, int]:
        return run(
            ["train", kind, str(folder / "model"), str(data), str(output), *OPTIONS, *own], output, kill_at
        )

    def weights(output: Path) -> dict[str, bytes]:
        files = [f for f in sorted(output.rglob("*.safetensors")) if "training" not in f.parts]
        return {str(file.relative_to(output)): file.read_bytes() for file in files}

    status, total = train(tmp_path / "whole")
    assert status == 0 and total > 20
    whole = weights(tmp_path / "whole")
    assert whole
    for number in range(KILLS):
        moment = random.Random(f"{kind} {number}").randint(1, total)
        output = tmp_path / f"killed-{number}"
        status, _ = train(output, moment)
        assert status == -signal.SIGKILL, moment
        status, _ = train(output)
        assert status == 0 and weights(output) == whole, f"killed before operation {moment} of {total}"


def files(output: Path) -> dict[str, bytes]:
    """All but the model card, which has the time, and what a killed run had under a hidden name."""
    found = {str(file.relative_to(output)): file for file in sorted(output.rglob("*")) if file.is_file()}
    return {name: f.read_bytes() for name, f in found.items() if name[0] != "." and name != "README.md"}


def passages(output: Path) -> list[tuple]:
    with sqlite3.connect(output) as database:
        return database.execute("SELECT * FROM passages ORDER BY path, number").fetchall()


@pytest.mark.parametrize("command", ["convert", "encode", "index"])
def test_killed_writing_leaves_one_of_both_and_goes_on(folder, command, tmp_path):
    """An encoder that replaces another is one of the two, whole; a corpus or an index goes on."""
    loading = ["--dtype=float32", "--device=cpu"]
    told = {
        "convert": lambda model, output: [model, output],
        "encode": lambda model, output: [
            model,
            str(folder / "texts.txt"),
            output + "/",
            "--rows-per-shard=50",
        ],
        "index": lambda model, output: [str(folder / "project"), "--model", model, "--out", output],
    }[command]
    contents = passages if command == "index" else files

    def write(name: str, model: str, kill_at: int = 0) -> tuple[int | None, int]:
        output = tmp_path / name
        return run([command, *told(str(folder / model), str(output)), *loading], output, kill_at)

    replaced = command == "convert"  # the others refuse another model's
    if replaced:
        assert write("old", "model")[0] == 0
        shutil.copytree(tmp_path / "old", tmp_path / "whole")
    status, total = write("whole", "deeper")
    assert status == 0 and total > 2
    whole = contents(tmp_path / "whole")
    for number in range(KILLS):
        name, moment = f"killed-{number}", random.Random(f"{command} {number}").randint(1, total)
        if replaced:
            shutil.copytree(tmp_path / "old", tmp_path / name)
        assert write(name, "deeper", moment)[0] == -signal.SIGKILL, moment
        if replaced:
            assert contents(tmp_path / name) in (contents(tmp_path / "old"), whole), moment
        assert write(name, "deeper")[0] == 0
        assert contents(tmp_path / name) == whole, f"killed before operation {moment} of {total}"
        assert not list(tmp_path.rglob(".*")), f"what the run killed before operation {moment} left is there"
