"""Latent attention pooling in Triton: what surrounds the library's matrix products, and the plain form whole.

LayerNorm, P value^T + x and the weights' gradients are library calls: nothing is left to fuse into the first
but one pass over the tokens (1/1000 of the MLP's arithmetic), and a product without an epilogue of its own is
what vendor libraries do best. Ours are the products that have one:
    softmax      x score^T, then a softmax over the R columns of each head: scores stay in registers.
    mlp_pool     act(x up^T + b), weighted and summed over each sequence: the (T, F) activation never exists.
    plain_pool   both at once: between tokens in and (B, F) out nothing token-sized is stored.
A tile of tokens adds up each of its sequences apart. Tiles and sequences both advance along the tokens, so
(tile, sequence) -> row tile + sequence is one-to-one: partial sums fill tiles + B rows, and a second kernel
adds the rows of a sequence in order. No atomics, no padding at sequence ends, the same bits every time.
(Torch adds token weights by atomics before: where they are no integers, sums may differ in the last bit.)

Layout legend: B sequences, T packed tokens, D hidden size, H heads, R latents, F rows of up, W width of the
sums (F, or F / 2 with a gate). Weights are (out, in).
"""

# Triton's launch options and jit types are unknown to the type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from uncausal.kernels.cpu import latent_pooling_torch as plain
from uncausal.kernels.cpu.latent_pooling_torch import LinearGradients, Norm, normalise, sequence_ids
from uncausal.kernels.launch import FUSED, Tile, architecture

