"""Texts: read from any source, split into sentences, joined and cut into chunks."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uncausal.encoder.data.rows import DataError, is_plain, read_rows, text_field


def read_texts(
    source: str | Path, column: str = "text", *, limit: int | None = None, skip_empty: bool = True
) -> Iterator[str]:
    """Read texts one at a time.

    Args:
        source: a file, a dataset's name, or "-" for stdin (text, or JSONL if the first line starts with "{").
        column: the field that holds the text, where the format has fields.
        limit: stop after so many texts.
        skip_empty: leave out blank lines and rows whose field is blank, or refuse them.

    Returns:
        The texts, in order.

    Raises:
        FileNotFoundError: no such file.
        DataError: not UTF-8, a malformed line, a missing or refused field; the message has the line number.
    """
    count = 0
    for where, row in read_rows(source):
        if limit is not None and count >= limit:
            return
        text = text_field(row, "text" if is_plain(row) else column, where)
        if text.strip():
            count += 1
            yield text
        elif not skip_empty:
            raise DataError(
                f"{where}: the text is empty, and there is no vector of nothing; leave the row out"
            )


def chunk_texts(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    *,
    limit: int | None = None,
    seed: int = 0,
    special_tokens: bool = True,
) -> Tensor:
    """Join tokenised texts and cut them into chunks without padding, for MNTP.

    Args:
        texts: any number of texts; a list is shuffled, a stream is taken in its order.
        tokenizer: of the model.
        length: tokens per chunk. The remainder at the end is dropped.
        limit: stop tokenising at so many chunks.
        seed: of the shuffle.
        special_tokens: what the tokenizer puts around a text is put around every one.

    Returns:
        (n, length) int32.

    Raises:
        DataError: the texts together are shorter than one chunk.
    """
    stream = iter(texts)
    if isinstance(texts, Sequence):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        stream = (str(texts[index]) for index in order)
    wanted, found = math.inf if limit is None else limit * length, 0
    pieces: list[np.ndarray] = []
    while found < wanted and (batch := list(islice(stream, 256))):
        options = {"verbose": False, "return_attention_mask": False, "add_special_tokens": special_tokens}
        for ids in tokenizer(batch, **options)["input_ids"]:
            pieces.append(np.asarray(ids, dtype=np.int32))
            found += len(ids)
    if found < length:
        raise DataError(
            f"the text holds {found} tokens, less than one chunk of {length}: add text or cut shorter"
        )
    joined = torch.from_numpy(np.concatenate(pieces))
    return joined[: found - found % length].view(-1, length)[:limit]


def sentences(text: str, *, min_words: int = 1, max_words: int | None = None) -> Iterator[str]:
    """Split English prose into sentences: at . ! ? before a capital, a digit or a quote, and at line breaks.

    A full stop after an initial or a common abbreviation ends nothing.

    Args:
        text: any text.
        min_words: shorter sentences are left out.
        max_words: longer sentences are left out.
    """
    for line in text.splitlines():
        start = 0
        for match in _BOUNDARY.finditer(line):
            before = line[start : match.start(1)].rsplit(None, 1)[-1:]
            if match[1] == "." and before and _ABBREVIATION.fullmatch(before[0]):
                continue
            yield from _wanted(line[start : match.end(1)], min_words, max_words)
            start = match.end()
        yield from _wanted(line[start:], min_words, max_words)


_BOUNDARY = re.compile(r"([.!?]['\")\]]*)\s+(?=['\"(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(
    r"['\"(\[]*(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Mt|Gen|Col|Lt|Capt|Sgt|Rev|Hon|Gov|Sen|Rep"
    r"|vs|etc|cf|ca|approx|No|Nos|Vol|pp|ed|eds|Fig|Inc|Ltd|Co|Corp|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec)"
)


def _wanted(sentence: str, min_words: int, max_words: int | None) -> Iterator[str]:
    sentence = sentence.strip()
    words = len(sentence.split())
    if words >= max(min_words, 1) and (max_words is None or words <= max_words):
        yield sentence
