"""The training stages as dataclasses: every hyperparameter is a field, and its default is LLM2Vec's value.

Sources: LLM2Vec (arXiv 2404.05961) and its published configurations; L3Prune (arXiv 2410.14578) where named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")


@dataclass(kw_only=True)
class Stage:
    """What all stages have in common; use `MNTP`, `SimCSE` or `Contrastive`.

    Args:
        steps, learning_rate, warmup_steps, schedule, weight_decay, max_grad_norm, seed: as in the Trainer.
        batch_size: per process.
        lora_r, lora_alpha, lora_dropout, lora_targets: the adapter; lora_r=0 trains all their weights.
        layers: decoder layers to train, from 0; all by default. The backward pass stops below the lowest.
        bf16: matrix products in bfloat16; "auto" where the hardware has it. Weights keep their dtype.
        gradient_checkpointing: keep no activations but one per layer.
        micro_batch: chunks or pairs in memory at once; the loss is that of the whole batch all the same, by
            accumulation in MNTP and by GradCache (arXiv 2101.06983) in the others. All of them by default.
        log_every, save_every, eval_every: steps; 0 never evaluates before the end.
    """

    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup_steps: int = 0
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: Sequence[str] = LORA_TARGETS
    layers: Sequence[int] | None = None
    bf16: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    micro_batch: int | None = None
    seed: int = 42
    log_every: int = 10
    save_every: int = 200
    eval_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "save_every"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "lora_r", "eval_every", "weight_decay"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("learning_rate", self.learning_rate > 0, "above 0")
        self._require("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        divides = self.micro_batch is None or (
            self.micro_batch > 0 and self.batch_size % self.micro_batch == 0
        )
        self._require("micro_batch", divides, f"a divisor of the batch size, {self.batch_size}")
        self._require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def name(self) -> str:
        return type(self).__name__.lower()


@dataclass(kw_only=True)
class MNTP(Stage):
    """Masked next token prediction: a masked token is predicted from the position before it.

    The defaults are those of S-LLaMA-1.3B, Llama-2-7B and Llama-3-8B; `MNTP.mistral()` has the other row.

    Args:
        chunk_tokens: texts are joined and cut into chunks of this length, without padding.
        mask_probability: that a token is chosen.
        mask_share, random_share: of the chosen tokens become the mask token, a random one; the rest stay.
        mask_token: by default the tokenizer's, or "_" where it has none.
        head: checkpoint with the language model's head, if the weights are not tied and the model was not
            loaded from it.
    """

    gradient_checkpointing: bool = True
    chunk_tokens: int = 512
    mask_probability: float = 0.2
    mask_share: float = 0.8
    random_share: float = 0.1
    mask_token: str | None = None
    head: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("chunk_tokens", self.chunk_tokens >= 2, "at least 2")
        self._require("mask_probability", 0 < self.mask_probability <= 1, "in (0, 1]")
        self._require("mask_share", 0 <= self.mask_share <= 1, "in [0, 1]")
        rest = 1 - self.mask_share
        self._require("random_share", 0 <= self.random_share <= rest + 1e-9, f"in [0, {rest:g}]")

    @classmethod
    def mistral(cls, **changes: Any) -> "MNTP":
        """The paper's setting for Mistral-7B: 80 % of the tokens chosen, all of them masked."""
        return cls(**{"mask_probability": 0.8, "mask_share": 1.0, "random_share": 0.0, **changes})


@dataclass(kw_only=True)
class SimCSE(Stage):
    """Unsupervised contrastive learning: the same sentence twice, under two draws of attention dropout.

    Args:
        max_length: tokens; longer sentences are cut.
        scale: cosine similarities are multiplied by it, the inverse of the temperature.
        attention_dropout: on the attention probabilities, for this stage alone.
        group_by_length: batches of similar length, for padded execution.
    """

    batch_size: int = 128
    learning_rate: float = 3e-5
    max_length: int = 128
    scale: float = 20.0
    attention_dropout: float = 0.3
    group_by_length: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("max_length", self.max_length >= 1, "at least 1")
        self._require("scale", self.scale > 0, "above 0")
        self._require("attention_dropout", 0 <= self.attention_dropout < 1, "in [0, 1)")


@dataclass(kw_only=True)
class Contrastive(Stage):
    """Supervised contrastive learning on pairs, or triplets with a hard negative, and in-batch negatives.

    Args:
        max_length, scale, group_by_length: as in `SimCSE`.
        no_duplicates: no text occurs twice in a batch, where it would be its own negative.
        prompts: column name -> text put before each of its texts; attended, not pooled.
    """

    batch_size: int = 512
    learning_rate: float = 2e-4
    warmup_steps: int = 300
    max_length: int = 512
    scale: float = 50.0
    group_by_length: bool = False
    no_duplicates: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("max_length", self.max_length >= 1, "at least 1")
        self._require("scale", self.scale > 0, "above 0")
        both = self.no_duplicates and self.group_by_length
        self._require("no_duplicates", not both, "off with group_by_length")

    @classmethod
    def l3prune(cls, **changes: Any) -> "Contrastive":
        """The setting of L3Prune (arXiv 2410.14578), which differs in the batch."""
        return cls(**{"batch_size": 64, **changes})


STAGES: dict[str, type[Stage]] = {"mntp": MNTP, "simcse": SimCSE, "contrastive": Contrastive}
