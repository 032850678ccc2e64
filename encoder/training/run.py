"""Turns a converted model into an encoder in stages: masked next token prediction, SimCSE, contrastive pairs.

Each stage trains a fresh low-rank adapter on the headless backbone and merges it before the next one. `train`
runs one stage; what is particular to a stage stands in its file in `stages/`.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from uncausal.encoder.adapters import lost_in_rounding, merge_lora, unload_lora
from uncausal.encoder.layers import decoder_layers
from uncausal.encoder.training.checkpoints import (
    FINAL,
    RECORD,
    describe,
    last_checkpoint,
    open_run,
    save_final,
    step_of,
    weights_digest,
)
from uncausal.encoder.training.lora import attach_lora, check_layers, load_trainable
from uncausal.encoder.training.progress import Progress, StopOnSignal, TrainingInterrupted
from uncausal.encoder.training.ranks import anywhere, only_run, process_state, together, total
from uncausal.encoder.training.stages.base import LossFactory, Stage
from uncausal.encoder.training.trainer import Evaluate, StageTrainer, compiled_layers
from uncausal.encoder.whitening import LinearMap

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a stage did.

    Attributes:
        steps, tokens, seconds: of this call; 0 where a finished stage was found and merged.
        history: the logged lines, each with step, loss, learning_rate and tokens_per_second.
        metrics: what `eval` returned at the end.
        adapter: the folder of the saved adapter.
        lost_in_merge: share of the update rounded away by the weights' dtype.
    """

    steps: int
    tokens: int
    seconds: float
    history: list[dict[str, Any]]
    metrics: dict[str, float]
    adapter: Path
    lost_in_merge: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    encoder: SentenceTransformer,
    stage: Stage,
    data: Any,
    output_dir: str | Path,
    resume: bool = True,
    eval: Callable[[SentenceTransformer], Mapping[str, float]] | None = None,
    *,
    loss: LossFactory | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> TrainResult:
    """Run one stage and merge its adapter into the encoder, in place.

    Args:
        encoder: `Encoder` or any SentenceTransformer whose first module holds a headless decoder.
        stage: `MNTP`, `SimCSE` or `Contrastive` with its hyperparameters.
        data: for MNTP and SimCSE texts or a source for `read_texts`; for Contrastive a source for
            `read_pairs`, or a dict of several (each batch is of one of them).
        output_dir: receives checkpoints while training and `adapter/` at the end.
        resume: go on from the last checkpoint in `output_dir`, or merge the finished adapter found there.
            False starts afresh and removes both.
        eval: called with the encoder at the end, and every `stage.eval_steps` steps; its figures are logged.
        loss: makes another loss than InfoNCE for SimCSE and Contrastive.
        callbacks: further Trainer callbacks.
        progress: show a progress bar, or lines where there is no terminal.

    Returns:
        Steps, tokens, time, log and metrics.

    Raises:
        ValueError: `output_dir` holds a run with other settings or of another model, or another process is
            at work in it; or data are too few.
        DataError: a row of the data is wrong; the message names file, row and field.
        OSError: `output_dir` cannot be written; the last whole checkpoint stays.
        TrainingInterrupted: Ctrl-C; a checkpoint was written and the same call goes on from it.
        FloatingPointError: the loss became infinite or NaN.
    """
    process_state(encoder.device)
    with only_run(Path(output_dir)), _modules_as_before(encoder):
        result = _train(encoder, stage, data, Path(output_dir), resume, eval, loss, callbacks, progress)
    encoder.eval()
    encoder._model_card_text = None  # that of what it was
    if eval is not None:
        result.metrics = {name: float(value) for name, value in eval(encoder).items()}
    return result


def _train(
    encoder: SentenceTransformer,
    stage: Stage,
    data: Any,
    run: Path,
    resume: bool,
    eval: Callable[[SentenceTransformer], Mapping[str, float]] | None,
    loss: LossFactory | None,
    callbacks: Sequence[TrainerCallback],
    progress: bool,
) -> TrainResult:
    state = PartialState()
    set_seed(stage.seed)
    own, weights = None if loss is None else loss(encoder), weights_digest(encoder)
    dataset = stage.prepare(encoder, data, own)
    module = own or stage.make_loss(encoder, dataset)
    description = describe(encoder, stage, dataset, module, weights)
    open_run(run, description, resume)
    again = "the same call or command" + ("" if resume else " without --no-resume (resume=False)")
    set_seed(stage.seed)  # whatever the data drew: loading a teacher does
    with _trainable(encoder, stage) as (adapter, before):
        if (run / FINAL).exists():
            logger.info("%s: already trained, merging %s", stage.name, run / FINAL)
            load_trainable(encoder, adapter, run / FINAL)
            record = json.loads((run / FINAL / RECORD).read_text())
            record = {"steps": 0, "tokens": 0, "seconds": 0.0, "history": record["history"]}
        else:
            backbone: Any = encoder[0].auto_model  # type: ignore[union-attr]
            with stage.conditions(encoder), compiled_layers(backbone, stage.compile_layers):
                trainer = stage.make_trainer(encoder, dataset, run, module)
                trainer.adapter, trainer.trained, trainer.stage_loss = adapter, encoder, module
                trainer.schedule_steps = stage.schedule_steps
                set_seed(stage.seed + state.process_index)  # dropout of its own in every process
                if eval is not None and stage.eval_steps:
                    trainer.add_callback(Evaluate(trainer, encoder, eval, stage.eval_steps))
                for callback in callbacks:
                    trainer.add_callback(callback)
                stop = StopOnSignal()
                record = _run(trainer, stage, run, progress, stop, again)
            save_final(encoder, adapter, run, record, description)
            if anywhere(stop.stopped):
                raise TrainingInterrupted(f"{stage.name} ended: {again} goes on behind it")
        lost = lost_in_rounding(before) if adapter is None else merge_lora(adapter)
    return TrainResult(**record, metrics={}, adapter=run / FINAL, lost_in_merge=lost)


