"""Masked next token prediction: a masked token is predicted from the position before it (LLM2Vec, 2.2)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import TrainingArguments, default_data_collator

from uncausal.encoder import attention as packed_attention
from uncausal.encoder.data.texts import chunk_texts, read_texts
from uncausal.encoder.training.lm_head import find_head
from uncausal.encoder.training.losses import masked_next_token_loss
from uncausal.encoder.training.masking import mask_tokens
from uncausal.encoder.training.stages.base import Stage
from uncausal.encoder.training.trainer import StageTrainer
from uncausal.kernels.packing import PackedLayout


@dataclass(kw_only=True)
class MNTP(Stage):
    """Masked next token prediction on running text.

    The defaults are those of S-LLaMA-1.3B, Llama-2-7B and Llama-3-8B; `MNTP.mistral()` has the other row.

    Args:
        chunk_tokens: texts are joined and cut into chunks of this length, without padding.
        mask_probability: that a token is chosen.
        mask_share: of the chosen tokens become the mask token.
        random_share: of the chosen tokens become a random one; the rest stay.
        mask_token: by default the tokenizer's, or "_" where it has none.
        head: checkpoint with the language model's head, if the weights are not tied and the model was not
            loaded from it.
        lens_steps: for a pruned model, whose last layer the head was not made for: batches on which a linear
            map between the two is tuned first, alone (tuned lens, arXiv 2303.08112). It is not saved.
    """

    gradient_checkpointing: bool = True
    chunk_tokens: int = 512
    mask_probability: float = 0.2
    mask_share: float = 0.8
    random_share: float = 0.1
    mask_token: str | None = None
    head: str | None = None
    lens_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("chunk_tokens", self.chunk_tokens >= 2, "at least 2")
        self._require("lens_steps", self.lens_steps >= 0, "at least 0")
        self._require("mask_probability", 0 < self.mask_probability <= 1, "in (0, 1]")
        self._require("mask_share", 0 <= self.mask_share <= 1, "in [0, 1]")
        rest = 1 - self.mask_share
        self._require("random_share", 0 <= self.random_share <= rest + 1e-9, f"in [0, {rest:g}]")

    @classmethod
    def mistral(cls, **changes: Any) -> "MNTP":
        """The paper's setting for Mistral-7B: 80 % of the tokens chosen, all of them masked."""
        return cls(**{"mask_probability": 0.8, "mask_share": 1.0, "random_share": 0.0, **changes})

    trains_pooling: ClassVar[bool] = False

    def prepare(self, encoder: SentenceTransformer, data: Any, loss: nn.Module | None = None) -> Tensor:
        """Chunks (n, chunk_tokens) int32 of shuffled texts, or of those of a source for `read_texts`."""
        texts = list(read_texts(data) if isinstance(data, str | Path) else data)
        limit = self.max_steps * self.batch_size
        chunks = chunk_texts(
            texts,
            encoder.tokenizer,
            self.chunk_tokens,
            limit=limit,
            seed=self.seed,
            # a template is for what is encoded: running text is no user's message
            special_tokens=getattr(encoder[0], "template", None) is None,
        )
        self.check_size(f"the text holds, cut in chunks of {self.chunk_tokens} tokens,", len(chunks))
        return chunks

    def make_trainer(
        self, encoder: SentenceTransformer, dataset: Any, run: Path, loss: nn.Module | None
    ) -> StageTrainer:
        backbone: Any = encoder[0].auto_model  # type: ignore[union-attr]
        options = self.trainer_options(backbone, run, self.mini_batch_size)
        args = TrainingArguments(**options, remove_unused_columns=False)
        args._n_gpu = min(args.n_gpu, 1)
        spec = getattr(encoder, "spec", None)
        weight, bias = find_head(backbone, self.head, spec.hub if spec else None)
        if self.in_bf16(backbone):  # once, and not at every step by autocast: the head is frozen
            weight, bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
        mask = self.mask_settings(encoder.tokenizer, backbone)
        masked = MaskedChunks(dataset, self.max_steps * self.batch_size, self.seed, mask)
        model = MaskedNextToken(backbone, weight, bias)
        if self.lens_steps:
            rows = MaskedChunks(dataset, self.lens_steps * self.batch_size, self.seed + 1, mask)
            # on the device that the Trainer will move them to
            model.to(args.device).tune_lens(rows, self.batch_size, self.mini_batch_size)
        return MaskedTrainer(model, args, default_data_collator, cast(Any, masked))

    def mask_settings(self, tokenizer: Any, backbone: Any) -> dict[str, Any]:
        """The arguments of `mask_tokens` but for the tokens themselves."""
        token = self.mask_token or tokenizer.mask_token or "_"
        mask_id = tokenizer.convert_tokens_to_ids(token)
        if mask_id is None or mask_id == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no token {token!r} to mask with: choose MNTP(mask_token=...)"
            )
        vocab_size = min(len(tokenizer), backbone.config.get_text_config().vocab_size)
        return {
            "probability": self.mask_probability,
            "mask_share": self.mask_share,
            "random_share": self.random_share,
            "mask_id": mask_id,
            "vocab_size": vocab_size,
            "special_ids": torch.tensor(sorted(set(tokenizer.all_special_ids) - {mask_id})),
        }


