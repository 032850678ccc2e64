"""The folder of a training run: whose it is, its checkpoints, its final adapter.

run.json            settings, and digests of model, loss and data: a run only resumes what it began
checkpoint-N/       adapter, optimizer, schedule and random state after step N
adapter/            the trained adapter and training.json, the log and the run it is of; a run that has it is
                    finished
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import DatasetDict
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from uncausal.encoder.adapters import ADAPTER_FILE
from uncausal.encoder.files import staged
from uncausal.encoder.inputs import tokenizer_state
from uncausal.encoder.pooling import TokenWeights
from uncausal.encoder.training.lora import EXTRA_FILE, save_trainable
from uncausal.encoder.training.ranks import together

if TYPE_CHECKING:
    from uncausal.encoder.training.stages.base import Stage

logger = logging.getLogger(__name__)

# What does not change the result, but for rounding; a teacher's vectors are part of the data.
FREE_TO_CHANGE = ("logging_steps", "save_steps", "eval_steps", "dataloader_num_workers", "report_to")
FREE_TO_CHANGE += ("teacher", "vectors", "compile_layers", "gradient_checkpointing")
FINAL, RECORD = "adapter", "training.json"
UNWANTED = ".saving-"  # starts the name of what is not whole yet, or no longer; the next run removes it


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_checkpoint(run: Path) -> Path | None:
    """The last checkpoint whose tensors can be read and are finite; those behind it are removed."""
    last, bad = None, []
    with together():  # a process that removes what another still reads would part their ways
        for path in reversed(checkpoints(run)):
            files = [path / name for name in (ADAPTER_FILE, EXTRA_FILE) if (path / name).exists()]
            try:
                if all(bool(tensor.isfinite().all()) for file in files for tensor in _read(file)):
                    last = path
                    break
                why = "holds weights that are not finite"
            except SafetensorError as error:
                why = f"is damaged ({error})"
            logger.warning("%s %s: going on from the one before", path, why)
            bad.append(path)
    if PartialState().is_main_process:
        for path in bad:
            remove(path)
    return last


def remove(path: Path) -> None:
    """Remove a checkpoint or an adapter at once: one that is half there must not look whole."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(f"{UNWANTED}{path.name}")), ignore_errors=True)


def weights_digest(encoder: SentenceTransformer) -> str:
    """A checksum of an encoder's weights and their names."""
    weights = 0
    for name, tensor in encoder.state_dict().items():
        weights = zlib.crc32(name.encode(), weights)
        weights = zlib.crc32(memoryview(_bytes(tensor)), weights)
    return f"{weights:08x}"


def describe_encoder(encoder: SentenceTransformer, weights: str | None = None) -> dict[str, Any]:
    """What decides an encoder's vectors; `weights` is its `weights_digest`, where that is known."""
    backbone: Any = encoder[0].auto_model  # type: ignore[union-attr]
    return {
        "model": weights or weights_digest(encoder),
        "attention": f"{_mode(backbone)}, {backbone.config._attn_implementation}",
        "max_seq_length": encoder.max_seq_length,
        # What stands between a text and its vector but weights: pooling, templates.
        "modules": [_settings(module) for module in encoder],
        "encoder_prompts": encoder.prompts,
        "tokenizer": f"{zlib.crc32(tokenizer_state(encoder.tokenizer).encode()):08x}",
    }


def describe(
    encoder: SentenceTransformer, stage: Stage, dataset: Any, loss: nn.Module | None, weights: str
) -> dict[str, Any]:
    """What must not change between the parts of an interrupted run.

    `weights` is the `weights_digest` before the stage: what it appends is in its checkpoints, and need not be
    the same to the bit when it is made again.
    """
    settings = {k: v for k, v in dataclasses.asdict(stage).items() if k not in FREE_TO_CHANGE}
    description = {
        "stage": stage.name,
        **settings,
        **describe_encoder(encoder, weights),
        "loss": None if loss is None else _loss_settings(loss, encoder),
        "data": f"{digest(dataset):08x}",
        "processes": PartialState().num_processes,
    }
    return json.loads(json.dumps(description, default=lambda value: type(value).__name__))


