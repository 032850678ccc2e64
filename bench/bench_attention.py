"""Packed attention against its peers, interleaved in one run: forward, and forward with backward.

The batch is ragged: sequences of log-normal lengths, or `--lengths short` for the 25-token sentences
of SimCSE training. `python -m uncausal.bench.bench_attention [--device cuda --dtype bfloat16 --json FILE]`
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from uncausal.kernels.attention import flash_attn_varlen_func, flash_attn_varlen_ref
from uncausal.kernels.packing import PackedLayout, pack, unpack

Provider = Callable[[Tensor, Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """One packed batch with the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    layout: PackedLayout
    lengths: list[int]


def lognormal_lengths(sequences: int, tokens: int, low: int, high: int) -> list[int]:
    """Quantiles of a log-normal distribution (sigma 0.8), clipped, shuffled, `tokens` in total."""
    points = (torch.arange(sequences, dtype=torch.float64) + 0.5) / sequences
    shape = torch.exp(0.8 * torch.special.ndtri(points))

    def scaled(scale: float) -> Tensor:
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


def make_batch(args: argparse.Namespace) -> Batch:
    if args.lengths == "lognormal":
        lengths = lognormal_lengths(args.sequences, args.tokens, 16, 512)
    else:
        lengths = torch.randint(12, 40, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(0)
    layout = PackedLayout.from_lengths(lengths, args.device)
    shapes = [
        (layout.total, h, args.head_dim) for h in (args.heads, args.kv_heads, args.kv_heads, args.heads)
    ]
    q, k, v, dout = (torch.randn(s, device=args.device, dtype=args.dtype) for s in shapes)
    return Batch(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, layout, lengths)


def uncausal(batch: Batch, dropout_p: float) -> Provider:
    cu, layout = batch.layout.cu_seqlens, batch.layout

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, cu, cu, dropout_p=dropout_p, layout=layout)  # type: ignore

    return attend


def padded_sdpa(batch: Batch, dropout_p: float) -> Provider:
    """What an encoder does that pads its batch: q, k, v come padded, so padding itself costs nothing here."""
    mask = torch.arange(max(batch.lengths), device=batch.q.device) < batch.layout.cu_seqlens.diff()[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None, None], dropout_p=dropout_p, enable_gqa=True
        )
        return out.transpose(1, 2)

    attend.layout = batch.layout  # type: ignore[attr-defined]
    return attend


