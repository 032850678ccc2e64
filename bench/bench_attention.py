"""Packed attention against its peers: ragged batches of several length distributions, forward and backward.

A peer that pads receives its inputs padded, so padding itself costs it nothing here. On a CPU 9 query heads
over 3 of 64 dimensions in fp32, on a GPU 32 over 8 of 64 and 128 in bf16.
`python -m uncausal.bench.bench_attention [--device cuda] [--dry] [-k long-tailed]`
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from uncausal.bench import inputs, measure
from uncausal.bench.measure import OURS, Contest, Settings, Unable, allocated_bytes, gather, load
from uncausal.kernels.attention import flash_attn_varlen_func, flash_attn_varlen_ref
from uncausal.kernels.packing import PackedLayout, pack, unpack

Provider = Callable[[Tensor, Tensor, Tensor], Tensor]
DISTRIBUTIONS = ("long-tailed", "constant", "uniform", "bimodal", "short")
LENGTHS = (32, 64, 128, 256, 512, 1024)


class Batch(NamedTuple):
    """One packed batch with the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    layout: PackedLayout
    lengths: list[int]


def make_batch(settings: Settings, sizes: list[int], dim: int) -> Batch:
    heads = {"cpu": (9, 3), "cuda": (32, 8)}[settings.device] if not settings.dry else (2, 1)
    torch.manual_seed(0)
    layout = PackedLayout.from_lengths(sizes, settings.device)
    shapes = [(layout.total, h, dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, dout = (torch.randn(s, device=settings.device, dtype=settings.dtype) for s in shapes)
    return Batch(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout, layout, sizes)


def uncausal(batch: Batch) -> Provider:
    cu = batch.layout.cu_seqlens
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu, layout=batch.layout)  # type: ignore[return-value]


def padded_sdpa(batch: Batch, backend: SDPBackend | None = None) -> Provider:
    """What an encoder does that pads its batch."""
    longest, device = max(batch.lengths), batch.q.device
    mask = (torch.arange(longest, device=device) < batch.layout.cu_seqlens.diff()[:, None])[:, None, None]
    if backend is not None and device.type != "cuda":
        raise Unable("a backend of GPUs")
    if backend == SDPBackend.FLASH_ATTENTION:
        if min(batch.lengths) < longest:
            raise Unable("takes no mask")
        mask = None
    group = batch.q.shape[1] // batch.k.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    attend.layout = batch.layout  # type: ignore[attr-defined]
    return attend


def split_loop(batch: Batch) -> Provider:
    if batch.q.is_cuda:
        raise Unable("launch-bound on a GPU")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for parts in zip(*(x.split(batch.lengths) for x in (q, k, v)), strict=True):
            heads = (x.transpose(0, 1)[None] for x in parts)
            outs.append(F.scaled_dot_product_attention(*heads, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outs)

    return attend


def flex(batch: Batch) -> Provider:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not batch.q.is_cuda:
        raise Unable("no backward on a CPU")
    sequence, total = batch.layout.sequence_of_token(), batch.layout.total
    mask = create_block_mask(lambda b, h, i, j: sequence[i] == sequence[j], None, None, total, total)
    compiled: Any = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*heads, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def torch_varlen(batch: Batch) -> Provider:
    varlen = load("torch.nn.attention.varlen")
    if not batch.q.is_cuda:
        raise Unable("no CPU kernel")
    cu, longest, group = batch.layout.cu_seqlens, max(batch.lengths), batch.q.shape[1] // batch.k.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        return varlen.varlen_attn(q, k, v, cu, cu, longest, longest)

    return attend


def flash_attn(module: str, batch: Batch) -> Provider:
    function = load(module).flash_attn_varlen_func
    cu, longest = batch.layout.cu_seqlens, max(batch.lengths)
    sizes = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, **sizes)
        return out[0] if isinstance(out, tuple) else out

    return attend


PROVIDERS: dict[str, Callable[[Batch], Provider]] = {
    OURS: uncausal,
    "padded SDPA": padded_sdpa,
    "SDPA loop over split": split_loop,
    "padded SDPA, flash": functools.partial(padded_sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "padded SDPA, cuDNN": functools.partial(padded_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "padded SDPA, math": functools.partial(padded_sdpa, backend=SDPBackend.MATH),
    "torch varlen_attn": torch_varlen,
    "flex_attention": flex,
    "flash-attn 2": functools.partial(flash_attn, "flash_attn"),
    "flash-attn 3": functools.partial(flash_attn, "flash_attn_interface"),
    "flash-attn 4": functools.partial(flash_attn, "flash_attn.cute"),
}


def contest(settings: Settings, sizes: list[int], dim: int, backward: bool) -> Contest:
    """Attention of one batch by every provider that can, after a check against float64."""
    batch = make_batch(settings, sizes, dim)
    ready, missing = gather(PROVIDERS, batch)
    runs, facts, exact = {}, {}, _exact(batch, backward)
    for name, provider in ready.items():
        layout, inputs = getattr(provider, "layout", None), (batch.q, batch.k, batch.v, batch.dout)
        if layout is not None:
            inputs = tuple(unpack(x.detach(), layout).requires_grad_(x.requires_grad) for x in inputs)
        try:
            facts[name] = {"error": _error(exact, batch, provider, inputs)}
        except RuntimeError as reason:  # a backend that refuses these shapes
            missing[name] = str(reason).splitlines()[0]
            continue
        runs[name] = functools.partial(forward_backward if backward else forward, provider, *inputs)
    heads = batch.q.shape[1]
    flops = (14 if backward else 4) * sum(n * n for n in sizes) * heads * dim
    return Contest(runs, missing, {"flops": flops}, facts, rounds=9, peak=allocated_bytes)


def _exact(batch: Batch, backward: bool) -> list[Tensor]:
    """The reference's output in float64, and on a GPU gradients; by sequence, as they take much memory."""
    gradients, found = backward and batch.q.is_cuda, []
    for q, k, v, dout in zip(*(x.split(batch.lengths) for x in batch[:4]), strict=True):
        inputs = [x.detach().double().requires_grad_(gradients) for x in (q, k, v)]
        cu = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
        out, _ = flash_attn_varlen_ref(*inputs, cu, cu)
        of_inputs = torch.autograd.grad(out, inputs, dout.double()) if gradients else ()
        found.append([out.detach(), *of_inputs])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _error(exact: list[Tensor], batch: Batch, provider: Provider, inputs: tuple[Tensor, ...]) -> float:
    """The largest error against `_exact`; a wrong answer has no speed, nor has a wrong gradient."""
    gradients = len(exact) > 1
    with torch.set_grad_enabled(gradients):
        out = provider(*inputs[:3])
    error = _distance(out, exact[0], batch.layout)
    allowed = 1e-4 if out.dtype == torch.float32 else 0.05
    assert error < allowed, f"error {error:.3g}"
    if gradients:
        found = torch.autograd.grad(out, inputs[:3], inputs[3])
        for name, a, b in zip("qkv", found, exact[1:], strict=True):
            share = _distance(a, b, batch.layout) / float(b.abs().max())
            assert share < allowed, f"error {share:.3g} of the gradient of {name}"
    return error


def _distance(found: Tensor, exact: Tensor, layout: PackedLayout) -> float:
    packed = pack(found, layout)[0] if found.dim() == 4 else found
    return float((packed.detach().double() - exact).abs().max())


def forward(provider: Provider, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    with torch.no_grad():
        provider(q, k, v)


def forward_backward(provider: Provider, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    torch.autograd.grad(provider(q, k, v), (q, k, v), dout)


def by_distribution(settings: Settings, distribution: str, dim: int, backward: bool) -> Contest:
    tokens, longest = (6141, 512) if settings.device == "cpu" else (65536, 2048)
    if settings.dry:
        tokens, longest = 96, 32
    sizes = inputs.batches(tokens, longest)[distribution]
    return contest(settings, sizes, dim, backward)


def by_length(settings: Settings, length: int, dim: int) -> Contest:
    """Forward over sequences of one length, for the plot."""
    tokens = 64 if settings.dry else 4096 if settings.device == "cpu" else 65536
    length = min(length, 16) if settings.dry else length if settings.device == "cpu" else 8 * length
    found = contest(settings, inputs.constant(length, tokens), dim, backward=False)
    found.peak, found.rounds = None, 5
    flops = found.work["flops"]
    found.derive = lambda times: {
        name: {
            "length": length,
            "gflops": flops / statistics.median(taken) / 1e9,
            "series": f"{name}, D {dim}",
        }
        for name, taken in times.items()
    }
    return found


def _dims(settings: Settings, dim: int) -> int:
    if dim != 64 and settings.device == "cpu":
        pytest.skip("one head dimension on a CPU")
    return dim


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dim", [64, 128], ids=["D64", "D128"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def bench_by_distribution(record, settings, distribution, dim, backward, provider):
    record(by_distribution, provider, distribution, _dims(settings, dim), backward)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dim", [64, 128], ids=["D64", "D128"])
@pytest.mark.parametrize("length", LENGTHS)
def bench_by_length(record, settings, length, dim, provider):
    record(by_length, provider, length, _dims(settings, dim))


if __name__ == "__main__":
    sys.exit(measure.main(__file__, sys.argv[1:]))