@contextmanager
def _modules_as_before(encoder: SentenceTransformer) -> Iterator[None]:
    """If the block fails, take out the module that a stage put in."""
    modules = dict(encoder._modules)
    try:
        yield
    except BaseException:
        restore_modules(encoder, modules)
        raise


def restore_modules(encoder: SentenceTransformer, modules: dict[str, nn.Module]) -> None:
    """Give an encoder the modules, by their names, that it had before."""
    encoder._modules.clear()
    encoder._modules.update(modules)


@contextmanager
def _trainable(
    encoder: SentenceTransformer, stage: Stage
) -> Iterator[tuple[PeftModel | None, list[tuple[nn.Parameter, Tensor]]]]:
    """Freeze all but what the stage trains; if the block fails, the encoder's weights are as before.

    Yields the adapter, and what else is trained, each with its value from before.
    """
    backbone: Any = encoder[0].auto_model  # type: ignore[union-attr]
    flags = [(parameter, parameter.requires_grad) for parameter in encoder.parameters()]
    dtypes = [parameter.dtype for parameter, _ in flags]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    adapter, before = None, []
    try:
        if stage.lora_r:
            adapter = attach_lora(
                backbone,
                r=stage.lora_r,
                alpha=stage.lora_alpha,
                dropout=stage.lora_dropout,
                rslora=stage.lora_rslora,
                target_modules=stage.lora_targets,
                trainable_layers=stage.trainable_layers,
            )
        else:
            layers = decoder_layers(backbone)
            check_layers(layers, stage.trainable_layers)
            for index in range(len(layers)) if stage.trainable_layers is None else stage.trainable_layers:
                layers[index].requires_grad_(True)
            backbone.get_input_embeddings().requires_grad_(stage.train_embeddings)
        inside = {id(parameter) for parameter in backbone.parameters()}
        if stage.trains_pooling:
            for parameter, flag in flags:
                if id(parameter) not in inside:
                    parameter.requires_grad_(flag)
        before += [(p, p.detach().clone()) for p, _ in flags if p.requires_grad]
        maps = [] if stage.lora_r else flags
        for module in encoder:
            if stage.lora_r and isinstance(module, LinearMap):
                maps += [(parameter, True) for parameter in module.parameters() if parameter.requires_grad]
        if maps:
            # A step is smaller than the last place of most half precision weights, and would be rounded away.
            for parameter, _ in maps:
                parameter.data = parameter.data.float()
        yield adapter, before
        _to_dtypes(flags, dtypes)
    except BaseException:
        if adapter is not None:
            unload_lora(adapter)
        _to_dtypes(flags, dtypes)
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag).grad = None


def _to_dtypes(flags: list[tuple[nn.Parameter, bool]], dtypes: list[torch.dtype]) -> None:
    for (parameter, _), dtype in zip(flags, dtypes, strict=True):
        parameter.data = parameter.data.to(dtype)


def _run(
    trainer: StageTrainer, stage: Stage, run: Path, progress: bool, stop: StopOnSignal, again: str
) -> dict[str, Any]:
    """Train to the end, or write a checkpoint and raise TrainingInterrupted."""
    bar = Progress(stage.name)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(stop)
    if progress:
        trainer.add_callback(bar)
    with together():
        last = last_checkpoint(run)
    started, tokens, first = time.perf_counter(), trainer.tokens, 0 if last is None else step_of(last)
    if last is not None and first >= stage.max_steps:  # stopped after the last checkpoint, before the adapter
        trainer._load_from_checkpoint(str(last))
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        return {"steps": 0, "tokens": 0, "seconds": 0.0, "history": history}
    if last is not None:
        logger.info("%s: resuming from %s", stage.name, last)
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    finally:
        bar.close()
    step = trainer.state.global_step
    if step < stage.max_steps:
        raise TrainingInterrupted(
            f"{stage.name} stopped at step {step} of {stage.max_steps}: {again} resumes {run}"
        )
    return {
        "steps": step - first,
        "tokens": int(total(trainer.tokens - tokens)),
        "seconds": time.perf_counter() - started,
        "history": trainer.state.log_history,
    }
