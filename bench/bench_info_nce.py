"""In-batch InfoNCE against plain torch, sentence-transformers and the GPU libraries: time and peak memory.

Forward and backward of normalised embeddings, after a correctness gate. Memory is beyond inputs and
gradients.
`python -m uncausal.bench.bench_info_nce [--full] [--device cuda] [--dry]`; `--full` adds the large batches.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uncausal.bench import measure
from uncausal.bench.measure import OURS, Contest, Settings, Unable, gather, load, resident_bytes
from uncausal.kernels import info_nce as info_nce_module
from uncausal.kernels.info_nce import info_nce

TEMPERATURE = 0.05
SHAPES = ((8192, 576), (32768, 256))  # the second with --full
BATCHES = (8192, 16384, 32768, 65536, 131072)
Provider = Callable[[Tensor, Tensor], Tensor]


def plain_torch(device: str) -> Provider:
    def loss(query: Tensor, key: Tensor) -> Tensor:
        # The temperature on the queries, not on the logits: the fastest way to write it.
        logits = (F.normalize(query, dim=-1) / TEMPERATURE) @ F.normalize(key, dim=-1).T
        return F.cross_entropy(logits, torch.arange(len(query), device=query.device))

    return loss


def uncausal(device: str) -> Provider:
    return functools.partial(info_nce, temperature=TEMPERATURE)


def sentence_transformers(device: str) -> Provider:
    losses = load("sentence_transformers.sentence_transformer.losses")
    only_the_loss: Any = torch.nn.Sequential(torch.nn.Identity())
    loss = losses.MultipleNegativesRankingLoss(only_the_loss, scale=1 / TEMPERATURE)
    return lambda q, k: loss.compute_loss_from_embeddings([q, k], torch.empty(0))


def sentence_transformers_cached(device: str) -> Provider:
    losses = load("sentence_transformers.sentence_transformer.losses")
    only_the_loss: Any = torch.nn.Sequential(torch.nn.Identity())
    options: Any = {"scale": 1 / TEMPERATURE, "mini_batch_size": 256}
    loss = losses.CachedMultipleNegativesRankingLoss(only_the_loss, **options)
    return lambda q, k: loss.calculate_loss([[q], [k]], with_backward=True)


def inf_cl(device: str) -> Provider:
    if device == "cpu":
        raise Unable("for a GPU")
    library = load("inf_cl")

    def loss(query: Tensor, key: Tensor) -> Tensor:
        scale = torch.tensor(1 / TEMPERATURE, device=query.device)
        return library.cal_inf_loss(F.normalize(query, dim=-1), F.normalize(key, dim=-1), scale=scale)

    return loss


def memeff(device: str) -> Provider:
    if device == "cpu":
        raise Unable("for a GPU")
    loss = load("memeff.infonce").InfoNCELoss(temperature=TEMPERATURE)
    return lambda q, k: loss(F.normalize(q, dim=-1), F.normalize(k, dim=-1))


PROVIDERS: dict[str, Callable[[str], Provider]] = {
    OURS: uncausal,
    "torch": plain_torch,
    "sentence-transformers": sentence_transformers,
    "sentence-transformers cached": sentence_transformers_cached,
    "inf-cl": inf_cl,
    "memeff": memeff,
}


def make(settings: Settings, batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """Embeddings whose positives are similar, as in training."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(batch, dim, generator=generator)
    query = torch.randn(batch, dim, generator=generator).add_(key)
    return tuple(x.to(settings.device, settings.dtype).requires_grad_() for x in (query, key))  # type: ignore[return-value]


def step(provider: Provider, query: Tensor, key: Tensor) -> float:
    query.grad = key.grad = None
    loss = provider(query, key)
    if loss.requires_grad:  # the cached loss has already gone backward
        loss.backward()
    return loss.item()


def _error(provider: Provider, settings: Settings) -> float:
    """Relative error of the query's gradient against float64; a wrong answer has no speed."""
    query, key = make(settings, 500, 64)
    wide_query, wide_key = (x.detach().double().requires_grad_() for x in (query, key))
    with mock.patch.object(info_nce_module, "_DENSE_LOGITS", 0):  # the form of large batches
        loss = step(provider, query, key)
    expected = step(plain_torch(settings.device), wide_query, wide_key)
    assert query.grad is not None and wide_query.grad is not None
    error = float((query.grad.double() - wide_query.grad).norm() / wide_query.grad.norm())
    bound = 1e-3 if settings.dtype == torch.float32 else 0.05  # GPU libraries multiply in TF32
    assert abs(loss - expected) < bound * expected and error < bound, f"loss {loss}, error {error:.3g}"
    return error


