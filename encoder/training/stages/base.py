"""What all stages have in common: hyperparameters, and what each must say of its data, trainer and loss.

Defaults are LLM2Vec's (arXiv 2404.05961 and its published configurations) unless a stage says otherwise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.training_args import BatchSamplers
from torch import nn
from transformers.training_args import OptimizerNames

from uncausal.encoder.data.rows import DataError
from uncausal.encoder.loading import resolve_dtype
from uncausal.encoder.training.lora import LORA_TARGETS
from uncausal.encoder.training.losses import InfoNCELoss
from uncausal.encoder.training.ranks import sharded_by
from uncausal.encoder.training.samplers import LengthGrouped
from uncausal.encoder.training.trainer import PairTrainer, StageTrainer, autocast_forward, autocast_latents

LossFactory = Callable[[SentenceTransformer], nn.Module]
AGAINST_COMPILED_LAYERS = ("activation_checkpointing", "gradient_checkpointing")  # draws other dropout
AGAINST_COMPILED_LAYERS += ("torch_compile", "torch_compile_backend", "torch_compile_mode")  # compile all
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")


@dataclass(kw_only=True)
class Stage:
    """What all stages have in common; each kind of stage is a subclass in a file of its own.

    Args:
        max_steps: optimiser steps.
        schedule_steps: the learning rate's schedule is made for so many steps, and the run stops at
            `max_steps` of it; by default both are one. LLM2Vec's spans three epochs of its data, of which a
            run sees a thousand steps, so its rate hardly falls (recipes/llm2vec.toml).
        batch_size: of a step, over all processes together.
        learning_rate: at its highest.
        warmup_steps: over which the learning rate rises to it.
        lr_scheduler_type: how it falls afterwards, by the Trainer's names.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm.
        lora_r: rank of the adapter; 0 trains the layers' own weights, in float32 until the stage ends where
            they have half precision; the norm behind them stays as it is.
        lora_alpha: the adapter's output is scaled by lora_alpha / lora_r.
        lora_rslora: scale by lora_alpha / sqrt(lora_r) instead, for high ranks (rsLoRA, arXiv 2312.03732).
        lora_dropout: on the adapter's input.
        lora_targets: names of the linear layers that get an adapter.
        trainable_layers: decoder layers to train, from 0; all by default. The backward pass
            stops below the lowest.
        train_embeddings: with lora_r=0, train the token embeddings too.
        bf16: matrix products in bfloat16; "auto" where the hardware has it. Weights keep their dtype.
        gradient_checkpointing: keep no activations but one per layer.
        compile_layers: on a CPU, fuse what stands between a layer's matrix products (torch.compile), which
            takes half a minute first: for hundreds of steps. Without a C++ compiler it is left out; it does
            not go with gradient_checkpointing, whose second forward pass would draw other dropout.
        mini_batch_size: chunks or pairs in a process's memory at once; the loss is that of the whole batch
            all the same, by accumulation in MNTP and by GradCache (arXiv 2101.06983) in the others. All of
            them by default.
        seed: of the data's order, dropout and masks.
        logging_steps: between two lines of the log.
        save_steps: between two checkpoints.
        eval_steps: between two evaluations; 0 evaluates only at the end.
        optim: the optimiser, by the Trainer's names.
        dataloader_num_workers: processes that prepare batches; 0 does it between the steps.
        report_to: where the log goes besides the screen: wandb, tensorboard, all, ...
        trainer_arguments: more arguments of the Trainer, passed as they are: torch_compile, deepspeed. FSDP
            and ZeRO-3 are refused: a stage saves and merges whole weights.
    """

    max_steps: int = 1000
    schedule_steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup_steps: int = 0
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_r: int = 16
    lora_alpha: int = 32
    lora_rslora: bool = False
    lora_dropout: float = 0.05
    lora_targets: Sequence[str] = LORA_TARGETS
    trainable_layers: Sequence[int] | None = None
    train_embeddings: bool = False
    bf16: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    compile_layers: bool = False
    mini_batch_size: int | None = None
    seed: int = 42
    logging_steps: int = 10
    save_steps: int = 200
    eval_steps: int = 0
    optim: str = "adamw_torch_fused"
    dataloader_num_workers: int = 0
    report_to: str = "none"
    trainer_arguments: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "logging_steps", "save_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "lora_r", "eval_steps", "weight_decay", "dataloader_num_workers"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        apart = not (self.train_embeddings and self.lora_r)
        self._require("train_embeddings", apart, "False with an adapter: lora_r=0 trains whole weights")
        self._require("learning_rate", self.learning_rate > 0, "above 0")
        self._require("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        divides = self.mini_batch_size is None or (
            self.mini_batch_size > 0 and self.batch_size % self.mini_batch_size == 0
        )
        self._require("mini_batch_size", divides, f"a divisor of the batch size, {self.batch_size}")
        horizon = self.schedule_steps is None or self.schedule_steps >= self.max_steps
        self._require("schedule_steps", horizon, f"at least max_steps, {self.max_steps}")
        known = self.lr_scheduler_type in SCHEDULES
        self._require("lr_scheduler_type", known, f"one of {', '.join(SCHEDULES)}")
        self._require("optim", self.optim in {*OptimizerNames}, "an optimiser of the Trainer, as adamw_torch")
        if self.compile_layers:
            others = [name for name in AGAINST_COMPILED_LAYERS if self.trainer_arguments.get(name)]
            others += ["gradient_checkpointing"] * self.gradient_checkpointing
            self._require("compile_layers", not others, f"off with {', '.join(others)}")
        arguments = {argument.name for argument in fields(SentenceTransformerTrainingArguments)}
        unknown = sorted(self.trainer_arguments.keys() - arguments)
        self._require("trainer_arguments", not unknown, f"the Trainer's; it has no {', '.join(unknown)}")
        if sharder := sharded_by(self.trainer_arguments):
            raise ValueError(
                f"{type(self).__name__}: {sharder} gives every process a part of the weights, and a stage "
                "saves and merges whole ones: leave it out, and processes share the batch alone (torchrun)"
            )

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    trains_pooling: ClassVar[bool] = True

    @property
    def embeds_twice(self) -> bool:
        """Whether GradCache is at work: it embeds a batch without gradients first, and again with them."""
        return False

    def prepare(self, encoder: SentenceTransformer, data: Any, loss: nn.Module | None = None) -> Any:
        """Turn what the user gave into the dataset that the trainer takes; see the stage for its forms.

        `loss` is the caller's own, where it gave one.
        """
        raise NotImplementedError

    def check_size(self, what: str, rows: int) -> None:
        """Refuse data that do not fill a batch."""
        if rows < self.batch_size:
            raise DataError(
                f"{what} {rows} rows, fewer than a batch of {self.batch_size}: add data or lower batch_size"
            )

    def make_loss(self, encoder: SentenceTransformer, dataset: Any = None) -> nn.Module | None:
        """Return the loss of a batch, or None where the trainer's model holds it."""
        return None

    def make_trainer(
        self, encoder: SentenceTransformer, dataset: Any, run: Path, loss: nn.Module | None
    ) -> StageTrainer:
        """Return the Trainer of this stage, its checkpoints going to the folder `run`."""
        raise NotImplementedError

    @contextmanager
    def conditions(self, encoder: SentenceTransformer) -> Iterator[None]:
        """Precision and checkpointing for the time of the stage."""
        backbone: Any = encoder[0].auto_model  # type: ignore[union-attr]
        with ExitStack() as stack:
            stack.callback(encoder.train, encoder.training)
            if self.gradient_checkpointing:
                new = hasattr(backbone, "activation_checkpointing_enable")  # the name since transformers 5.2x
                name = "activation_checkpointing" if new else "gradient_checkpointing"
                getattr(backbone, f"{name}_enable")({"use_reentrant": False})
                stack.callback(getattr(backbone, f"{name}_disable"))
            in_bf16 = self.in_bf16(backbone)
            stack.enter_context(autocast_forward(backbone, in_bf16))
            pooling = encoder[1] if len(encoder) > 1 else nn.Identity()
            on_gpu = backbone.device.type == "cuda"  # on a CPU float32 costs little, and is exact
            stack.enter_context(autocast_latents(pooling, in_bf16 and on_gpu))
            yield

    def in_bf16(self, backbone: Any) -> bool:
        """Whether matrix products run in bfloat16."""
        if self.bf16 == "auto":
            return resolve_dtype("auto", backbone.device.type) == torch.bfloat16
        return self.bf16

    def trainer_options(self, backbone: Any, run: Path, micro_batch: int | None = None) -> dict[str, Any]:
        """The Trainer's arguments that all stages share; a process takes `micro_batch` rows at a time.

        Batches are drawn whole and split over the processes, so that any number of them sees the same ones.
        """
        processes = PartialState().num_processes
        share = self.batch_size // processes
        at_once = micro_batch or share
        if share * processes != self.batch_size or share % at_once:
            raise ValueError(
                f"{type(self).__name__}.batch_size is {self.batch_size}; {processes} processes with "
                f"mini-batches of {at_once} need a multiple of {processes * at_once}"
            )
        options = {
            "output_dir": str(run),
            "max_steps": self.max_steps,
            "per_device_train_batch_size": at_once * processes,
            "accelerator_config": {"split_batches": True, "even_batches": False},
            "gradient_accumulation_steps": share // at_once,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "lr_scheduler_type": self.lr_scheduler_type,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "logging_steps": self.logging_steps,
            "logging_nan_inf_filter": False,
            "save_steps": self.save_steps,
            "seed": self.seed,
            "optim": self.optim,
            "dataloader_num_workers": self.dataloader_num_workers,
            "report_to": self.report_to,
            "disable_tqdm": True,
            "use_cpu": backbone.device.type == "cpu",
            "ddp_find_unused_parameters": False,
            "dataloader_pin_memory": backbone.device.type == "cuda",
            "dataloader_drop_last": True,
        }
        if taken := sorted(options.keys() & self.trainer_arguments.keys()):
            raise ValueError(
                f"{type(self).__name__}.trainer_arguments: {taken[0]} is the stage's to set: use its fields"
            )
        return {**options, **self.trainer_arguments}