def split_loop(batch: Batch, dropout_p: float) -> Provider:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for parts in zip(*(x.split(batch.lengths) for x in (q, k, v)), strict=True):
            heads = (x.transpose(0, 1)[None] for x in parts)
            out = F.scaled_dot_product_attention(*heads, dropout_p=dropout_p, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return attend


def flex(batch: Batch, dropout_p: float) -> Provider:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _unless(not dropout_p and batch.q.is_cuda, "flex_attention has no dropout, and no backward on a CPU")
    sequence, total = batch.layout.sequence_of_token(), batch.layout.total
    mask = create_block_mask(lambda b, h, i, j: sequence[i] == sequence[j], None, None, total, total)
    compiled: Any = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*heads, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def torch_varlen(batch: Batch, dropout_p: float) -> Provider:
    varlen: Any = importlib.import_module("torch.nn.attention.varlen")
    _unless(not dropout_p and batch.q.is_cuda, "varlen_attn has no dropout and no CPU kernel")
    cu, longest, group = batch.layout.cu_seqlens, max(batch.lengths), batch.q.shape[1] // batch.k.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        return varlen.varlen_attn(q, k, v, cu, cu, longest, longest)

    return attend


def flash_attn(module: str, batch: Batch, dropout_p: float) -> Provider:
    function = importlib.import_module(module).flash_attn_varlen_func
    _unless(not dropout_p or module == "flash_attn", f"{module} has no dropout")
    cu, longest = batch.layout.cu_seqlens, max(batch.lengths)
    options = dict(dropout_p=dropout_p) if dropout_p else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
        out = function(q, k, v, **sizes, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _unless(able: bool, reason: str) -> None:
    if not able:
        raise NotImplementedError(reason)


PROVIDERS: dict[str, Callable[[Batch, float], Provider]] = {
    "uncausal": uncausal,
    "padded SDPA": padded_sdpa,
    "SDPA loop over split": split_loop,
    "flex_attention": flex,
    "torch varlen_attn": torch_varlen,
    "flash-attn 2": partial(flash_attn, "flash_attn"),
    "flash-attn 3": partial(flash_attn, "flash_attn_interface"),
    "flash-attn 4": partial(flash_attn, "flash_attn.cute"),
}


def prepare(
    batch: Batch, dropout_p: float
) -> tuple[dict[str, tuple[Provider, tuple[Tensor, ...]]], dict[str, str]]:
    """Return the providers that run here with their inputs (q, k, v, dout), and why the others don't."""
    ready, missing = {}, {}
    for name, build in PROVIDERS.items():
        try:
            provider = build(batch, dropout_p)
        except ImportError:
            missing[name] = "not installed"
            continue
        except NotImplementedError as reason:
            missing[name] = str(reason)
            continue
        inputs = (batch.q, batch.k, batch.v, batch.dout)
        layout = getattr(provider, "layout", None)
        if layout is not None:
            inputs = tuple(unpack(x.detach(), layout).requires_grad_(x.requires_grad) for x in inputs)
        ready[name] = (provider, inputs)
    return ready, missing


def gate(batch: Batch, ready: dict) -> dict[str, float]:
    """Return each provider's error against float64; a wrong answer has no speed."""
    cu = batch.layout.cu_seqlens
    q, k, v = (x.detach().double() for x in (batch.q, batch.k, batch.v))
    want, _ = flash_attn_varlen_ref(q, k, v, cu, cu)
    errors = {}
    for name, (provider, inputs) in ready.items():
        with torch.no_grad():
            out = provider(*inputs[:3])
        if out.dim() == 4:
            out = pack(out, provider.layout)[0]
        errors[name] = float((out.double() - want).abs().max())
        assert errors[name] < {torch.float32: 1e-4}.get(out.dtype, 0.05), f"{name}: error {errors[name]:.3g}"
    return errors


def forward(provider: Provider, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    with torch.no_grad():
        provider(q, k, v)


def forward_backward(provider: Provider, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    torch.autograd.grad(provider(q, k, v), (q, k, v), dout)


def measure(runs: dict[str, Callable[[], None]], device: str, repeats: int) -> dict[str, list[float]]:
    """Time the runs in turn, `repeats` times after one warm-up each; milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one batch and return one record."""
    batch = make_batch(args)
    ready, missing = prepare(batch, args.dropout)
    record: dict[str, Any] = {"not run": missing}
    if not args.dropout:
        record["error"] = gate(batch, ready)
    flops = 4 * sum(n * n for n in batch.lengths) * args.heads * args.head_dim
    for step, factor in ((forward, 1.0), (forward_backward, 3.5)):
        runs = {name: partial(step, provider, *inputs) for name, (provider, inputs) in ready.items()}
        for name, times in measure(runs, args.device, args.repeats).items():
            median, (low, *_, high) = statistics.median(times), statistics.quantiles(times, n=5)
            rate = flops * factor / median / 1e6
            record[f"{step.__name__} {name}"] = dict(median_ms=median, p20_ms=low, p80_ms=high, gflops=rate)
    return record


def environment(args: argparse.Namespace) -> dict[str, Any]:
    device = (
        torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "uncausal")}
    arguments = {k: str(v) for k, v in vars(args).items()}
    return dict(device=device, threads=torch.get_num_threads(), versions=versions, arguments=arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--lengths", default="lognormal", choices=("lognormal", "short"))
    parser.add_argument("--sequences", default=64, type=int)
    parser.add_argument("--tokens", default=6141, type=int)
    parser.add_argument("--heads", default=9, type=int)
    parser.add_argument("--kv-heads", default=3, type=int)
    parser.add_argument("--head-dim", default=64, type=int)
    parser.add_argument("--dropout", default=0.0, type=float)
    parser.add_argument("--repeats", default=9, type=int)
    parser.add_argument("--json", type=Path, help="append the record to this file, one JSON object a line")
    args = parser.parse_args()
    record = environment(args) | bench(args)
    for name, value in record.items():
        if isinstance(value, dict) and "median_ms" in value:
            spread = f"{value['p20_ms']:.1f} .. {value['p80_ms']:.1f}"
            print(f"{name:40s} {value['median_ms']:9.1f} ms  ({spread})  {value['gflops']:8.1f} GFLOP/s")
        else:
            print(f"{name}: {value}")
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
