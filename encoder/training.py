"""Turns a converted model into an encoder in stages: masked next token prediction, SimCSE, contrastive pairs.

Each stage trains a fresh low-rank adapter on the headless backbone and merges it before the next one. `train`
runs one stage; the stages are the dataclasses of `uncausal.encoder.stages`.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.training_args import BatchSamplers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from uncausal.encoder import adapters
from uncausal.encoder.data import chunk_texts, read_pairs, read_texts
from uncausal.encoder.lm_head import find_head
from uncausal.encoder.losses import InfoNCELoss
from uncausal.encoder.model import resolve_dtype
from uncausal.encoder.progress import Progress, StopOnSignal, TrainingInterrupted
from uncausal.encoder.pruning import decoder_layers
from uncausal.encoder.runs import FINAL, RECORD, checkpoints, describe, open_run, save_final, step_of
from uncausal.encoder.stages import MNTP, STAGES, Contrastive, SimCSE, Stage
from uncausal.encoder.trainers import (
    Chunks,
    Evaluate,
    LengthGrouped,
    MaskedNextToken,
    MaskedTrainer,
    PairTrainer,
    StageTrainer,
    TwinCollator,
    autocast_forward,
    stack_chunks,
)

__all__ = ["MNTP", "STAGES", "Contrastive", "SimCSE", "Stage", "TrainResult", "TrainingInterrupted", "train"]
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
    loss: Callable[[SentenceTransformer], nn.Module] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> TrainResult:
    """Run one stage and merge its adapter into the encoder, in place.

    Args:
        encoder: `Encoder` or any SentenceTransformer whose first module holds a headless decoder.
        stage: `MNTP`, `SimCSE` or `Contrastive` with its hyperparameters.
        data: for MNTP and SimCSE texts or a source for `read_texts`; for Contrastive a source for
            `read_pairs`, rows, columns, a `datasets.Dataset`, or a dict of columns or Datasets (each batch is
            of one of them).
        output_dir: receives checkpoints while training and `adapter/` at the end.
        resume: go on from the last checkpoint in `output_dir`, or merge the finished adapter found there.
            False starts afresh and removes both.
        eval: called with the encoder at the end, and every `stage.eval_every` steps; its figures are logged.
        loss: makes another loss than InfoNCE for SimCSE and Contrastive.
        callbacks: further Trainer callbacks.
        progress: show a progress bar, or lines where there is no terminal.

    Returns:
        Steps, tokens, time, log and metrics.

    Raises:
        ValueError: `output_dir` holds a run with other settings or of another model, or data are too few.
        OSError: `output_dir` cannot be written; the last whole checkpoint stays.
        TrainingInterrupted: Ctrl-C; a checkpoint was written and the same call goes on from it.
        FloatingPointError: the loss became infinite or NaN.
    """
    run = Path(output_dir)
    set_seed(stage.seed)
    dataset = _prepare(encoder, stage, data)
    open_run(run, describe(encoder, stage, dataset), resume)
    with _trainable(encoder, stage) as adapter:
        if (run / FINAL).exists():
            logger.info("%s: already trained, merging %s", stage.name, run / FINAL)
            adapters.load_trainable(encoder, adapter, run / FINAL)
            record = json.loads((run / FINAL / RECORD).read_text())
            record.update(steps=0, tokens=0, seconds=0.0)
        else:
            with _conditions(encoder, stage):
                trainer = _trainer(encoder, stage, dataset, run, loss)
                trainer.adapter, trainer.trained = adapter, encoder
                if eval is not None and stage.eval_every:
                    trainer.add_callback(Evaluate(trainer, encoder, eval, stage.eval_every))
                for callback in callbacks:
                    trainer.add_callback(callback)
                record = _run(trainer, stage, run, progress)
            save_final(encoder, adapter, run, record)
        lost = adapters.merge_lora(adapter) if adapter is not None else 0.0
    encoder.eval()
    metrics = {} if eval is None else {name: float(value) for name, value in eval(encoder).items()}
    return TrainResult(**record, metrics=metrics, adapter=run / FINAL, lost_in_merge=lost)


def _prepare(encoder: SentenceTransformer, stage: Stage, data: Any) -> Any:
    """Chunks (n, L) int32 for MNTP; a Dataset, or a DatasetDict of several, for pairs."""
    from_file = isinstance(data, str | Path)
    if isinstance(stage, Contrastive):
        return _pairs(read_pairs(data) if from_file else data)
    texts: Any = read_texts(data) if from_file else data
    if isinstance(stage, MNTP):
        limit = stage.steps * stage.batch_size
        return chunk_texts(texts, encoder.tokenizer, stage.chunk_tokens, limit=limit, seed=stage.seed)
    kept = [text for text in texts if text.strip()]
    if len(kept) < 2:
        raise ValueError(f"SimCSE needs at least 2 sentences, to tell one from another; found {len(kept)}")
    return Dataset.from_dict({"text": kept})


def _pairs(data: Any) -> Dataset | DatasetDict:
    if isinstance(data, Dataset | DatasetDict):
        dataset = data
    elif isinstance(data, Mapping) and data and all(isinstance(v, Mapping | Dataset) for v in data.values()):
        dataset = DatasetDict({name: _pairs(value) for name, value in data.items()})
    elif isinstance(data, Mapping):
        dataset = Dataset.from_dict({name: list(texts) for name, texts in data.items()})
    else:
        rows = [tuple(row) for row in data]
        names = ("anchor", "positive", "negative")
        columns = zip(*rows, strict=True) if rows else ()
        dataset = Dataset.from_dict({n: list(c) for n, c in zip(names, columns, strict=False)})
    for part in dataset.values() if isinstance(dataset, DatasetDict) else [dataset]:
        if len(part) < 2 or len(part.column_names) < 2:
            raise ValueError(
                f"contrastive training needs at least 2 rows of (anchor, positive); found {len(part)} rows "
                f"with the columns {part.column_names}"
            )
    return dataset


@contextmanager
def _trainable(encoder: SentenceTransformer, stage: Stage) -> Iterator[PeftModel | None]:
    """Freeze all but what the stage trains; if the block fails, the encoder's weights are as before."""
    backbone: Any = encoder[0].auto_model  # type: ignore[union-attr]
    flags = [(parameter, parameter.requires_grad) for parameter in encoder.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    adapter = None
    if stage.lora_r:
        adapter = adapters.attach_lora(
            backbone,
            r=stage.lora_r,
            alpha=stage.lora_alpha,
            dropout=stage.lora_dropout,
            target_modules=stage.lora_targets,
            layers=stage.layers,
        )
    else:
        layers = decoder_layers(backbone)
        for index in range(len(layers)) if stage.layers is None else stage.layers:
            layers[index].requires_grad_(True)
    inside = {id(parameter) for parameter in backbone.parameters()}
    if not isinstance(stage, MNTP):
        for parameter, flag in flags:
            if id(parameter) not in inside:
                parameter.requires_grad_(flag)
    before = [(p, p.detach().clone()) for p, _ in flags if p.requires_grad]
    try:
        yield adapter
    except BaseException:
        if adapter is not None:
            adapters.unload_lora(adapter)
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag).grad = None