@dataclass(kw_only=True)
class PairStage(Stage):
    """A stage on sentence-transformers' trainer: columns of texts, and a loss of their embeddings.

    Args:
        max_length: tokens; longer texts are cut.
        group_by_length: batches of similar length, for padded execution.
    """

    max_length: int = 512
    group_by_length: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("max_length", self.max_length >= 1, "at least 1")

    @property
    def embeds_twice(self) -> bool:
        """As `Stage.embeds_twice`; not where a mini-batch holds a process's whole share of the batch."""
        share = self.batch_size // PartialState().num_processes
        return (self.mini_batch_size or share) < share

    @contextmanager
    def conditions(self, encoder: SentenceTransformer) -> Iterator[None]:
        """As `Stage.conditions`, with the length limit."""
        limit = encoder.max_seq_length
        encoder.max_seq_length = self.max_length if limit is None else min(limit, self.max_length)
        try:
            with super().conditions(encoder):
                yield
        finally:
            encoder.max_seq_length = limit

    def make_trainer(
        self, encoder: SentenceTransformer, dataset: Any, run: Path, loss: nn.Module | None, **arguments: Any
    ) -> StageTrainer:
        """As `Stage.make_trainer`; `arguments` are the Trainer's own."""
        backbone: Any = encoder[0].auto_model  # type: ignore[union-attr]
        options: dict[str, Any] = {
            "batch_sampler": LengthGrouped if self.group_by_length else BatchSamplers.BATCH_SAMPLER,
            **self.trainer_options(backbone, run),
            **arguments,
        }
        collator = options.pop("data_collator", None)
        args = SentenceTransformerTrainingArguments(**options)
        args._n_gpu = min(args.n_gpu, 1)
        return PairTrainer(model=encoder, args=args, train_dataset=dataset, loss=loss, data_collator=collator)


