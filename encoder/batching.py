"""Batches of at most so many tokens, longest texts first, and the loop that encodes them.

`iter_encode` is what `Encoder.encode`, corpus encoding, the index and the server have in common.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor

from uncausal.encoder.elementwise import alone_beyond
from uncausal.encoder.inputs import Prompt, TokenizedTexts, check_not_empty, check_unicode

WINDOW = 8192  # texts tokenised ahead of the model


class EncodedBatch(NamedTuple):
    """One batch that left the model.

    Attributes:
        indices: of its texts in the list that was given.
        vectors: (len(indices), d), on the model's device.
        token_counts: of its texts, after truncation.
        num_truncated: texts of the window that were cut to the length limit; told with its first batch.
    """

    indices: list[int]
    vectors: Tensor
    token_counts: list[int]
    num_truncated: int = 0


def check_packed(encoder: Any) -> None:
    """Raise ValueError for an encoder whose batches are padded."""
    if not getattr(encoder, "packed", False):
        raise ValueError(
            "batches without padding need the packed attention: load the model with attention='auto'; one "
            "that has no packed form is encoded whole, by encode() or into a .npy or .parquet file"
        )


@torch.inference_mode()
def iter_encode(
    encoder: SentenceTransformer,
    texts: Sequence[str],
    *,
    prompt: Prompt | None = None,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    device: torch.device | None = None,
) -> Iterator[EncodedBatch]:
    """Encode texts batch by batch, without padding; the next window is tokenised meanwhile.

    Args:
        encoder: an `Encoder` that is packed.
        texts: any number of texts; none may be empty.
        prompt: put before every text, or one for each; attended, not pooled.
        batch_tokens: tokens a batch at most (a longer text stands alone); 1024 by default on a CPU, 16384
            elsewhere.
        batch_size: texts a batch at most; no limit by default.
        device: where the model is; its own by default.

    Raises:
        ValueError: naming the text that is empty or not Unicode, before anything is encoded; or
            `batch_tokens` is not positive, or the encoder is not packed: its texts would see one another.
    """
    check_packed(encoder)
    check_not_empty(texts)
    check_unicode(texts)
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    transformer: Any = encoder[0]
    device = device or encoder.device
    budget = batch_tokens or (1024 if device.type == "cpu" else 16384)
    alone = alone_beyond(transformer.model.config)
    windows = [slice(start, start + WINDOW) for start in range(0, len(texts), WINDOW)]

    def tokenize(window: slice) -> TokenizedTexts:
        own = prompt if prompt is None or isinstance(prompt, str) else prompt[window]
        return transformer.tokenize_texts(texts[window], own)

    encoder.eval()
    with ThreadPoolExecutor(max_workers=1) as ahead:
        pending = [ahead.submit(tokenize, window) for window in windows[:1]]
        for number in range(len(windows)):
            ids, skipped, cut = pending.pop().result()
            pending += [ahead.submit(tokenize, window) for window in windows[number + 1 :][:1]]
            for batch in token_batches([len(row) for row in ids], budget, batch_size, alone):
                prompts = None if skipped is None else [skipped[i] for i in batch]
                features = transformer.collate([ids[i] for i in batch], prompts)
                vectors = encoder(batch_to_device(features, device))["sentence_embedding"]
                indices, counts = [number * WINDOW + i for i in batch], [len(ids[i]) for i in batch]
                yield EncodedBatch(indices, vectors, counts, cut)
                cut = 0


def token_batches(
    lengths: Sequence[int], budget: int, size: int | None = None, alone: int | None = None
) -> list[list[int]]:
    """Group indices, longest first, into batches of at most `budget` tokens and `size` texts.

    A text longer than the budget, or than `alone`, stands alone.
    """
    batches: list[list[int]] = []
    room = -1
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        apart = batches and alone is not None and lengths[batches[-1][0]] > alone
        if apart or lengths[index] > room or len(batches[-1]) == size:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def release_memory() -> None:
    """Give what glibc holds of freed memory back to the system.

    Batches of ever other shapes leave a heap of holes that grew from 7 to 14 GB in 400 steps on a CPU.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
