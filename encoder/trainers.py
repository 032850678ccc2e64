"""The two Trainers behind `train`: masked next tokens on the library's, pairs on sentence-transformers'.

Both save only what is trained, swap checkpoints in whole, count real tokens and stop on a loss that is not
finite.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from uncausal.encoder import attention as packed_attention
from uncausal.encoder.adapters import load_trainable, save_trainable
from uncausal.encoder.losses import masked_next_token_loss
from uncausal.encoder.runs import checkpoints

KEPT_CHECKPOINTS = 2


class StageTrainer(Trainer):
    """A Trainer whose checkpoints hold the trained tensors alone and appear whole or not at all."""

    adapter: PeftModel | None = None
    trained: nn.Module  # the module whose trained tensors are saved
    tokens = 0
    _since: tuple[int, float] | None = None
    _staging: Path | None = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._since is None:
            self._since = (self.tokens, time.perf_counter())
        self.tokens += count_tokens(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower the learning rate"
                )
            if self._since is not None:
                tokens, start = self._since
                logs["tokens_per_second"] = (self.tokens - tokens) / (time.perf_counter() - start)
                self._since = None
        super().log(logs, *args, **kwargs)

    def leave_out(self, seconds: float) -> None:
        """Take time that was no training out of the throughput."""
        if self._since is not None:
            tokens, start = self._since
            self._since = (tokens, start + seconds)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_trainable(self.trained, self.adapter, Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trainable(self.trained, self.adapter, Path(resume_from_checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(str(self.args.output_dir))
        # One name for all processes of the run, each of which writes its random state there.
        self._staging = run / f".saving-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                name = f"checkpoint-{self.state.global_step}"
                shutil.rmtree(run / name, ignore_errors=True)
                (self._staging / name).rename(run / name)
                for old in checkpoints(run)[:-KEPT_CHECKPOINTS]:
                    shutil.rmtree(old, ignore_errors=True)
        except (OSError, RuntimeError, SafetensorError) as error:
            kept = [str(path) for path in checkpoints(run)[-1:]] or ["there is none yet"]
            raise OSError(
                f"could not write a checkpoint in {run} ({error}). Make room and run the same again: it goes "
                f"on from the last whole checkpoint ({kept[0]})."
            ) from error
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None


def count_tokens(inputs: dict[str, Any]) -> int:
    """Real tokens of a batch: what the masks admit, or every id where no mask stands beside the ids."""
    total = 0
    for name, value in inputs.items():
        if name.endswith("input_ids"):
            mask = inputs.get(name.removesuffix("input_ids") + "attention_mask")
            total += int(mask.sum()) if mask is not None else value.numel()
    return total


@contextmanager
def autocast_forward(backbone: Any, enabled: bool) -> Iterator[None]:
    """Run the backbone's matrix products in bfloat16 for a while; pooling and loss stay in float32."""
    if not enabled:
        yield
        return
    original, attend = backbone.forward, packed_attention.uncausal_attention
    device = next(backbone.parameters()).device.type

    def attend_in_bf16(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        # Rotary embedding leaves queries and keys in float32; torch casts other attentions itself. Inside,
        # autocast would take the softmax out of the float32 that the operator asks for.
        with torch.autocast(device, enabled=False):
            return attend(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), *args, **kwargs)

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return original(*args, **kwargs)

    backbone.forward = forward
    ALL_ATTENTION_FUNCTIONS[packed_attention.NAME] = attend_in_bf16
    try:
        yield
    finally:
        del backbone.forward
        del ALL_ATTENTION_FUNCTIONS[packed_attention.NAME]  # uncovers the registered function


