"""Packed attention with Triton: forward, and backward without atomics.

A tile is a block of rows, a row a query token times the G heads that share a key head, so that short
sequences of grouped heads still fill the matrix unit. Of the keys that a tile sees, most lie in blocks that
every row sees whole; only the blocks at the edges are masked. dK and dV walk the rows likewise, from the
keys' side. Scores are in base 2 inside.

Layout legend: T packed tokens, H query heads, HK key heads, G = H / HK, D head dimension.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# (inside a kernel, and in a launch, values are not what their annotations say)

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from uncausal.kernels.cpu.attention_torch import Options, dropout_threshold
from uncausal.kernels.launch import (
    ATTENTION_TF32,
    FUSED,
    OWN_TILE_TOKENS,
    architecture,
    attention_config,
    precision,
)
from uncausal.kernels.packing import PackedLayout, TileMaps

_LOG2E = math.log2(math.e)
_MAX_TOKENS = 1 << 30  # token indices and windows are 32-bit, addresses 64-bit


@triton.jit
def _visible(token, seq, cu_ptr, cu_other_ptr, left, right, WINDOW: tl.constexpr):
    """Bounds [lo, hi) of the packed tokens on the other side that a token sees; both rise with the token."""
    lo = tl.load(cu_other_ptr + seq)
    hi = tl.load(cu_other_ptr + seq + 1)
    if WINDOW:
        diagonal = hi + token - tl.load(cu_ptr + seq + 1)  # a sequence's last query faces its last key
        first = lo
        lo = tl.minimum(tl.maximum(diagonal - left, first), hi)
        hi = tl.minimum(tl.maximum(diagonal + right + 1, first), hi)
    return lo, hi


@triton.jit
def _span(
    first, last, seq_ptr, cu_ptr, cu_other_ptr, left, right,
    G: tl.constexpr, BLOCK: tl.constexpr, EDGE_BLOCK: tl.constexpr, ALIGN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Cut what the tokens [first, last] see, G rows for a token, into blocks: head, full ones, tail.

    Every token sees all of a full block. Those of head and tail are smaller, to compute less in excess.
    """
    lo, full_hi = _visible(first, tl.load(seq_ptr + first), cu_ptr, cu_other_ptr, left, right, WINDOW)
    full_lo, hi = _visible(last, tl.load(seq_ptr + last), cu_ptr, cu_other_ptr, left, right, WINDOW)
    start, end = lo * G, hi * G
    begin = start // ALIGN * ALIGN
    num_head = tl.cdiv(tl.maximum(full_lo * G - begin, 0), EDGE_BLOCK)
    full = begin + num_head * EDGE_BLOCK
    num_full = tl.maximum(full_hi * G - full, 0) // BLOCK
    num_tail = tl.cdiv(tl.maximum(end - full - num_full * BLOCK, 0), EDGE_BLOCK)
    return start, end, begin, num_head, num_full, num_tail


