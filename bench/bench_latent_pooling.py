"""Latent attention pooling against the eager layer: arithmetic, wall time and peak memory, interleaved in
one run.

The peer is the released layer as its equations stand, with torch's fused attention; both work on packed
tokens, so the peer does not pay for padding. `python -m uncausal.bench.bench_latent_pooling [--device cuda
--dtype bfloat16 ...]`
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from uncausal.kernels.latent_pooling import LatentAttentionPooling, latent_attention_pool
from uncausal.kernels.latent_pooling_torch import sequence_ids


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


PROVIDERS: dict[str, Callable] = {"eager": eager, "uncausal": folded}


def make_layer(args: argparse.Namespace) -> tuple[LatentAttentionPooling, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = LatentAttentionPooling(args.hidden_size, args.latents, args.heads).to(args.device, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden_size, device=args.device, dtype=args.dtype)
    cuts = torch.linspace(0, args.tokens, args.sequences + 1).round().to(args.device, torch.int32)
    return layer, hidden, cuts


def inference(provider: Callable, layer: nn.Module, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    with torch.no_grad():
        return provider(layer, hidden, cu_seqlens)


def training(provider: Callable, layer: nn.Module, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    out = provider(layer, hidden.detach().requires_grad_(), cu_seqlens)
    out.square().sum().backward()
    return out


def check(layer: LatentAttentionPooling, hidden: Tensor, cu_seqlens: Tensor) -> float:
    """Largest difference between the providers; a gate, since a wrong answer has no speed."""
    want, got = (inference(p, layer, hidden, cu_seqlens) for p in PROVIDERS.values())
    error = float((want.double() - got.double()).abs().max())
    assert error < {torch.float32: 1e-4}.get(hidden.dtype, 0.1), f"providers differ by {error:.3g}"
    return error


def seconds(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall time, and processor time of all threads: the second holds on a machine that others use as well."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, busy = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Most bytes allocated by torch at a time during a run, above what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        run()
    events: Any = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, nbytes in changes:
        now += nbytes
        peak = max(peak, now)
    return peak


def flops(hidden_size: int, latents: int, heads: int) -> dict[str, float]:
    """FLOPs a token of the two forward passes, on fake tensors; the eager one with attention written out."""
    counts = {}
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        layer = LatentAttentionPooling(hidden_size, latents, heads).eval()
        fold = layer.fold()
        for name in PROVIDERS:
            per = []
            for tokens in (
                1024,
                2048,
            ):  # the difference leaves out what is done once: keys, values, W2 on sequences
                hidden, cu_seqlens = torch.empty(tokens, hidden_size), torch.empty(33, dtype=torch.int32)
                with FlopCounterMode(display=False) as counter:
                    if name == "eager":
                        eager(layer, hidden, cu_seqlens)
                    else:
                        latent_attention_pool(hidden, cu_seqlens, fold, validate=False)
                per.append(counter.get_total_flops())
            counts[name] = (per[1] - per[0]) / 1024
    return counts


def bench(args: argparse.Namespace) -> dict:
    """Measure both providers, alternating, and return one record."""
    layer, hidden, cu_seqlens = make_layer(args)
    record: dict = {"error": check(layer, hidden, cu_seqlens)}
    for name, step in (("inference", inference), ("training", training)):
        layer.train(name == "training")
        runs = {p: (lambda f=f, step=step: step(f, layer, hidden, cu_seqlens)) for p, f in PROVIDERS.items()}
        times: dict[str, list[float]] = {p: [] for p in runs}
        busy: dict[str, list[float]] = {p: [] for p in runs}
        for repeat in range(args.repeats + 1):
            for provider, run in runs.items():
                layer.zero_grad(
                    set_to_none=False
                )  # gradients stay allocated: they are nobody's working memory
                elapsed, cpu = seconds(run, args.device)
                if repeat:
                    times[provider].append(elapsed)
                    busy[provider].append(cpu)
        for provider, run in runs.items():
            low, median, high = (
                statistics.quantiles(times[provider], n=10)[1::3] if args.repeats > 1 else [0, 0, 0]
            )
            record[f"{name} {provider}"] = {
                "median_ms": 1e3 * statistics.median(times[provider]),
                "cpu_ms": 1e3 * statistics.median(busy[provider]),
                "p20_ms": 1e3 * low,
                "p80_ms": 1e3 * high,
                "peak_mb": peak_bytes(run, args.device) / 1e6,
            }
        ours, theirs = record[f"{name} uncausal"], record[f"{name} eager"]
        record[f"{name} speedup"] = theirs["median_ms"] / ours["median_ms"]
        record[f"{name} cpu speedup"] = theirs["cpu_ms"] / ours["cpu_ms"]
        record[f"{name} memory"] = ours["peak_mb"] / theirs["peak_mb"]
    return record


def break_even(args: argparse.Namespace) -> dict:
    """Time a training step folded and unfolded around the token count where `cheapest_fold` changes its
    mind."""
    args.tokens = 1 << 14
    layer, hidden, _ = make_layer(args)
    layer.train()
    tokens = next(n for n in range(1, args.tokens) if layer.cheapest_fold(n) != "none")
    rows = {}
    for count in (tokens // 2, tokens * 3 // 4, tokens, tokens * 3 // 2, tokens * 2):
        x, cu_seqlens = hidden[:count], torch.tensor([0, count], dtype=torch.int32, device=args.device)
        times: dict[str, list[float]] = {"none": [], "attention": []}
        for repeat in range(4):
            for plan, taken in times.items():
                layer.cheapest_fold = lambda tokens=None, plan=plan: plan
                layer.zero_grad(set_to_none=False)
                elapsed, _ = seconds(lambda x=x, cu=cu_seqlens: training(folded, layer, x, cu), args.device)
                if repeat:
                    taken.append(elapsed)
        none, attention = (1e3 * statistics.median(taken) for taken in times.values())
        rows[count] = {"unfolded_ms": none, "folded_ms": attention, "unfolded_over_folded": none / attention}
    return {"rule_folds_from": tokens, "by_tokens": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument(
        "--break-even", action="store_true", help="time folding around its break-even instead"
    )
    args = parser.parse_args()
    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    )
    record = {"torch": torch.__version__, "device": where, "threads": torch.get_num_threads()}
    record |= {k: str(v) for k, v in vars(args).items()}
    if args.break_even:
        record |= break_even(args)
    else:
        counts = flops(4096, 512, 8)
        record |= {
            "flops per token, d=4096 r=512 h=8": counts,
            "flops ratio": counts["uncausal"] / counts["eager"],
        }
        record |= bench(args)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