class MaskedNextToken(nn.Module):
    """The headless backbone, the frozen head beside it, and the loss of the masked tokens.

    Args:
        backbone: headless Hugging Face model.
        head: (V, d) weight of the language model's head. Not trained, not registered: a tied head is the
            backbone's own embedding.
        bias: (V,) or None.
    """

    def __init__(self, backbone: Any, head: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.backbone = backbone
        self._head = (head.detach(), bias)
        config = backbone.config
        self.logit_scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return {"loss": mean} of masked input_ids (B, L); labels (B, L) hold the true ids, or -100."""
        rows, length = input_ids.shape
        kwargs: dict[str, Any] = {"input_ids": input_ids}
        if self.backbone.config._attn_implementation == packed_attention.NAME:
            device = input_ids.device
            ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
            kwargs = {
                "input_ids": input_ids.reshape(1, -1),
                "position_ids": torch.arange(length, device=device).repeat(rows)[None],
                "cu_seq_lens_q": ends,
                "cu_seq_lens_k": ends,
                "max_length_q": length,
                "max_length_k": length,
            }
        hidden = self.backbone(**kwargs, use_cache=False).last_hidden_state.view(rows, length, -1)
        weight, bias = self._head
        loss = masked_next_token_loss(
            hidden.to(weight.dtype),
            labels,
            weight,
            lm_head_bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )
        return {"loss": loss}


class MaskedTrainer(StageTrainer):
    """Trains a `MaskedNextToken`; the mask is drawn in the step, when a resumed run has its random state."""

    mask: dict[str, Any]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        masked, labels = mask_tokens(inputs["input_ids"], **self.mask)
        return super().compute_loss(
            model, {"input_ids": masked, "labels": labels}, return_outputs=return_outputs, **kwargs
        )


def mask_tokens(
    input_ids: Tensor,
    *,
    probability: float,
    mask_share: float,
    random_share: float,
    mask_id: int,
    vocab_size: int,
    special_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose tokens and replace them (LLM2Vec, section 2.2; shares as in BERT).

    Args:
        input_ids: (B, L) int64.
        probability: that a token is chosen. The first of a row never is: nothing before it could predict it.
        mask_share, random_share: of the chosen tokens become the mask, a random token; the rest stay.
        special_ids: ids that are never chosen.

    Returns:
        input_ids: (B, L) with replacements. labels: (B, L) the true id of the chosen tokens, -100 elsewhere.
    """
    eligible = ~torch.isin(input_ids, special_ids)
    eligible[:, 0] = False
    chosen = (torch.rand(input_ids.shape, device=input_ids.device) < probability) & eligible
    if not chosen.any():  # a mean over no token is no number
        first = eligible.flatten().nonzero()[:1]
        chosen.view(-1)[first] = True
    fate = torch.rand(input_ids.shape, device=input_ids.device)
    random = torch.randint(vocab_size, input_ids.shape, device=input_ids.device, dtype=input_ids.dtype)
    replacement = torch.where(
        fate < mask_share, mask_id, torch.where(fate < mask_share + random_share, random, input_ids)
    )
    return torch.where(chosen, replacement, input_ids), input_ids.masked_fill(~chosen, -100)


class Chunks(Dataset):
    """Rows of a (n, L) tensor, a batch of which is fetched at once."""

    def __init__(self, chunks: Tensor):
        self.chunks = chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Tensor:
        return self.chunks[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.chunks[indices]


def stack_chunks(rows: Tensor) -> dict[str, Tensor]:
    """The collator of `Chunks`."""
    return {"input_ids": rows.long()}


class Evaluate(TrainerCallback):
    """Evaluates during training, without touching its random state or its throughput."""

    def __init__(self, trainer: StageTrainer, encoder: Any, function: Callable[[Any], Any], every: int):
        self.trainer, self.encoder, self.function, self.every = trainer, encoder, function, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every or state.global_step >= state.max_steps:
            return
        started = time.perf_counter()
        self.encoder.eval()
        with torch.random.fork_rng():
            metrics = self.function(self.encoder)
        self.encoder.train()
        self.trainer.leave_out(time.perf_counter() - started)
        should_log = control.should_log
        self.trainer.log({f"eval_{name}": float(value) for name, value in metrics.items()})
        control.should_log = should_log  # logging clears it, and this step may have a loss to log


class PairTrainer(StageTrainer, SentenceTransformerTrainer):  # type: ignore[misc]
    """sentence-transformers' trainer with this package's checkpoints."""


class TwinCollator(SentenceTransformerDataCollator):
    """SimCSE's pairs: each sentence tokenised once and used as anchor and as positive."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.preprocess_fn([row["text"] for row in features])
        return {f"{side}_{key}": value for side in ("anchor", "positive") for key, value in batch.items()}


class LengthGrouped(DefaultBatchSampler):
    """Batches of texts of similar length, in random order: less padding where batches are padded."""

    WINDOW = 50  # batches sorted together

    def __init__(self, dataset: Any, batch_size: int, drop_last: bool, **kwargs: Any):
        super().__init__(dataset, batch_size=batch_size, drop_last=drop_last, **kwargs)
        columns = [dataset[name] for name in dataset.column_names if isinstance(dataset[0][name], str)]
        self.lengths = [sum(map(len, row)) for row in zip(*columns, strict=True)]

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        if self.generator is not None:
            self.generator.manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=self.generator).tolist()
        size, batches = self.batch_size, []
        for start in range(0, len(order), self.WINDOW * size):
            window = sorted(order[start : start + self.WINDOW * size], key=self.lengths.__getitem__)
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == size]
        for index in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[index]
