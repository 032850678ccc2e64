"""Latent attention pooling against the eager layer: arithmetic, wall time and peak memory.

The peer is the released layer as its equations stand, with torch's fused attention; both work on packed
tokens, so the peer does not pay for padding. On a CPU d 1024 and 2,048 tokens in 32 sequences, fp32; on a GPU
d 4096 and 16,384 tokens, bf16. `python -m uncausal.bench.bench_latent_pooling [--device cuda] [--dry]`;
`--break-even` times folding around the token count where the layer's own rule changes its mind.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from uncausal.bench import measure
from uncausal.bench.measure import OURS, Contest, Settings, allocated_bytes
from uncausal.kernels.cpu.latent_pooling_torch import sequence_ids
from uncausal.kernels.latent_pooling import LatentAttentionPooling, latent_attention_pool

SIZES = {"cpu": (1024, 512, 8, 2048, 32), "cuda": (4096, 512, 8, 16384, 128), "dry": (64, 16, 2, 64, 4)}


def eager(layer: LatentAttentionPooling, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The released form on a layer's own parameters: nothing folded, every token through both linear
    layers."""
    attend, mlp = layer.cross_attend_blocks
    fn, net = attend["fn"], mlp["fn"]["net"]
    query = fn["to_q"](attend["norm"](hidden_states))
    key, value = fn["to_kv"](attend["norm_context"](layer.latents)).chunk(2, dim=1)
    heads = (t.unflatten(1, (layer.num_heads, -1)).transpose(0, 1)[None] for t in (query, key, value))
    out = F.scaled_dot_product_attention(*heads)[0].transpose(0, 1).flatten(1)
    x = fn["to_out"](out) + hidden_states
    content, gate = net[0](mlp["norm"](x)).chunk(2, dim=1)
    x = net[2](content * F.gelu(gate)) + x
    batch = len(cu_seqlens) - 1
    total = x.new_zeros(batch, x.shape[1]).index_add(0, sequence_ids(cu_seqlens, len(x)), x)
    return total / cu_seqlens.diff()[:, None]


def folded(layer: LatentAttentionPooling, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
    return layer(hidden_states, cu_seqlens)


PROVIDERS = {OURS: folded, "eager": eager}


def make_layer(settings: Settings, tokens: int | None = None) -> tuple[Any, Tensor, Tensor]:
    size, latents, heads, count, sequences = SIZES["dry" if settings.dry else settings.device]
    torch.manual_seed(0)
    layer = LatentAttentionPooling(size, latents, heads).to(settings.device, settings.dtype)
    hidden = torch.randn(tokens or count, size, device=settings.device, dtype=settings.dtype)
    cuts = torch.linspace(0, count, sequences + 1).round().to(settings.device, torch.int32)
    return layer, hidden, cuts


def inference(provider: Any, layer: LatentAttentionPooling, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    with torch.no_grad():
        return provider(layer, hidden, cu_seqlens)


def training(provider: Any, layer: LatentAttentionPooling, hidden: Tensor, cu_seqlens: Tensor) -> None:
    layer.zero_grad(set_to_none=False)  # gradients stay allocated: they are nobody's working memory
    provider(layer, hidden.detach().requires_grad_(), cu_seqlens).square().sum().backward()


def contest(settings: Settings, train: bool) -> Contest:
    """The released form at the bench's size, after a check that both layers say the same."""
    layer, hidden, cu_seqlens = make_layer(settings)
    want, got = (inference(p, layer, hidden, cu_seqlens).double() for p in PROVIDERS.values())
    error = float((want - got).abs().max())
    assert error < (1e-4 if settings.dtype == torch.float32 else 0.1), f"providers differ by {error:.3g}"
    layer.train(train)
    step = training if train else inference
    step(eager, layer, hidden, cu_seqlens)  # allocates the gradients
    runs = {name: functools.partial(step, p, layer, hidden, cu_seqlens) for name, p in PROVIDERS.items()}
    facts = {name: {"flops_per_token": count} for name, count in flops(4096, 512, 8).items()}
    facts[OURS]["error"] = error
    tokens = {"tokens": float(len(hidden))}
    return Contest(runs, {}, tokens, facts, rounds=5, peak=allocated_bytes)


def flops(hidden_size: int, latents: int, heads: int) -> dict[str, float]:
    """FLOPs a token of the two forward passes, on fake tensors; the eager one with attention written out."""
    counts = {}
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        layer = LatentAttentionPooling(hidden_size, latents, heads).eval()
        fold = layer.fold()
        for name in PROVIDERS:
            per = []
            for tokens in (1024, 2048):  # their difference leaves out what is done once
                hidden, cu_seqlens = torch.empty(tokens, hidden_size), torch.empty(33, dtype=torch.int32)
                with FlopCounterMode(display=False) as counter:
                    if name == "eager":
                        eager(layer, hidden, cu_seqlens)
                    else:
                        latent_attention_pool(hidden, cu_seqlens, fold, validate=False)
                per.append(counter.get_total_flops())
            counts[name] = (per[1] - per[0]) / 1024
    return counts


def break_even(settings: Settings) -> dict[str, Any]:
    """Time a training step folded and unfolded around the token count where the rule changes its mind."""
    layer, hidden, _ = make_layer(settings, 1 << 14)
    layer.train()
    tokens = next(n for n in range(1, 1 << 14) if layer.cheapest_fold(n) != "none")
    rows = {}
    for count in (tokens // 2, tokens * 3 // 4, tokens, tokens * 3 // 2, tokens * 2):
        cu_seqlens = torch.tensor([0, count], dtype=torch.int32, device=settings.device)
        times: dict[str, list[float]] = {"none": [], "attention": []}
        for repeat in range(6):
            for plan, taken in times.items():
                layer.cheapest_fold = lambda tokens=None, plan=plan: plan
                start = time.perf_counter()
                training(folded, layer, hidden[:count], cu_seqlens)
                if repeat:
                    taken.append(time.perf_counter() - start)
        none, attention = (1e3 * statistics.median(taken) for taken in times.values())
        rows[count] = {"unfolded_ms": none, "folded_ms": attention, "unfolded_over_folded": none / attention}
    return {"rule_folds_from": tokens, "by_tokens": rows}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training step"])
def bench_latent_pooling(record, train, provider):
    record(contest, provider, train)


if __name__ == "__main__":
    if "--break-even" in sys.argv:
        print(json.dumps(break_even(Settings()), indent=1))
    else:
        sys.exit(measure.main(__file__, sys.argv[1:]))