def by_batch(settings: Settings, batch: int, dim: int) -> Contest:
    """Forward and backward of one batch."""
    if settings.dry:
        batch, dim = 64, 32
    large = batch > 8192 and settings.device == "cpu"
    if large and not settings.full:
        pytest.skip("with --full")
    losses, missing = gather(PROVIDERS, settings.device)
    if large:
        slow = [name for name in losses if name.startswith("sentence")]
        missing |= dict.fromkeys(slow, "left out of the large batch")
        losses = {name: loss for name, loss in losses.items() if name not in slow}
    facts = {name: {"error": _error(loss, settings)} for name, loss in losses.items()}
    query, key = make(settings, batch, dim)
    runs = {
        name: functools.partial(lambda loss: (step(loss, query, key), None)[1], loss)
        for name, loss in losses.items()
    }
    flops = {"flops": 6.0 * batch * batch * dim}
    return Contest(runs, missing, flops, facts, rounds=2 if large else 3)


def by_memory(settings: Settings, batch: int) -> Contest:
    """Peak memory of a step, in a process of its own, so that nothing freed earlier is there to be reused."""
    if batch > 32768 and settings.device == "cpu" and not settings.full:
        pytest.skip("with --full")
    if settings.dry and batch != BATCHES[0]:
        pytest.skip("all sizes are one in a dry run")
    batch, dim = (64, 32) if settings.dry else (batch, 256)
    command = [sys.executable, "-m", "uncausal.bench.bench_info_nce", "--peak", str(batch), str(dim)]
    facts: dict[str, dict[str, Any]] = {}

    def run() -> None:
        done = subprocess.run([*command, settings.device], check=True, capture_output=True, text=True)
        extra = int(done.stdout.split()[-1])
        facts[OURS] = {"batch": batch, "peak_bytes": extra, "extra_mb": extra / 1e6}

    return Contest({OURS: run}, rounds=1, warm_up=False, derive=lambda times: facts)


class _SmallModel(torch.nn.Module):
    """A Llama of random weights with mean pooling: what surrounds the loss in training."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        sizes: Any = {
            "vocab_size": 1000,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
        }
        self.model = LlamaModel(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))

    def forward(self, features: dict) -> dict:
        states = self.model(features["input_ids"], attention_mask=features["attention_mask"])[0]
        return features | {"sentence_embedding": states.mean(1)}


def by_cache(settings: Settings) -> Contest:
    """Training steps of 64 pairs of 32 tokens on a small model: whole batches, and mini-batches of 16."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from uncausal.encoder.training.losses import InfoNCELoss

    torch.manual_seed(0)
    model = SentenceTransformer(modules=[_SmallModel()], device=settings.device).train()
    pairs, tokens = (4, 8) if settings.dry else (64, 32)
    ids = torch.randint(0, 1000, (2, pairs, tokens), device=settings.device)
    features = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    losses: dict[str, Any] = {
        OURS: InfoNCELoss(model),
        "uncausal cached": InfoNCELoss(model, mini_batch_size=pairs // 4),
        "sentence-transformers cached": CachedMultipleNegativesRankingLoss(model, mini_batch_size=pairs // 4),
    }

    def run(loss: Any) -> None:
        model.zero_grad()
        loss([dict(f) for f in features], None).backward()

    return Contest({name: functools.partial(run, loss) for name, loss in losses.items()}, rounds=5)


def peak(batch: int, dim: int, settings: Settings) -> int:
    """Peak memory of a step beyond the inputs and their gradients, in bytes."""
    provider = uncausal(settings.device)
    step(provider, *make(settings, 64, dim))  # libraries allocate their buffers
    query, key = make(settings, batch, dim)
    gradients = 2 * query.numel() * query.element_size()
    return resident_bytes(lambda: step(provider, query, key), settings.device) - gradients


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("batch, dim", SHAPES, ids=[f"B{b}-D{d}" for b, d in SHAPES])
def bench_by_batch(record, batch, dim, provider):
    record(by_batch, provider, batch, dim)


@pytest.mark.parametrize("provider", [OURS])
@pytest.mark.parametrize("batch", BATCHES)
def bench_memory(record, batch, provider):
    record(by_memory, provider, batch)


@pytest.mark.parametrize("provider", [OURS, "uncausal cached", "sentence-transformers cached"])
def bench_cached(record, provider):
    record(by_cache, provider)


if __name__ == "__main__":
    if "--peak" in sys.argv:
        count, width, where = sys.argv[2:]
        print(peak(int(count), int(width), Settings(where)))
    else:
        sys.exit(measure.main(__file__, sys.argv[1:]))
