"""Training that is killed goes on to the bits of a run that was left alone (`make kill`: at 100 moments).

What a killed run leaves is what it had done to files, so it is killed at its n-th operation on one below its
output: at an open for writing, a rename, a removal, within checkpoints and the last save as between them.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import PAIRS, TEXTS, save_checkpoint

KILLS = int(os.environ.get("KILLS", 1))  # of each kind of stage
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["uncausal.encoder.cli.training"])
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}
OPTIONS = ["--max-steps=4", "--save-steps=1", "--batch-size=4", "--bf16=False", "--learning-rate=1e-2"]
OPTIONS += ["--warmup-steps=0", "--logging-steps=1", "--dtype=float32", "--device=cpu"]


def operations(command: list[str], output: str, kill_at: int, count: Path) -> None:
    """Run the command in this process; write how many operations it took, or be killed before one of them."""
    from uncausal.encoder.cli.main import main

    torch.set_num_threads(1)
    done = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal done
        if event not in OPERATIONS or not str(arguments[0]).startswith(output):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        done += 1
        if done == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    status = main(command)
    assert not status, status
    count.write_text(str(done))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and data of every kind of stage."""
    folder = tmp_path_factory.mktemp("killed")
    save_checkpoint(folder / "model")
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
    own = {"mntp": ["--chunk-tokens=16"], "distill": [f"--vectors={folder / 'vectors.npy'}"]}.get(kind, [])

    def train(output: Path, kill_at: int = 0) -> tuple[int | None, int]:
        """Return the process's status and its operations."""
        count = tmp_path / "count"
        command = ["train", kind, str(folder / "model"), str(data), str(output), *OPTIONS, *own]
        process = CONTEXT.Process(target=operations, args=(command, str(output), kill_at, count))
        process.start()
        process.join()
        return process.exitcode, int(count.read_text()) if not process.exitcode else 0

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