@contextmanager
def _conditions(encoder: SentenceTransformer, stage: Stage) -> Iterator[None]:
    """Length limit, attention dropout, precision and checkpointing for the time of the stage."""
    backbone: Any = encoder[0].auto_model  # type: ignore[union-attr]
    training, limit = encoder.training, encoder.max_seq_length
    with ExitStack() as stack:
        stack.callback(encoder.train, training)
        if not isinstance(stage, MNTP):
            stack.callback(setattr, encoder, "max_seq_length", limit)
            wanted = stage.max_length  # type: ignore[attr-defined]
            encoder.max_seq_length = wanted if limit is None else min(limit, wanted)
        if isinstance(stage, SimCSE):
            stack.enter_context(adapters.attention_dropout(backbone, stage.attention_dropout))
        if stage.gradient_checkpointing:
            new = hasattr(backbone, "activation_checkpointing_enable")  # the name since transformers 5.2x
            name = "activation_checkpointing" if new else "gradient_checkpointing"
            getattr(backbone, f"{name}_enable")({"use_reentrant": False})
            stack.callback(getattr(backbone, f"{name}_disable"))
        stack.enter_context(autocast_forward(backbone, _in_bf16(stage, backbone)))
        yield


def _in_bf16(stage: Stage, backbone: Any) -> bool:
    if stage.bf16 == "auto":
        return resolve_dtype("auto", backbone.device.type) == torch.bfloat16
    return stage.bf16