class MaskedNextToken(nn.Module):
    """The headless backbone, the frozen head beside it, and the loss of the masked tokens.

    Args:
        backbone: headless Hugging Face model.
        head: (V, d) weight of the language model's head. Not trained, not registered: a tied head is the
            backbone's own embedding.
        bias: (V,) or None.
    """

    accepts_loss_kwargs = True  # the Trainer then counts `num_items_in_batch`

    def __init__(self, backbone: Any, head: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.backbone = backbone
        self._head = (head.detach(), bias)
        config = backbone.config
        self.logit_scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.lens: nn.Linear | None = None

    def tune_lens(self, rows: "MaskedChunks", batch_size: int, mini_batch_size: int | None = None) -> None:
        """Learn a map (d, d) of the last hidden states by which the head predicts best; it stays as it is.

        What is learnt depends on the model and the rows alone: a resumed run, or another process, learns the
        same.

        Args:
            rows: what to learn on, a batch after the other.
            batch_size: rows a step.
            mini_batch_size: of them in memory at a time; by default all.
        """
        width = self._head[0].shape[1]
        self.lens = lens = nn.Linear(width, width, device=self._head[0].device)
        nn.init.eye_(lens.weight)
        nn.init.zeros_(lens.bias)
        optimizer = torch.optim.AdamW(lens.parameters(), 1e-3, weight_decay=0.0)
        training = self.backbone.training
        self.backbone.eval()
        for first in range(0, len(rows), batch_size):
            batch = default_data_collator([rows[i] for i in range(first, first + batch_size)])
            batch = {name: value.to(lens.weight.device) for name, value in batch.items()}
            masked = (batch["labels"][:, 1:] != -100).sum()
            parts = (value.split(mini_batch_size or batch_size) for value in batch.values())
            for part in map(dict, (zip(batch, values, strict=True) for values in zip(*parts, strict=True))):
                with torch.no_grad():
                    hidden = self.hidden_states(part["input_ids"])
                self.loss(hidden, part["labels"], masked).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.backbone.train(training)
        lens.requires_grad_(False)

    def forward(
        self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {"loss": mean} of masked input_ids (B, L); labels (B, L) hold the true ids, or -100.

        The Trainer counts the masked tokens of the whole batch, over its micro-batches and processes, in
        `num_items_in_batch`; the sum of the losses is then divided by that.
        """
        return {"loss": self.loss(self.hidden_states(input_ids), labels, num_items_in_batch)}

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """The backbone's last hidden states (B, L, d)."""
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
                "layout": PackedLayout.from_shape(rows, length, device),
            }
        return self.backbone(**kwargs, use_cache=False).last_hidden_state.view(rows, length, -1)

    def loss(self, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        """The mean loss of what is masked, from the hidden states (B, L, d)."""
        weight, bias = self._head
        if self.lens is not None:
            hidden = self.lens(hidden.to(self.lens.weight.dtype))
        return masked_next_token_loss(
            hidden.to(weight.dtype),
            labels,
            weight,
            lm_head_bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            num_items=num_items_in_batch,
        )


class MaskedTrainer(StageTrainer):
    """Trains a `MaskedNextToken` on `MaskedChunks`, in their order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        rows: Any = train_dataset or self.train_dataset
        return SequentialSampler(rows)


class MaskedChunks(Dataset):
    """All rows of a run, in order, masked: row i is the same in any process, micro-batch or resumed run.

    Args:
        chunks: (n, L) token ids; taken pass after pass, each shuffled.
        rows: of the run.
        seed: of order and masks.
        mask: the arguments of `mask_tokens` but for tokens and generator.
    """

    def __init__(self, chunks: Tensor, rows: int, seed: int, mask: dict[str, Any]):
        self.chunks, self.rows, self.seed, self.mask = chunks, rows, seed, mask
        self._order: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        number, place = divmod(row, len(self.chunks))
        if self._order[0] != number:
            self._order = number, np.random.default_rng((self.seed, number)).permutation(len(self.chunks))
        chunk = self.chunks[int(self._order[1][place])].long()
        # numpy mixes the two numbers; torch's generator takes the lowest 32 bits of one.
        (state,) = np.random.SeedSequence((self.seed, row)).generate_state(1).tolist()
        generator = torch.Generator().manual_seed(state)
        masked, labels = mask_tokens(chunk[None], **self.mask, generator=generator)
        return {"input_ids": masked[0], "labels": labels[0]}