SLAB_ROWS = 4096  # tokens whose (rows, F) gradient exists at a time in backward
MAX_LATENTS = 512  # of a head, whose scores a tile holds
GROUP_M = 8  # row tiles that share their columns of the weight in the second-level cache


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    offs_m,
    mask_m,
    offs_n,
    mask_n,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows offs_m of x times rows offs_n of w, both (., D): fp32 [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros((offs_m.shape[0], offs_n.shape[0]), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < D
        x = tl.load(
            x_ptr + offs_m.to(tl.int64)[:, None] * D + offs_k[None, :],
            mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + offs_n.to(tl.int64)[:, None] * D + offs_k[None, :],
            mask_n[:, None] & mask_k[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _preactivation(
    x_ptr, up_ptr, bias_ptr, offs_m, mask_m, offs_n, mask_n,
    D: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x up^T + bias at columns offs_n and, gated, at W + offs_n (else zeros), from one pass over x."""
    z = tl.zeros((offs_m.shape[0], offs_n.shape[0]), dtype=tl.float32)
    gate = tl.zeros((offs_m.shape[0], offs_n.shape[0]), dtype=tl.float32)
    x_rows, up_rows = x_ptr + offs_m.to(tl.int64)[:, None] * D, up_ptr + offs_n.to(tl.int64)[:, None] * D
    for start in range(0, D, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)[None, :]
        mask_x, mask_up = mask_m[:, None] & (offs_k < D), mask_n[:, None] & (offs_k < D)
        x = tl.load(x_rows + offs_k, mask_x, other=0.0)
        z = tl.dot(x, tl.load(up_rows + offs_k, mask_up, other=0.0).T, z, input_precision="ieee")
        if GATED:
            up = tl.load(up_rows + (tl.cast(W, tl.int64) * D + offs_k), mask_up, other=0.0)
            gate = tl.dot(x, up.T, gate, input_precision="ieee")
    z += tl.load(bias_ptr + offs_n, mask_n, other=0.0)[None, :]
    if GATED:
        gate += tl.load(bias_ptr + W + offs_n, mask_n, other=0.0)[None, :]
    return z, gate


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _store_sums(out, seq, partial_ptr, tile, first, last, offs_n, mask_n, W: tl.constexpr):
    """Sum the rows of out [BLOCK_M, BLOCK_N] that belong to each sequence into row tile + sequence."""
    for s in range(first, last + 1):
        total = tl.sum(tl.where(seq[:, None] == s, out, 0.0), axis=0)
        tl.store(partial_ptr + (tile + s).to(tl.int64) * W + offs_n, total, mask_n)


@triton.jit(do_not_specialize=["T"])
def _softmax_kernel(
    x_ptr, score_ptr, probs_ptr,
    T,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < T, offs_r < R
    scores = _product(x_ptr, score_ptr, offs_m, mask_m, head * R + offs_r, mask_r, D, BLOCK_K)
    scores = tl.where(mask_r[None, :], scores, float("-inf"))
    probs = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    probs = probs / tl.sum(probs, axis=1)[:, None]
    where = probs_ptr + offs_m.to(tl.int64)[:, None] * (H * R) + head * R + offs_r[None, :]
    tl.store(where, probs, mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["T"])
def _softmax_bwd_kernel(
    dprobs_ptr, probs_ptr, dscores_ptr,
    T,
    H: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    offs = offs_m.to(tl.int64)[:, None] * (H * R) + tl.program_id(1) * R + offs_r[None, :]
    mask = (offs_m < T)[:, None] & (offs_r < R)[None, :]
    probs = tl.load(probs_ptr + offs, mask, other=0.0).to(tl.float32)
    dprobs = tl.load(dprobs_ptr + offs, mask, other=0.0).to(tl.float32)
    dscores = probs * (dprobs - tl.sum(probs * dprobs, axis=1)[:, None])
    tl.store(dscores_ptr + offs, dscores, mask)


@triton.jit
def _place(T, W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of a program; GROUP row tiles pass over the columns together."""
    rows, cols = tl.cdiv(T, BLOCK_M), tl.cdiv(W, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * cols) * GROUP
    size = min(rows - first, GROUP)
    return first + pid % (GROUP * cols) % size, pid % (GROUP * cols) // size


@triton.jit  # T stays specialised here: without it the modelled bound falls by a tenth
def _mlp_pool_kernel(
    x_ptr, up_ptr, bias_ptr, weights_ptr, seq_ptr, partial_ptr,
    T,
    D: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, column = _place(T, W, BLOCK_M, BLOCK_N, GROUP)
    offs_m, offs_n = tile * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < T, offs_n < W
    z, gate = _preactivation(x_ptr, up_ptr, bias_ptr, offs_m, mask_m, offs_n, mask_n, D, W, GATED, BLOCK_K)
    out = z * _gelu(gate) if GATED else _gelu(z)
    out *= tl.load(weights_ptr + offs_m, mask_m, other=0.0)[:, None]
    seq = tl.load(seq_ptr + offs_m, mask_m, other=-1)
    first = tl.load(seq_ptr + tile * BLOCK_M)
    last = tl.load(seq_ptr + min(tile * BLOCK_M + BLOCK_M, T) - 1)
    _store_sums(out, seq, partial_ptr, tile, first, last, offs_n, mask_n, W)


@triton.jit
def _mlp_pool_bwd_kernel(
    dinner_ptr, x_ptr, up_ptr, bias_ptr, weights_ptr, seq_ptr, dz_ptr,
    T,
    D: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, column = _place(T, W, BLOCK_M, BLOCK_N, GROUP)
    offs_m, offs_n = tile * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < T, offs_n < W
    mask = mask_m[:, None] & mask_n[None, :]
    z, gate = _preactivation(x_ptr, up_ptr, bias_ptr, offs_m, mask_m, offs_n, mask_n, D, W, GATED, BLOCK_K)
    # loaded behind the products, whose accumulators would crowd them out of the registers
    seq = tl.load(seq_ptr + offs_m, mask_m, other=0).to(tl.int64)
    dout = tl.load(dinner_ptr + seq[:, None] * W + offs_n[None, :], mask, other=0.0)
    dout *= tl.load(weights_ptr + offs_m, mask_m, other=0.0)[:, None]
    F: tl.constexpr = 2 * W if GATED else W
    where = dz_ptr + offs_m.to(tl.int64)[:, None] * F + offs_n[None, :]
    if GATED:
        tl.store(where, dout * _gelu(gate), mask)
        tl.store(where + W, dout * z * _gelu_slope(gate), mask)
    else:
        tl.store(where, dout * _gelu_slope(z), mask)


@triton.jit(do_not_specialize=["T"])
def _plain_pool_kernel(
    x_ptr, score_ptr, value_ptr, bias_ptr, weights_ptr, seq_ptr, partial_ptr,
    T,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    offs_m, offs_r = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, H * R)
    mask_m, mask_r = offs_m < T, offs_r < H * R
    scores = _product(x_ptr, score_ptr, offs_m, mask_m, offs_r, mask_r, D, BLOCK_K)
    if H > 1:
        scores = tl.reshape(scores, (BLOCK_M, H, R))
        probs = tl.exp(scores - tl.max(scores, axis=2, keep_dims=True))
        probs = tl.reshape(probs / tl.sum(probs, axis=2, keep_dims=True), (BLOCK_M, H * R))
    else:
        probs = tl.exp(scores - tl.max(scores, axis=1, keep_dims=True))
        probs = probs / tl.sum(probs, axis=1, keep_dims=True)
    probs = probs.to(x_ptr.dtype.element_ty)
    weights = tl.load(weights_ptr + offs_m, mask_m, other=0.0)
    seq = tl.load(seq_ptr + offs_m, mask_m, other=-1)
    first = tl.load(seq_ptr + tile * BLOCK_M)
    last = tl.load(seq_ptr + min(tile * BLOCK_M + BLOCK_M, T) - 1)
    for start in range(0, W, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < W
        where = value_ptr + offs_n.to(tl.int64)[:, None] * (H * R) + offs_r[None, :]
        value = tl.load(where, mask_n[:, None], other=0.0)
        z = tl.dot(probs, value.T, input_precision="ieee")
        z += tl.load(bias_ptr + offs_n, mask_n, other=0.0)[None, :]
        if GATED:
            value = tl.load(where + W * H * R, mask_n[:, None], other=0.0)
            gate = tl.dot(probs, value.T, input_precision="ieee")
            gate += tl.load(bias_ptr + W + offs_n, mask_n, other=0.0)[None, :]
            out = z * _gelu(gate)
        else:
            out = _gelu(z)
        _store_sums(out * weights[:, None], seq, partial_ptr, tile, first, last, offs_n, mask_n, W)


@triton.jit
def _row_sum_kernel(
    values_ptr, weights_ptr, begin_ptr, end_ptr, out_ptr,
    W: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < W
    begin, end = tl.load(begin_ptr + s), tl.load(end_ptr + s)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < end
        where = values_ptr + offs_m.to(tl.int64)[:, None] * W + offs_n[None, :]
        values = tl.load(where, mask_m[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights_ptr + offs_m, mask_m, other=0.0)[:, None]
        acc += values
    tl.store(out_ptr + s.to(tl.int64) * W + offs_n, tl.sum(acc, axis=0), mask_n)


# the softmax's columns are all latents of a head
_AMPERE = {
    "softmax": Tile(64, 0, 8, 2, block_k=32),
    "mlp": Tile(128, 64, 8, 3, block_k=32),
    "plain": Tile(32, 32, 8, 2, block_k=32),
}
_HOPPER = {
    "softmax": Tile(64, 0, 8, 2, block_k=32),
    "mlp": Tile(128, 64, 8, 3, block_k=64),
    "plain": Tile(64, 32, 8, 2, block_k=32),
}
_CDNA = {
    "softmax": Tile(64, 0, 8, 2, block_k=32),
    "mlp": Tile(128, 64, 8, 2, block_k=32),
    "plain": Tile(32, 16, 8, 2, block_k=32),
}
CONFIGS = {
    "sm80": _AMPERE,
    "sm86": _AMPERE,
    "sm90": _HOPPER,
    "sm100": _HOPPER,
    "sm120": {**_AMPERE, "plain": Tile(32, 32, 4, 2, block_k=32)},  # with 8 warps the gated form spills
    "gfx942": _CDNA,
    "gfx950": _CDNA,
}


def _tile(kernel: str, device: torch.device) -> Tile:
    return CONFIGS[architecture(device)][kernel]


def supports_plain(x: Tensor, score: Tensor, num_heads: int) -> bool:
    """Tell whether the plain form fits one kernel: 16 to 512 scores a token, in groups of a power of two."""
    latents = score.shape[0] // num_heads
    powers = all(n & (n - 1) == 0 for n in (num_heads, latents))
    return 16 <= score.shape[0] <= MAX_LATENTS and powers


def softmax(x: Tensor, norm: Norm, score: Tensor, num_heads: int) -> Tensor:
    """Probabilities (T, H*R) of each token over the latents of each head."""
    if score.shape[0] > MAX_LATENTS * num_heads:
        return plain.softmax(x, norm, score, num_heads)
    x, score = normalise(x, norm), score.contiguous()
    (tokens, d), latents = x.shape, score.shape[0] // num_heads
    probs = x.new_empty(tokens, score.shape[0])
    tile = _tile("softmax", x.device)
    _softmax_kernel[(triton.cdiv(tokens, tile.block_m), num_heads)](
        x, score, probs, tokens, D=d, H=num_heads, R=latents, BLOCK_M=tile.block_m,
        BLOCK_R=max(16, triton.next_power_of_2(latents)), BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **FUSED,
    )  # fmt: skip
    return probs


def softmax_backward(
    dprobs: Tensor, probs: Tensor, x: Tensor, norm: Norm, score: Tensor, num_heads: int
) -> LinearGradients:
    """Gradients of `softmax` for x, the norm and score."""
    if score.shape[0] > MAX_LATENTS * num_heads:
        return plain.softmax_backward(dprobs, probs, x, norm, score, num_heads)
    grads, latents = LinearGradients(x, norm, score), score.shape[0] // num_heads
    for rows in plain.slabs(x, SLAB_ROWS):
        p, dscores = probs[rows], torch.empty_like(probs[rows])
        _softmax_bwd_kernel[(triton.cdiv(len(p), 8), num_heads)](
            dprobs[rows].contiguous(), p, dscores, len(p), H=num_heads, R=latents, BLOCK_M=8,
            BLOCK_R=triton.next_power_of_2(latents), num_warps=4, **FUSED,
        )  # fmt: skip
        grads.add(rows, normalise(x[rows], norm), dscores)
    return grads


def _reduce(partial: Tensor, cu_seqlens: Tensor, block_m: int) -> Tensor:
    """Add the partial rows of each sequence: row tile + sequence, for the tiles it touches."""
    order = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return _row_sums(
        partial, None, cu_seqlens[:-1] // block_m + order, (cu_seqlens[1:] - 1) // block_m + order + 1
    )


def _row_sums(values: Tensor, weights: Tensor | None, begin: Tensor, end: Tensor) -> Tensor:
    out = values.new_empty(len(begin), values.shape[1], dtype=torch.float32)
    _row_sum_kernel[(len(begin), triton.cdiv(values.shape[1], 128))](
        values, weights, begin, end, out, W=values.shape[1], WEIGHTED=weights is not None,
        BLOCK_M=16, BLOCK_N=128, num_warps=4, **FUSED,
    )  # fmt: skip
    return out


def mlp_pool(
    x: Tensor,
    norm: Norm,
    up: Tensor,
    up_bias: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    gated: bool,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """Sum weights * act(LN(x) up^T + up_bias) over each sequence, and with residual weights * x."""
    (tokens, d), batch = x.shape, cu_seqlens.shape[0] - 1
    width = up.shape[0] // 2 if gated else up.shape[0]
    tile = _tile("mlp", x.device)
    tiles, ids = triton.cdiv(tokens, tile.block_m), sequence_ids(cu_seqlens, tokens)
    partial = weights.new_empty(tiles + batch, width)
    _mlp_pool_kernel[(tiles * triton.cdiv(width, tile.block_n),)](
        normalise(x, norm), up.contiguous(), up_bias, weights, ids, partial, tokens,
        D=d, W=width, GATED=gated, GROUP=GROUP_M,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **FUSED,
    )  # fmt: skip
    inner = _reduce(partial, cu_seqlens, tile.block_m)
    outer = _row_sums(x, weights, cu_seqlens[:-1], cu_seqlens[1:]) if residual else weights.new_empty(0)
    return inner, outer


def mlp_pool_backward(
    dinner: Tensor,
    douter: Tensor,
    x: Tensor,
    norm: Norm,
    up: Tensor,
    up_bias: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    gated: bool,
) -> tuple[LinearGradients, Tensor]:
    """Gradients of `mlp_pool` for x, the norm and up, and for up_bias; computes the pre-activation again."""
    ids, dinner, up = sequence_ids(cu_seqlens, x.shape[0]), dinner.contiguous(), up.contiguous()
    grads, dbias = LinearGradients(x, norm, up), torch.zeros_like(up_bias)
    tile = _tile("mlp", x.device)
    for rows in plain.slabs(x, SLAB_ROWS):
        normed = normalise(x[rows], norm)
        dz = x.new_empty(len(normed), up.shape[0])
        grid = (triton.cdiv(len(normed), tile.block_m) * triton.cdiv(dinner.shape[1], tile.block_n),)
        _mlp_pool_bwd_kernel[grid](
            dinner, normed, up, up_bias, weights[rows], ids[rows], dz, len(normed),
            D=x.shape[1], W=dinner.shape[1], GATED=gated, GROUP=GROUP_M,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **FUSED,
        )  # fmt: skip
        dbias += dz.sum(0, dtype=dbias.dtype)
        grads.add(rows, normed, dz)
        if douter.numel():
            grads.x[rows] += douter[ids[rows]].mul_(weights[rows, None]).to(x.dtype)
    return grads, dbias


def plain_pool(
    x: Tensor,
    score: Tensor,
    value: Tensor,
    up_bias: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    gated: bool,
) -> Tensor:
    """Sum weights * act(softmax(x score^T) value^T + up_bias) over each sequence, one kernel if it fits."""
    if not supports_plain(x, score, num_heads):
        probs = softmax(x, None, score, num_heads)
        return mlp_pool(probs, None, value, up_bias, weights, cu_seqlens, gated, False)[0]
    (tokens, d), width = x.shape, value.shape[0] // 2 if gated else value.shape[0]
    tile = _tile("plain", x.device)
    block_n = max(16, tile.block_n // 2) if gated else tile.block_n  # two products a column
    tiles, ids = triton.cdiv(tokens, tile.block_m), sequence_ids(cu_seqlens, tokens)
    partial = weights.new_empty(tiles + cu_seqlens.shape[0] - 1, width)
    _plain_pool_kernel[(tiles,)](
        x, score.contiguous(), value.contiguous(), up_bias, weights, ids, partial, tokens,
        D=d, H=num_heads, R=score.shape[0] // num_heads, W=width, GATED=gated,
        BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **FUSED,
    )  # fmt: skip
    return _reduce(partial, cu_seqlens, tile.block_m)
