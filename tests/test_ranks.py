"""Several processes train as one does: torchrun with two of them on a tiny model, over gloo."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import FAST, PAIRS, TEXTS, Signal, load, losses

from uncausal.encoder.cli.main import main as run_command
from uncausal.encoder.model import Encoder
from uncausal.encoder.pruning import Pruning
from uncausal.encoder.training import follow
from uncausal.encoder.training.follow import run_recipe
from uncausal.encoder.training.progress import TrainingInterrupted
from uncausal.encoder.training.recipes import Recipe, Step
from uncausal.encoder.training.run import train
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.mntp import MNTP
from uncausal.encoder.training.stages.simcse import SimCSE
from uncausal.encoder.whitening import Whitening

SETTINGS = {**FAST, "max_steps": 4, "lora_dropout": 0.0, "logging_steps": 1, "save_steps": 2}
STAGES = {
    # Chunks masked unevenly, two micro-batches a process, more than one pass over the data.
    "mntp": (MNTP(chunk_tokens=8, batch_size=8, mini_batch_size=2, **SETTINGS), TEXTS[:30]),
    "contrastive": (
        Contrastive(batch_size=8, temperature=0.05, weights={"few": 2}, **SETTINGS),
        {"many": PAIRS[:20], "few": [(a, b, c) for (a, b), (c, _) in zip(PAIRS[20:30], PAIRS, strict=False)]},
    ),
}


def torchrun(checkpoint: Path, folder: Path, processes: int) -> list[dict]:
    """Run `main` below in so many processes and return what each left behind."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [*command, __file__, str(checkpoint), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]


def main(checkpoint: str, folder: str) -> None:
    """What each process does: every stage, stopped when the second process has Ctrl-C, then resumed."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    found = {}
    for name, (stage, data) in STAGES.items():
        run, encoder = Path(folder) / name, load(Path(checkpoint))
        callbacks = [Signal(3)] if rank == 1 else []
        try:
            train(encoder, stage, data, run, callbacks=callbacks, progress=False)
            stopped = "not at all"
        except TrainingInterrupted as message:
            stopped = str(message)
        dist.barrier()
        left = sorted(p.name for p in run.iterdir()), sorted(p.name for p in (run / "checkpoint-3").iterdir())
        dist.barrier()
        result = train(encoder, stage, data, run, progress=False)
        vectors = encoder.encode(TEXTS[:3]).tolist()
        found[name] = {"stopped": stopped, "left": left, "steps": result.steps, "tokens": result.tokens}
        found[name] |= {"losses": losses(result), "vectors": vectors}
    saves: list[str] = []
    save = Encoder.save_pretrained
    Encoder.save_pretrained = lambda self, path: saves.append(path) or save(self, path)  # type: ignore[method-assign]
    rows = Path(folder) / f"pairs-{rank}.jsonl"  # the same in all
    rows.write_text("".join(json.dumps({"anchor": a, "positive": b}) + "\n" for a, b in PAIRS[:16]))
    command = ["train", "contrastive", checkpoint, str(rows), f"{folder}/saved", "--max-steps", "1"]
    assert run_command([*command, "--batch-size", "8", "--dtype", "float32", "--json"]) == 0
    found["saves"] = [*saves]
    described = follow.describe_encoder

    def later(encoder: Encoder) -> dict:  # when the first process has written what it decided
        time.sleep(rank)
        return described(encoder)

    follow.describe_encoder = later  # type: ignore[assignment]
    steps = [Step("prune", Pruning(keep=1)), Step("whiten", Whitening(max_texts=100), TEXTS[:100])]
    steps.append(Step("simcse", SimCSE(batch_size=8, **SETTINGS), TEXTS[:16]))
    recipe = Recipe("r", None, checkpoint, {"device": "cpu"}, steps)
    found["recipe"] = run_recipe(recipe, Path(folder) / "recipe", progress=False).encode(TEXTS[:3]).tolist()
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_processes_train_as_one(checkpoint, tmp_path):
    """Stopped by a signal to one of them, resumed, and equal to one process with the whole batch.

    Every process took itself for the only one on a CPU; others removed the folder that the first renames; a
    signal to one left the rest waiting; MNTP masked the same positions in all and took the mean of means.
    """
    found = torchrun(checkpoint, tmp_path / "two", 2)
    for name, (stage, data) in STAGES.items():
        encoder = load(checkpoint)
        alone = train(encoder, stage, data, tmp_path / "one" / name, progress=False)
        for rank in (0, 1):
            mine = found[rank][name]
            assert "stopped at step 3 of 4" in mine["stopped"] and mine["steps"] == 1
            folder, files = mine["left"]
            assert folder == ["checkpoint-2", "checkpoint-3", "run.json"]
            assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(files)
            assert mine["losses"] == pytest.approx(losses(alone), abs=1e-4)
            np.testing.assert_allclose(mine["vectors"], encoder.encode(TEXTS[:3]), atol=1e-4)
    assert found[0]["mntp"]["tokens"] == 8 * 8  # of one step, over both processes
    # Every process wrote the encoder, each over the other's.
    assert [len(mine["saves"]) for mine in found] == [1, 0] and load(tmp_path / "two" / "saved").num_layers
    # Of a recipe the second process took what the first had just written, and left it waiting.
    assert found[0]["recipe"] == found[1]["recipe"]
    with pytest.raises(ValueError, match=r"differs in processes \(2 there, 1 here\)"):
        train(load(checkpoint), *STAGES["mntp"], tmp_path / "two" / "mntp", progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