@triton.jit
def _block(i, begin, num_head, num_full, BLOCK: tl.constexpr, EDGE_BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """First row of the i-th full block, or of the i-th one at an edge."""
    if EDGE:
        i += tl.where(i < num_head, 0, num_full * (BLOCK // EDGE_BLOCK))
    else:
        i = i * (BLOCK // EDGE_BLOCK) + num_head
    return begin + i * EDGE_BLOCK


@triton.jit
def _offsets(rows, stride_t, stride_h, G: tl.constexpr):
    """Offsets of rows in 64 bits: G of a token lie beside each other, the heads of this program."""
    head = rows % G + tl.program_id(1) * G
    return (rows // G).to(tl.int64) * stride_t + head.to(tl.int64) * stride_h


@triton.jit
def _load(ptrs, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load rows padded from D to BLOCK_D elements; those outside the mask are 0."""
    mask_d = (tl.arange(0, BLOCK_D) < D)[None, :]
    if MASKED:
        return tl.load(ptrs, mask=mask[:, None] & mask_d, other=0.0)
    elif D != BLOCK_D:
        return tl.load(ptrs, mask=mask_d, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _load_keys(
    ptr, desc, stride, key, start, end,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Load [BLOCK_N, BLOCK_D] keys or values of a head, through a tensor descriptor if there is one."""
    if desc is not None:
        return desc.load([key, tl.program_id(1) * D])
    else:  # 32-bit offsets from one 64-bit base need fewer registers
        offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        ptrs = ptr + key.to(tl.int64) * stride + offs_n[:, None] * stride + offs_d[None, :]
        return _load(ptrs, (key + offs_n >= start) & (key + offs_n < end), D, BLOCK_D, EDGE)


@triton.jit
def _finite(x):
    """Replace NaN and Inf by 0 and tell the rows that had any: 0 * NaN would reach the sequences beside."""
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(finite, x, 0.0).to(x.dtype), tl.min(finite.to(tl.int32), 1) == 0


@triton.jit
def _keep(seed_ptr, rows, key, threshold, G: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Which of [M, N] scores dropout keeps; key, the first one, is a multiple of 32. See `philox_keep`."""
    token, head = rows // G, rows % G + tl.program_id(1) * G
    group = key // 8 + tl.arange(0, N // 8)
    counter = tl.zeros([M, N // 8], tl.int32)
    r0, r1, r2, r3 = tl.philox(
        tl.load(seed_ptr),
        counter + token[:, None],
        counter + group[None, :],
        counter + head[:, None],
        counter,
        7,
    )
    r0, r1, r2, r3 = _halves(r0), _halves(r1), _halves(r2), _halves(r3)  # [M, N // 8, 2]
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [M, N // 8, half, word // 2, word % 2]
    bits = tl.reshape(bits, [M, N // 32, 4, 2, 4])
    bits = tl.reshape(tl.permute(bits, (0, 1, 4, 2, 3)), [M, N])
    return bits >= ((threshold - 32768) << 16)


@triton.jit
def _halves(word):
    word = word.to(tl.int32, bitcast=True)
    return tl.join(word << 16, word)


@triton.jit
def _softcap(scores, scale, cap):
    """Scores in base-2 units, and tanh: scale = 2 log2(e) softmax_scale / softcap, cap = softcap log2(e)."""
    tanh = 1 - 2 / (1 + tl.exp2(scores * scale))
    return tanh * cap, tanh


@triton.jit
def _exp2(x):
    """2 ** x for x <= 0 on the multiply-add units: the unit for exponentials is the forward's bottleneck."""
    x = tl.maximum(x, -126.0)
    shifted = x + 12582912.0  # 1.5 * 2 ** 23: the sum's lowest bits are x rounded to an integer
    f = x - (shifted - 12582912.0)
    p = 1.3333558e-3 + f * 1.5403530e-4
    p = 1.0 + f * (0.69314718 + f * (0.24022651 + f * (0.055504109 + f * (9.6181291e-3 + f * p))))
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["stride_lh"])
def _attn_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, seq_ptr, tiles_ptr, seed_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_lh,
    scale, cap, left, right, threshold, keep_scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.load(tiles_ptr + 2 * tl.program_id(0))
    last = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1) - 1
    if last < first:
        return
    start, end, begin, num_head, num_full, num_tail = _span(
        first // G, last // G, seq_ptr, cu_q_ptr, cu_k_ptr, left, right,
        1, BLOCK_N, EDGE_BLOCK, 32 if DROPOUT else 1, WINDOW,
    )  # fmt: skip
    offs_m = tl.minimum(first + tl.arange(0, BLOCK_M), last)  # a row in excess repeats the last one
    offs_d, pid_h = tl.arange(0, BLOCK_D), tl.program_id(1).to(tl.int64)
    q_ptrs = q_ptr + _offsets(offs_m, stride_qt, stride_qh, G)[:, None] + offs_d[None, :]
    q = _load(q_ptrs, None, D, BLOCK_D, False)
    k_ptr += pid_h * stride_kh
    v_ptr += pid_h * stride_vh

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    lo, hi = start, end
    for EDGE in tl.static_range(2):  # the full blocks, then those at an edge
        if EDGE:  # every row's own bounds: loaded late, they cost the loop of full blocks no registers
            lo, hi = _visible(
                offs_m // G, tl.load(seq_ptr + offs_m // G), cu_q_ptr, cu_k_ptr, left, right, WINDOW
            )
        for i in range(num_head + num_tail if EDGE else num_full):
            key = _block(i, begin, num_head, num_full, BLOCK_N, EDGE_BLOCK, EDGE)
            desc = None if EDGE and EDGE_BLOCK != BLOCK_N else k_desc
            k = _load_keys(
                k_ptr, desc, stride_kt, key, start, end, D, BLOCK_D, EDGE_BLOCK if EDGE else BLOCK_N, EDGE
            )
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N or EDGE_BLOCK]
            unit = scale
            if SOFTCAP:
                s, _ = _softcap(s, scale, cap)
                unit = 1.0
            if EDGE:
                offs_n = key + tl.arange(0, EDGE_BLOCK)[None, :]
                s = tl.where((offs_n >= lo[:, None]) & (offs_n < hi[:, None]), s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1) * unit)
            base = tl.where(new_top == float("-inf"), 0.0, new_top) if EDGE else new_top
            p = tl.exp2(s * unit - base[:, None])
            alpha = _exp2(top - base) if k_desc is not None else tl.exp2(top - base)
            top = new_top
            total = total * alpha + tl.sum(p, 1)
            if DROPOUT:
                keep = _keep(seed_ptr, offs_m, key, threshold, G, BLOCK_M, EDGE_BLOCK if EDGE else BLOCK_N)
                p = tl.where(keep, p, 0.0)
            # a neighbour's keys are masked as scores, its values could bring NaN: descriptors have no mask
            desc = None if EDGE else v_desc
            v = _load_keys(
                v_ptr, desc, stride_vt, key, start, end, D, BLOCK_D, EDGE_BLOCK if EDGE else BLOCK_N, EDGE
            )
            if EDGE and SHARED:
                v, bad = _finite(v)
                p = tl.where((p > 0) & bad[None, :], float("nan"), p)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    empty = total == 0
    out = acc * (keep_scale / tl.where(empty, 1.0, total))[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    mask_m = tl.arange(0, BLOCK_M) <= last - first
    out_ptrs = out_ptr + _offsets(offs_m, stride_ot, stride_oh, G)[:, None] + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_d < D)[None, :])
    tl.store(lse_ptr + _offsets(offs_m, 1, stride_lh, G), lse, mask=mask_m)


@triton.jit(do_not_specialize=["stride_lh", "num_tokens"])
def _attn_bwd_stats_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, lse2_ptr, delta_ptr,
    stride_ot, stride_oh, stride_dt, stride_dh, stride_lh, num_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * dout) - dlse, and lse in base 2; +inf where there are no keys makes p = 0."""
    offs_m, offs_d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask_m = offs_m < num_tokens
    offs = _offsets(offs_m, 1, stride_lh, 1)
    out_ptrs = out_ptr + _offsets(offs_m, stride_ot, stride_oh, 1)[:, None] + offs_d[None, :]
    dout_ptrs = dout_ptr + _offsets(offs_m, stride_dt, stride_dh, 1)[:, None] + offs_d[None, :]
    out = _load(out_ptrs, mask_m, D, BLOCK_D, True).to(tl.float32)
    delta = tl.sum(out * _load(dout_ptrs, mask_m, D, BLOCK_D, True).to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + offs, mask=mask_m, other=0.0)
    lse = tl.load(lse_ptr + offs, mask=mask_m, other=0.0)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(lse2_ptr + offs, lse2, mask=mask_m)
    tl.store(delta_ptr + offs, delta, mask=mask_m)


@triton.jit
def _bwd_scores(s, dp, lse2, delta, keep, mask, scale, cap, keep_scale,
                SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """Return p after dropout and ds, from raw scores and the gradient of p; lse2 and delta broadcast."""
    tanh = s
    if SOFTCAP:
        s, tanh = _softcap(s, scale, cap)
        scale = 1.0
    p = tl.exp2(s * scale - lse2)
    if EDGE:
        p = tl.where(mask, p, 0.0)
    if DROPOUT:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if SOFTCAP:
        ds *= 1 - tanh * tanh
    if EDGE:  # again, for 0 * NaN
        ds = tl.where(mask, ds, 0.0)
    if DROPOUT:
        p = tl.where(keep, p * keep_scale, 0.0)
    return p, ds


@triton.jit(do_not_specialize=["stride_lh"])
def _attn_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, dout_ptr, lse2_ptr, delta_ptr, dq_ptr,
    cu_q_ptr, cu_k_ptr, seq_ptr, tiles_ptr, seed_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    stride_gt, stride_gh, stride_lh,
    softmax_scale, scale, cap, left, right, threshold, keep_scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.load(tiles_ptr + 2 * tl.program_id(0))
    last = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1) - 1
    if last < first:
        return
    start, end, begin, num_head, num_full, num_tail = _span(
        first // G, last // G, seq_ptr, cu_q_ptr, cu_k_ptr, left, right,
        1, BLOCK_N, EDGE_BLOCK, 32 if DROPOUT else 1, WINDOW,
    )  # fmt: skip
    offs_m = tl.minimum(first + tl.arange(0, BLOCK_M), last)
    offs_d, pid_h = tl.arange(0, BLOCK_D), tl.program_id(1).to(tl.int64)
    q_ptrs = q_ptr + _offsets(offs_m, stride_qt, stride_qh, G)[:, None] + offs_d[None, :]
    dout_ptrs = dout_ptr + _offsets(offs_m, stride_dt, stride_dh, G)[:, None] + offs_d[None, :]
    q, dout = _load(q_ptrs, None, D, BLOCK_D, False), _load(dout_ptrs, None, D, BLOCK_D, False)
    lse2 = tl.load(lse2_ptr + _offsets(offs_m, 1, stride_lh, G))
    delta = tl.load(delta_ptr + _offsets(offs_m, 1, stride_lh, G))
    k_ptr += pid_h * stride_kh
    v_ptr += pid_h * stride_vh

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lo, hi = start, end
    for EDGE in tl.static_range(2):
        if EDGE:
            lo, hi = _visible(
                offs_m // G, tl.load(seq_ptr + offs_m // G), cu_q_ptr, cu_k_ptr, left, right, WINDOW
            )
        for i in range(num_head + num_tail if EDGE else num_full):
            key = _block(i, begin, num_head, num_full, BLOCK_N, EDGE_BLOCK, EDGE)
            desc = None if EDGE else k_desc  # as for values in forward
            k = _load_keys(
                k_ptr, desc, stride_kt, key, start, end, D, BLOCK_D, EDGE_BLOCK if EDGE else BLOCK_N, EDGE
            )
            desc = None if EDGE and EDGE_BLOCK != BLOCK_N else v_desc
            v = _load_keys(
                v_ptr, desc, stride_vt, key, start, end, D, BLOCK_D, EDGE_BLOCK if EDGE else BLOCK_N, EDGE
            )
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N or EDGE_BLOCK]
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            mask, keep = s, s
            if EDGE:
                offs_n = key + tl.arange(0, EDGE_BLOCK)[None, :]
                mask = (offs_n >= lo[:, None]) & (offs_n < hi[:, None])
            if DROPOUT:
                keep = _keep(seed_ptr, offs_m, key, threshold, G, BLOCK_M, EDGE_BLOCK if EDGE else BLOCK_N)
            _, ds = _bwd_scores(
                s, dp, lse2[:, None], delta[:, None], keep, mask, scale, cap, keep_scale,
                SOFTCAP, DROPOUT, EDGE,
            )  # fmt: skip
            if EDGE and SHARED:
                k, _ = _finite(k)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    mask = (tl.arange(0, BLOCK_M) <= last - first)[:, None] & (offs_d < D)[None, :]
    dq_ptrs = dq_ptr + _offsets(offs_m, stride_gt, stride_gh, G)[:, None] + offs_d[None, :]
    tl.store(dq_ptrs, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_lh"])
def _attn_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    seq_ptr, tiles_ptr, seed_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    stride_gt, stride_gh, stride_lh,
    softmax_scale, scale, cap, left, right, threshold, keep_scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EDGE_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    first = tl.load(tiles_ptr + 2 * tl.program_id(0))
    last = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1) - 1
    if last < first:
        return
    # seen from a key, the window opens the other way
    start, end, begin, num_head, num_full, num_tail = _span(
        first, last, seq_ptr, cu_k_ptr, cu_q_ptr, right, left, G, BLOCK_M, EDGE_BLOCK, 1, WINDOW
    )
    base = first // 32 * 32 if DROPOUT else first
    offs_n, offs_d = base + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    token = tl.minimum(tl.maximum(offs_n, first), last)
    k_ptrs = k_ptr + _offsets(token, stride_kt, stride_kh, 1)[:, None] + offs_d[None, :]
    v_ptrs = v_ptr + _offsets(token, stride_vt, stride_vh, 1)[:, None] + offs_d[None, :]
    k, v = _load(k_ptrs, None, D, BLOCK_D, False), _load(v_ptrs, None, D, BLOCK_D, False)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    lo, hi = start, end
    for EDGE in tl.static_range(2):
        if EDGE:
            lo, hi = _visible(token, tl.load(seq_ptr + token), cu_k_ptr, cu_q_ptr, right, left, WINDOW)
            lo, hi = lo * G, hi * G
        for i in range(num_head + num_tail if EDGE else num_full):
            offs_m = _block(i, begin, num_head, num_full, BLOCK_M, EDGE_BLOCK, EDGE)
            offs_m += tl.arange(0, EDGE_BLOCK if EDGE else BLOCK_M)
            mask_m = offs_m < end
            q_ptrs = q_ptr + _offsets(offs_m, stride_qt, stride_qh, G)[:, None] + offs_d[None, :]
            dout_ptrs = dout_ptr + _offsets(offs_m, stride_dt, stride_dh, G)[:, None] + offs_d[None, :]
            offs = _offsets(offs_m, 1, stride_lh, G)
            q, dout = _load(q_ptrs, mask_m, D, BLOCK_D, EDGE), _load(dout_ptrs, mask_m, D, BLOCK_D, EDGE)
            if EDGE:
                lse2 = tl.load(lse2_ptr + offs, mask=mask_m, other=float("inf"))
                delta = tl.load(delta_ptr + offs, mask=mask_m, other=0.0)
            else:
                lse2, delta = tl.load(lse2_ptr + offs), tl.load(delta_ptr + offs)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M or EDGE_BLOCK]
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            mask, keep = s, s
            if EDGE:
                mask = (offs_m[None, :] >= lo[:, None]) & (offs_m[None, :] < hi[:, None])
            if DROPOUT:
                keep = _keep(seed_ptr, offs_m, base, threshold, G, EDGE_BLOCK if EDGE else BLOCK_M, BLOCK_N)
                keep = tl.trans(keep)
            p, ds = _bwd_scores(
                s, dp, lse2[None, :], delta[None, :], keep, mask, scale, cap, keep_scale,
                SOFTCAP, DROPOUT, EDGE,
            )  # fmt: skip
            if EDGE and SHARED:
                q, _ = _finite(q)
                dout, bad = _finite(dout)
                p = tl.where((p > 0) & bad[None, :], float("nan"), p)
            if DV:
                dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            if DK:
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    mask = ((offs_n >= first) & (offs_n <= last))[:, None] & (offs_d < D)[None, :]
    offs_g = _offsets(token, stride_gt, stride_gh, 1)[:, None] + offs_d[None, :]
    if DK:
        tl.store(dk_ptr + offs_g, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    if DV:
        tl.store(dv_ptr + offs_g, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def addressable(x: Tensor) -> Tensor:
    """Return x, or a copy where kernels can't address it: they step within a block in 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(0) < 1 << 24 else x.contiguous()


def tile_maps(
    layout_q: PackedLayout, layout_k: PackedLayout, q: Tensor, k: Tensor, options: Options, backward: bool
) -> TileMaps:
    """Return the maps that forward walks, and with `backward` those of the gradients."""
    if layout_k is not layout_q:
        return _tile_maps(layout_q, layout_k, q, k, options, backward)
    facts = architecture(q.device), q.dtype, q.shape[1:], k.shape[1], options.dropout_p > 0, backward
    return layout_q.kept(facts, lambda: _tile_maps(layout_q, layout_k, q, k, options, backward))


def _tile_maps(
    layout_q: PackedLayout, layout_k: PackedLayout, q: Tensor, k: Tensor, options: Options, backward: bool
) -> TileMaps:
    group = q.shape[1] // k.shape[1]
    long, short = (_config("fwd", q, options, shared)["BLOCK_M"] for shared in (False, True))
    fwd = layout_q.split_tiles(OWN_TILE_TOKENS, long, short, group)
    if not backward:
        return TileMaps(layout_q.sequence_of_token(), *fwd)
    long, short = (_config("dq", q, options, shared)["BLOCK_M"] for shared in (False, True))
    dq = layout_q.split_tiles(OWN_TILE_TOKENS, long, short, group)
    align = 32 if options.dropout_p > 0 else 1  # one draw of dropout serves keys from a multiple of 32 on
    long, short = (_config("dkv", q, options, shared)["BLOCK_N"] for shared in (False, True))
    dkv = layout_k.split_tiles(OWN_TILE_TOKENS, long, short, 1, align)
    return TileMaps(layout_q.sequence_of_token(), *fwd, *dq, layout_k.sequence_of_token(), *dkv)


def _config(kernel: str, q: Tensor, options: Options, shared: bool) -> dict[str, Any]:
    # dropout's mask leaves backward no registers for large tiles
    large = not shared and (kernel == "fwd" or options.dropout_p == 0)
    return attention_config(kernel, q.shape[2], q.element_size(), architecture(q.device), large)


def _launches(long: Tensor | None, short: Tensor | None) -> Iterator[tuple[Tensor, bool]]:
    """Yield the tiles of each launch, and whether sequences share them."""
    for tiles, shared in ((long, False), (short, True)):
        if tiles is not None and tiles.shape[0]:
            yield tiles, shared


def _arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, options: Options) -> dict[str, Any]:
    """Arguments and compile-time flags that the kernels share."""
    scale = options.scale * _LOG2E
    if options.softcap > 0:
        scale *= 2 / options.softcap
    threshold = dropout_threshold(options.dropout_p)
    fast = architecture(q.device) in ATTENTION_TF32
    (stride_qt, stride_qh, _), (stride_kt, stride_kh, _), (stride_vt, stride_vh, _) = (
        x.stride() for x in (q, k, v)
    )
    return dict(
        q_ptr=q, k_ptr=k, v_ptr=v, cu_q_ptr=cu_seqlens_q, cu_k_ptr=cu_seqlens_k,
        seed_ptr=cu_seqlens_q if seed is None else seed,
        stride_qt=stride_qt, stride_qh=stride_qh, stride_kt=stride_kt, stride_kh=stride_kh,
        stride_vt=stride_vt, stride_vh=stride_vh, stride_lh=q.shape[0],
        scale=scale, cap=options.softcap * _LOG2E,
        left=options.left if options.left >= 0 else _MAX_TOKENS,
        right=options.right if options.right >= 0 else _MAX_TOKENS,
        threshold=threshold, keep_scale=65536 / (65536 - threshold),
        G=q.shape[1] // k.shape[1], D=q.shape[2], BLOCK_D=max(16, 1 << (q.shape[2] - 1).bit_length()),
        WINDOW=options.left >= 0 or options.right >= 0, SOFTCAP=options.softcap > 0,
        DROPOUT=options.dropout_p > 0,
        PRECISION=precision(q.dtype) if fast else "ieee",
    )  # fmt: skip


