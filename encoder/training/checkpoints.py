"""The folder of a training run: whose it is, its checkpoints, its final adapter.

run.json            settings, and digests of model and data: a run only resumes what it began
checkpoint-N/       adapter, optimizer, schedule and random state after step N
adapter/            the trained adapter and training.json, the log; a run that has it is finished
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from datasets import DatasetDict
from peft import PeftModel
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from torch import Tensor

from uncausal.encoder.files import staged
from uncausal.encoder.training.lora import save_trainable

if TYPE_CHECKING:
    from uncausal.encoder.training.stages.base import Stage

FREE_TO_CHANGE = ("logging_steps", "save_steps", "eval_steps")
FINAL, RECORD = "adapter", "training.json"


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def describe(encoder: SentenceTransformer, stage: Stage, dataset: Any) -> dict[str, Any]:
    """What must not change between the parts of an interrupted run."""
    weights = hashlib.sha256()
    for name, parameter in encoder.named_parameters():
        weights.update(name.encode())
        weights.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    if isinstance(dataset, Tensor):
        digest = zlib.crc32(dataset.numpy().tobytes())
    else:
        parts = dataset.values() if isinstance(dataset, DatasetDict) else [dataset]
        digest = zlib.crc32("".join(f"{len(p)}{p[0]}{p[len(p) - 1]}" for p in parts).encode())
    settings = {k: v for k, v in dataclasses.asdict(stage).items() if k not in FREE_TO_CHANGE}
    description = {
        "stage": stage.name,
        **settings,
        "model": weights.hexdigest()[:16],
        "data": f"{digest:08x}",
    }
    return json.loads(json.dumps(description))


def open_run(run: Path, description: dict[str, Any], resume: bool) -> None:
    """Create the folder, or make sure that what it holds belongs to this run."""
    state, record = PartialState(), run / "run.json"
    if state.is_main_process:
        if not resume:
            for old in [run / "adapter", *checkpoints(run)]:
                shutil.rmtree(old, ignore_errors=True)
            record.unlink(missing_ok=True)
        try:
            run.mkdir(parents=True, exist_ok=True)
            if not record.exists():
                partial = record.with_suffix(".partial")
                partial.write_text(json.dumps(description, indent=2))
                partial.replace(record)
        except OSError as error:
            raise OSError(f"cannot write in {run}: {error.strerror or error}") from error
    state.wait_for_everyone()
    before = json.loads(record.read_text())
    changed = [k for k in {**before, **description} if before.get(k) != description.get(k)]
    if changed:
        shown = ", ".join(f"{k} ({before.get(k)!r} there, {description.get(k)!r} here)" for k in changed)
        raise ValueError(
            f"{run} holds a run that differs in {shown}. Choose another folder, or pass resume=False to "
            "replace it."
        )


def save_final(
    encoder: SentenceTransformer, adapter: PeftModel | None, run: Path, record: dict[str, Any]
) -> None:
    """Write `adapter/` whole or not at all."""
    state = PartialState()
    if state.is_main_process:
        try:
            with staged(run / FINAL) as folder:
                save_trainable(encoder, adapter, folder)
                (folder / RECORD).write_text(json.dumps(record, indent=1))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"could not write {run / FINAL} ({error}). Make room and run the same again: it goes on from "
                "the last checkpoint."
            ) from error
    state.wait_for_everyone()