def digest(dataset: Any) -> int:
    """A checksum of all rows of a tensor, a Dataset or a DatasetDict."""
    if isinstance(dataset, Tensor):
        return zlib.crc32(memoryview(_bytes(dataset)))
    value = 0
    for name, part in dataset.items() if isinstance(dataset, DatasetDict) else [("", dataset)]:
        value = zlib.crc32(f"{name}:{part.column_names}".encode(), value)
        for batch in part.with_format("arrow").iter(10_000):
            rows: Any = batch  # a pyarrow Table, by that format
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, rows.schema) as stream:
                stream.write_table(rows.combine_chunks())
            value = zlib.crc32(sink.getvalue(), value)
    return value


def open_run(run: Path, description: dict[str, Any], resume: bool) -> None:
    """Note what the run in a folder is, or make sure that what it holds belongs to this one.

    A record counts once a checkpoint or an adapter stands beside it: a run that failed before is replaced.
    """
    record = run / "run.json"
    with together():
        if PartialState().is_main_process:
            for old in run.glob(f"{UNWANTED}*"):
                shutil.rmtree(old, ignore_errors=True)
            if not resume:
                for old in [run / FINAL, *checkpoints(run)]:
                    remove(old)
            try:
                if not (run / FINAL).exists() and not checkpoints(run):
                    partial = record.with_suffix(".partial")
                    partial.write_text(json.dumps(description, indent=2))
                    partial.replace(record)
            except OSError as error:
                raise OSError(f"cannot write in {run}: {error.strerror or error}") from error
    known = [record] if record.exists() or not (run / FINAL).exists() else []
    known += [run / FINAL / RECORD] if (run / FINAL).exists() else []
    for file in known:
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError):
            content = {}
        before = content if file == record else content.get("run", {})
        # an earlier version's may hold what is free
        there = {k: v for k, v in before.items() if k not in FREE_TO_CHANGE}
        changed = [k for k in {**there, **description} if there.get(k) != description.get(k)]
        if changed:
            shown = ", ".join(f"{k} ({before.get(k)!r} there, {description.get(k)!r} here)" for k in changed)
            differs = f"a run that differs in {shown}" if before else "a run of unknown settings"
            raise ValueError(
                f"{run} holds {differs}. Choose another folder, or replace it: resume=False, or --no-resume."
            )


def save_final(
    encoder: SentenceTransformer,
    adapter: PeftModel | None,
    run: Path,
    record: dict[str, Any],
    description: dict[str, Any],
) -> None:
    """Write `adapter/` whole or not at all."""
    with together():
        if PartialState().is_main_process:
            try:
                with staged(run / FINAL) as folder:
                    save_trainable(encoder, adapter, folder)
                    (folder / RECORD).write_text(json.dumps({**record, "run": description}, indent=1))
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"could not write {run / FINAL} ({error}). Make room and run the same again: it goes on "
                    "from the last checkpoint."
                ) from error


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _read(file: Path) -> Iterator[Tensor]:
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            yield tensors.get_tensor(name)


def _settings(module: Any) -> dict[str, Any]:
    """What a module of the library says of itself, and its name."""
    kind = type(module)
    config = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
    if isinstance(module, TokenWeights):  # a word for every token; the weights are among the encoder's
        config = {"vocab": f"{zlib.crc32(json.dumps(module.vocab).encode()):08x}"}
    return {"kind": f"{kind.__module__}.{kind.__qualname__}", **config}


def _loss_settings(loss: nn.Module, encoder: nn.Module) -> list[dict[str, Any]]:
    """Those of a loss and of the losses inside it; of one that does not tell them, its plain attributes."""
    of_encoder = set(encoder.modules())
    plain = (bool, int, float, str, list, tuple)
    return [
        {k: v for k, v in vars(part).items() if isinstance(v, plain) and k[0] != "_" and k != "training"}
        | _settings(part)
        for part in loss.modules()
        if part not in of_encoder
    ]


def _mode(backbone: Any) -> str:
    return "causal" if getattr(backbone.config, "is_causal", True) else "bidirectional"
