"""From texts to model features: tokens laid end to end without padding, or padded as the library does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.modules import Transformer

from uncausal.encoder import attention as packed_attention
from uncausal.encoder.linear import use_onednn


class PackedTransformer(Transformer):
    """sentence-transformers' Transformer whose text batches run as one row of T tokens without padding.

    It packs whenever the backbone uses this package's attention; with any other attention it is the library's
    module unchanged. It is saved under the library's name, so that a saved encoder needs nothing from here.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        use_onednn(self.model)

    def _can_flatten_inputs(self) -> bool:
        return (
            self.backend == "torch"
            and self.model.config._attn_implementation == packed_attention.NAME
            and list(self.modality_config) == ["text"]
        )

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Tokenise texts into model features: packed (1, T) with `cu_seq_lens_q`, or padded (B, L).

        Raises:
            ValueError: a text is empty, or nothing is left to pool once the prompt is excluded.
        """
        if not all(isinstance(text, str) for text in inputs):
            return super().preprocess(inputs, prompt=prompt, **kwargs)
        if not self.can_flatten_inputs or kwargs.get("processing_kwargs"):
            check_not_empty(inputs)
            return super().preprocess(inputs, prompt=prompt, **kwargs)
        ids, _ = self.tokenize_texts(inputs, prompt, kwargs.get("max_length"))
        return self.collate(ids, self._get_prompt_length(prompt) if prompt else None)

    def tokenize_texts(
        self, texts: Sequence[str], prompt: str | None = None, max_length: int | None = None
    ) -> tuple[list[list[int]], int]:
        """Return the token ids of every text, cut to the length limit, and how many texts were cut."""
        check_not_empty(texts)
        assert self.tokenizer is not None
        prompted = [prompt + text for text in texts] if prompt else list(texts)
        limit = max_length or self.max_seq_length or sys.maxsize
        options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False}
        ids = self.tokenizer(prompted, truncation=True, max_length=limit, **options)["input_ids"]
        at_limit = [text for text, tokens in zip(prompted, ids, strict=True) if len(tokens) == limit]
        full = self.tokenizer(at_limit, verbose=False, **options)["input_ids"] if at_limit else []
        prompt_length = (self._get_prompt_length(prompt) or 0) if prompt else 0
        for text, tokens in zip(texts, ids, strict=True):
            if len(tokens) <= prompt_length:
                raise ValueError(
                    f"no token of {text!r} is left to pool: {len(tokens)} tokens, {prompt_length} of them "
                    f"the prompt's, limit {limit}. Raise max_seq_length or shorten the prompt."
                )
        return ids, sum(len(tokens) > limit for tokens in full)

    def collate(self, ids: Sequence[Sequence[int]], prompt_length: int | None = None) -> dict[str, Any]:
        """Lay B token lists end to end: `input_ids` and `position_ids` (1, T), `cu_seq_lens_q` (B + 1,)."""
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        ends = lengths.cumsum()
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        cu_seqlens = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in ids]))[
                None
            ],
            "position_ids": torch.from_numpy(positions)[None],
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
            "modality": "text",
        }
        if prompt_length is not None:
            features["prompt_length"] = prompt_length
        return features


def check_not_empty(texts: Sequence[str]) -> None:
    """Raise ValueError naming the first text that has nothing to encode."""
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(
                f"text {index} is empty ({text!r}): there is no token to pool; remove it or fill it in"
            )