def _trainer(
    encoder: SentenceTransformer, stage: Stage, dataset: Any, run: Path, loss: Callable | None
) -> StageTrainer:
    backbone: Any = encoder[0].auto_model  # type: ignore[union-attr]
    micro_batch = (stage.micro_batch if isinstance(stage, MNTP) else None) or stage.batch_size
    rows = min(len(part) for part in dataset.values()) if isinstance(dataset, DatasetDict) else len(dataset)
    options: dict[str, Any] = {
        "output_dir": str(run),
        "max_steps": stage.steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": stage.batch_size // micro_batch,
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup_steps,
        "lr_scheduler_type": stage.schedule,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "logging_steps": stage.log_every,
        "logging_nan_inf_filter": False,
        "save_steps": stage.save_every,
        "seed": stage.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": backbone.device.type == "cpu",
        "dataloader_pin_memory": backbone.device.type == "cuda",
        "dataloader_drop_last": rows >= micro_batch,
    }
    if isinstance(stage, MNTP):
        args = TrainingArguments(**options, remove_unused_columns=False)
        args._n_gpu = min(args.n_gpu, 1)
        weight, bias = find_head(backbone, stage.head)
        if _in_bf16(stage, backbone):  # once, and not at every step by autocast: the head is frozen
            weight, bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
        collate, chunks = cast(Any, stack_chunks), Chunks(cast(Tensor, dataset))
        trainer = MaskedTrainer(MaskedNextToken(backbone, weight, bias), args, collate, chunks)
        trainer.mask = _mask_settings(encoder.tokenizer, backbone, stage)
        return trainer
    sampler: Any = BatchSamplers.BATCH_SAMPLER
    if stage.group_by_length:  # type: ignore[attr-defined]
        sampler = LengthGrouped
    elif isinstance(stage, Contrastive) and stage.no_duplicates:
        sampler = BatchSamplers.NO_DUPLICATES
    prompts = dict(stage.prompts) if isinstance(stage, Contrastive) else {}
    args = SentenceTransformerTrainingArguments(**options, batch_sampler=sampler, prompts=prompts)
    args._n_gpu = min(args.n_gpu, 1)
    if loss is None:
        objective: nn.Module = InfoNCELoss(
            encoder,
            temperature=1 / stage.scale,  # type: ignore[attr-defined]
            mini_batch_size=stage.micro_batch,
            gather_across_devices=True,
        )
    else:
        objective = loss(encoder)
    return PairTrainer(
        model=encoder,
        args=args,
        train_dataset=dataset,
        loss=objective,
        data_collator=TwinCollator(encoder.preprocess) if isinstance(stage, SimCSE) else None,
    )


def _run(trainer: StageTrainer, stage: Stage, run: Path, progress: bool) -> dict[str, Any]:
    """Train to the end, or write a checkpoint and raise TrainingInterrupted."""
    stop, bar = StopOnSignal(), Progress(stage.name)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(stop)
    if progress:
        trainer.add_callback(bar)
    last = next(reversed(checkpoints(run)), None)
    started, tokens, first = time.perf_counter(), trainer.tokens, 0 if last is None else step_of(last)
    if last is not None and first >= stage.steps:  # stopped after the last checkpoint, before the adapter
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
    if step < stage.steps:
        message = (
            f"{stage.name} stopped at step {step} of {stage.steps}: the same call or command resumes {run}"
        )
        print(message, file=sys.stderr, flush=True)
        raise TrainingInterrupted(message)
    return {
        "steps": step - first,
        "tokens": trainer.tokens - tokens,
        "seconds": time.perf_counter() - started,
        "history": trainer.state.log_history,
    }


def _mask_settings(tokenizer: Any, backbone: Any, stage: MNTP) -> dict[str, Any]:
    token = stage.mask_token or tokenizer.mask_token or "_"
    mask_id = tokenizer.convert_tokens_to_ids(token)
    if mask_id is None or mask_id == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token!r} to mask with: choose MNTP(mask_token=...)")
    vocab_size = min(len(tokenizer), backbone.config.get_text_config().vocab_size)
    return {
        "probability": stage.mask_probability,
        "mask_share": stage.mask_share,
        "random_share": stage.random_share,
        "mask_id": mask_id,
        "vocab_size": vocab_size,
        "special_ids": torch.tensor(
            sorted(set(tokenizer.all_special_ids) - {mask_id}), device=backbone.device
        ),
    }