def trained_width(encoder: SentenceTransformer) -> int:
    """The dimension of the vectors that a stage sees: whole ones, whatever `truncate_dim` says."""
    with encoder.truncate_embeddings(None):
        return encoder.get_embedding_dimension() or 0


@dataclass(kw_only=True)
class InfoNCEStage(PairStage):
    """A stage whose loss is InfoNCE: the positive against negatives, mostly the batch's other texts.

    Args:
        temperature: divides cosine similarities.
        margin: drops negatives that score above the positive by more than this, as likely right answers
            (Qwen3-Embedding takes 0.1); by default none.
        symmetric: average with the loss of each positive against all anchors.
        matryoshka_dims: also train these prefixes of the vectors (arXiv 2205.13147), as 512 256 128 64.
        matryoshka_weights: of the prefixes' losses, in their order; 1 by default.
        mini_batch_num_tokens: with mini_batch_size, bounds a mini-batch of GradCache by its tokens instead.
        exchange: how processes exchange vectors; "ring" holds those of two at a time.
    """

    temperature: float = 0.05
    margin: float | None = None
    symmetric: bool = False
    matryoshka_dims: Sequence[int] = ()
    matryoshka_weights: Sequence[float] = ()
    mini_batch_num_tokens: int | None = None
    exchange: Literal["all_gather", "ring"] = "all_gather"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("temperature", self.temperature > 0, "above 0")
        self._require("matryoshka_dims", all(d >= 1 for d in self.matryoshka_dims), "at least 1 each")
        counts = (0, len(self.matryoshka_dims))
        self._require("matryoshka_weights", len(self.matryoshka_weights) in counts, f"{counts[1]} weights")
        cached = self.mini_batch_num_tokens is None or self.mini_batch_size is not None
        self._require("mini_batch_num_tokens", cached, "given with mini_batch_size")
        self._require("exchange", self.exchange in ("all_gather", "ring"), "all_gather or ring")

    @property
    def embeds_twice(self) -> bool:
        """As `PairStage.embeds_twice`, or where tokens bound a mini-batch."""
        return self.mini_batch_num_tokens is not None or super().embeds_twice

    def make_loss(self, encoder: SentenceTransformer, dataset: Any = None, **options: Any) -> nn.Module:
        """Return the loss of a batch's columns; `options` are further ones of `InfoNCELoss`."""
        width = trained_width(encoder)
        fits = max(self.matryoshka_dims, default=0) <= width
        self._require("matryoshka_dims", fits, f"at most the encoder's {width} dimensions")
        return InfoNCELoss(
            encoder,
            temperature=self.temperature,
            margin=self.margin,
            symmetric=self.symmetric,
            mini_batch_size=self.mini_batch_size if self.embeds_twice else None,
            mini_batch_num_tokens=self.mini_batch_num_tokens,
            matryoshka_dims=self.matryoshka_dims,
            matryoshka_weights=self.matryoshka_weights,
            exchange=self.exchange,
            **{"gather_across_devices": True, **options},
        )