def _descriptors(k: Tensor, v: Tensor, config: dict[str, Any]) -> dict[str, Any]:
    """Split "TMA" off a configuration: where table and tensors allow it, full blocks come by descriptor."""
    config, dim = dict(config), k.shape[2]
    fits = config.pop("TMA") and k.shape[0] > 0 and dim >= 16 and dim & (dim - 1) == 0
    (stride_kt, stride_kh, _), (stride_vt, stride_vh, _), size = k.stride(), v.stride(), k.element_size()
    fits = fits and stride_kh == stride_vh == dim
    if not fits or any(n % 16 for n in (stride_kt * size, stride_vt * size, k.data_ptr(), v.data_ptr())):
        return dict(config, k_desc=None, v_desc=None)
    shape, block = [k.shape[0], k.shape[1] * dim], [config["BLOCK_N"], dim]
    k_desc = TensorDescriptor(k, shape, [stride_kt, 1], block)
    return dict(config, k_desc=k_desc, v_desc=TensorDescriptor(v, shape, [stride_vt, 1], block))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    maps: TileMaps,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Return out (T, H, D) and lse (H, T)."""
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    arguments = _arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, options)
    for tiles, shared in _launches(maps.fwd_long, maps.fwd_short):
        _attn_fwd_kernel[tiles.shape[0], k.shape[1]](
            **arguments, **_descriptors(k, v, _config("fwd", q, options, shared)), SHARED=shared,
            out_ptr=out, lse_ptr=lse, seq_ptr=maps.sequences_q, tiles_ptr=tiles,
            stride_ot=out.stride(0), stride_oh=out.stride(1), **FUSED,
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    maps: TileMaps,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    assert maps.sequences_k is not None or not k.shape[0]
    dout = addressable(dout)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    arguments = _arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, options)
    arguments |= dict(
        dout_ptr=dout, lse2_ptr=lse2, delta_ptr=delta, softmax_scale=options.scale,
        stride_dt=dout.stride(0), stride_dh=dout.stride(1),
    )  # fmt: skip
    if q.shape[0]:
        rows = 2048 // arguments["BLOCK_D"]
        _attn_bwd_stats_kernel[triton.cdiv(q.shape[0], rows), q.shape[1]](
            out_ptr=out, dout_ptr=dout, lse_ptr=lse, dlse_ptr=None if dlse is None else dlse.contiguous(),
            lse2_ptr=lse2, delta_ptr=delta,
            stride_ot=out.stride(0), stride_oh=out.stride(1), stride_dt=dout.stride(0),
            stride_dh=dout.stride(1), stride_lh=lse.stride(0), num_tokens=q.shape[0],
            D=q.shape[2], BLOCK_D=arguments["BLOCK_D"], BLOCK_M=rows, HAS_DLSE=dlse is not None, **FUSED,
        )  # fmt: skip
    for tiles, shared in _launches(maps.dq_long, maps.dq_short):
        _attn_bwd_dq_kernel[tiles.shape[0], k.shape[1]](
            **arguments, **_descriptors(k, v, _config("dq", q, options, shared)), SHARED=shared,
            dq_ptr=dq, seq_ptr=maps.sequences_q, tiles_ptr=tiles,
            stride_gt=dq.stride(0), stride_gh=dq.stride(1), **FUSED,
        )  # fmt: skip
    # above 128 dimensions, 64 in fp32, the registers hold one of the two sums
    both = q.shape[2] * q.element_size() <= 256
    parts = [(True, True)] if both else [(True, False), (False, True)]
    for tiles, shared in _launches(maps.dkv_long, maps.dkv_short):
        for want_dk, want_dv in parts:
            _attn_bwd_dkv_kernel[tiles.shape[0], k.shape[1]](
                **arguments, **_config("dkv", q, options, shared), SHARED=shared,
                dk_ptr=dk, dv_ptr=dv, seq_ptr=maps.sequences_k, tiles_ptr=tiles,
                stride_gt=dk.stride(0), stride_gh=dk.stride(1), DK=want_dk, DV=want_dv, **FUSED,
            )  # fmt: skip
    return dq, dk, dv
