"""Bidirectional packed attention, O = dropout(softmax(mask(softcap(scale * Q K^T)))) V by sequence and head.

Memory is linear in the tokens: only O and one fp32 log-sum-exp per row are kept, scores live on chip and are
computed again in backward. Backward uses no atomics, so that two runs give the same bits.

Layout legend: B sequences, T packed tokens, H query heads, HK key heads, G = H / HK, D head dimension.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from uncausal.kernels.attention_torch import (
    Options,
    attention_backward,
    attention_forward,
    dropout_keep,
    dropout_threshold,
    plan_batch,
)
from uncausal.kernels.launch import architecture, attention_config, resolve_backend
from uncausal.kernels.packing import PackedLayout

LOG2E = 1.4426950408889634
MAX_TOKENS = 1 << 30  # token indices and windows are 32-bit, addresses 64-bit


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
def _span(first_lo, first_hi, last_lo, last_hi, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Cut the tokens that a tile sees into full blocks, which every row sees, and those at the edges."""
    begin = first_lo // ALIGN * ALIGN
    num_head = tl.cdiv(tl.maximum(last_lo - begin, 0), BLOCK)
    full = begin + num_head * BLOCK
    num_full = tl.maximum(first_hi - full, 0) // BLOCK
    tail = full + num_full * BLOCK
    num_tail = tl.cdiv(tl.maximum(last_hi - tail, 0), BLOCK)
    return begin, num_head, full, num_full, tail, num_tail


@triton.jit
def _load_rows(ptr, row, stride, rows, offs_d, mask_row, D: tl.constexpr, MASKED: tl.constexpr):
    """Load [len(rows), len(offs_d)] elements of the rows from `row` on; offsets across blocks in 64 bits."""
    ptrs = ptr + row.to(tl.int64) * stride + rows[:, None] * stride + offs_d[None, :]
    if MASKED:
        return tl.load(ptrs, mask=mask_row[:, None] & (offs_d < D)[None, :], other=0.0)
    if D != offs_d.shape[0]:
        return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _load_block(
    source, row, stride, column, mask_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load [BLOCK, BLOCK_D] keys or values of one head, through a tensor descriptor or from a pointer."""
    if TMA:
        block = source.load([row, column])
    else:
        offs, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        block = _load_rows(source, row, stride, offs, offs_d, mask_row, D, MASKED)
    return block


@triton.jit
def _finite(x):
    """Replace NaN and Inf by 0 and tell the rows that had any: 0 * NaN would reach the sequences beside."""
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(finite, x, 0.0).to(x.dtype), tl.min(finite.to(tl.int32), 1) == 0


@triton.jit
def _keep(seed_ptr, row, head, key, threshold, M: tl.constexpr, N: tl.constexpr):
    """Which of [M, N] scores dropout keeps; key, the first one, is a multiple of 32. See `philox_keep`."""
    group = key // 8 + tl.arange(0, N // 8)
    counter = tl.zeros([M, N // 8], tl.int32)
    r0, r1, r2, r3 = tl.philox(
        tl.load(seed_ptr),
        counter + row[:, None],
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


@triton.jit
def _fwd_step(
    acc, total, top, q, k_ptr, v_ptr, key, stride_kt, stride_vt, lo, hi, end, row, head, pid_h, seed_ptr,
    scale, cap, threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    SHARED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = key + offs_n < end
    k = _load_block(k_ptr, key, stride_kt, pid_h * D, mask_n, D, BLOCK_D, BLOCK_N, MASKED, TMA)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if SOFTCAP:
        s, _ = _softcap(s, scale, cap)
        scale = 1.0
    if MASKED:
        offs_n += key
        s = tl.where((offs_n[None, :] >= lo[:, None]) & (offs_n[None, :] < hi[:, None]), s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * scale - base[:, None])
    alpha = _exp2(top - base) if TMA else tl.exp2(top - base)
    total = total * alpha + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(_keep(seed_ptr, row, head, key, threshold, BLOCK_M, BLOCK_N), p, 0.0)
    v = _load_block(v_ptr, key, stride_vt, pid_h * D, mask_n, D, BLOCK_D, BLOCK_N, MASKED, TMA)
    if MASKED and SHARED:
        v, bad = _finite(v)
        p = tl.where((p > 0) & bad[None, :], float("nan"), p)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def _attn_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, seq_ptr, tiles_ptr, seed_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_lh,
    scale, cap, left, right, threshold, keep_scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SHARED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    first = tl.load(tiles_ptr + 2 * tl.program_id(0))
    last = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1) - 1
    if last < first:
        return
    pid_h = tl.program_id(1)
    lo0, hi0 = _visible(first // G, tl.load(seq_ptr + first // G), cu_q_ptr, cu_k_ptr, left, right, WINDOW)
    lo1, hi1 = _visible(last // G, tl.load(seq_ptr + last // G), cu_q_ptr, cu_k_ptr, left, right, WINDOW)
    begin, num_head, full, num_full, tail, num_tail = _span(lo0, hi0, lo1, hi1, BLOCK_N, 32 if DROPOUT else 1)

    offs_m = tl.minimum(first + tl.arange(0, BLOCK_M), last)  # a row in excess repeats the last one
    token, head = offs_m // G, offs_m % G + pid_h * G
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + token.to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qh + offs_d[None, :]
    q = tl.load(q_ptrs, mask=(offs_d < D)[None, :], other=0.0)
    if not TMA:
        k_ptr += pid_h.to(tl.int64) * stride_kh
        v_ptr += pid_h.to(tl.int64) * stride_vh

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for i in range(num_full):
        acc, total, top = _fwd_step(
            acc, total, top, q, k_ptr, v_ptr, full + i * BLOCK_N, stride_kt, stride_vt, lo0, hi0, hi1,
            token, head, pid_h, seed_ptr, scale, cap, threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, SOFTCAP, DROPOUT, False, PRECISION, SHARED, TMA,
        )  # fmt: skip
    # only blocks at an edge need every row's own bounds: loaded late, they cost the loop above no registers
    lo, hi = _visible(token, tl.load(seq_ptr + token), cu_q_ptr, cu_k_ptr, left, right, WINDOW)
    for i in range(num_head + num_tail):
        key = tl.where(i < num_head, begin + i * BLOCK_N, tail + (i - num_head) * BLOCK_N)
        acc, total, top = _fwd_step(
            acc, total, top, q, k_ptr, v_ptr, key, stride_kt, stride_vt, lo, hi, hi1,
            token, head, pid_h, seed_ptr, scale, cap, threshold,
            D, BLOCK_D, BLOCK_M, BLOCK_N, SOFTCAP, DROPOUT, True, PRECISION, SHARED, TMA,
        )  # fmt: skip

    empty = total == 0
    out = acc * (keep_scale / tl.where(empty, 1.0, total))[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    mask_m = tl.arange(0, BLOCK_M) <= last - first
    out_ptrs = out_ptr + token.to(tl.int64)[:, None] * stride_ot + head[:, None] * stride_oh + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_d < D)[None, :])
    tl.store(lse_ptr + head.to(tl.int64) * stride_lh + token, lse, mask=mask_m)


@triton.jit
def _attn_bwd_delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, stride_ot, stride_oh, stride_dt, stride_dh, stride_lh, num_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * dout) - dlse."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_h = tl.program_id(1).to(tl.int64)
    offs_d, mask_m = tl.arange(0, BLOCK_D), token < num_tokens
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    rows = token.to(tl.int64)[:, None]
    out = tl.load(out_ptr + pid_h * stride_oh + rows * stride_ot + offs_d[None, :], mask=mask, other=0.0)
    dout = tl.load(dout_ptr + pid_h * stride_dh + rows * stride_dt + offs_d[None, :], mask=mask, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + pid_h * stride_lh + token, mask=mask_m, other=0.0)
    tl.store(delta_ptr + pid_h * stride_lh + token, delta, mask=mask_m)


@triton.jit
def _bwd_scores(s, dp, lse, delta, keep, mask, scale, cap, keep_scale,
                SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Return p after dropout and ds, from raw scores and the gradient of p; lse and delta broadcast."""
    tanh = s
    if SOFTCAP:
        s, tanh = _softcap(s, scale, cap)
        scale = 1.0
    p = tl.exp2(s * scale - lse)
    if MASKED:
        p = tl.where(mask, p, 0.0)
    if DROPOUT:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if SOFTCAP:
        ds *= 1 - tanh * tanh
    if MASKED:  # again, for 0 * NaN
        ds = tl.where(mask, ds, 0.0)
    if DROPOUT:
        p = tl.where(keep, p * keep_scale, 0.0)
    return p, ds


@triton.jit
def _bwd_dq_step(
    dq, q, dout, lse, delta, k_ptr, v_ptr, key, stride_kt, stride_vt, lo, hi, end, row, head, pid_h, seed_ptr,
    scale, cap, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    SHARED: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = key + offs_n < end
    k = _load_block(k_ptr, key, stride_kt, pid_h * D, mask_n, D, BLOCK_D, BLOCK_N, MASKED, TMA)
    v = _load_block(v_ptr, key, stride_vt, pid_h * D, mask_n, D, BLOCK_D, BLOCK_N, MASKED, TMA)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    mask = s
    if MASKED:
        mask = (key + offs_n[None, :] >= lo[:, None]) & (key + offs_n[None, :] < hi[:, None])
    keep = s
    if DROPOUT:
        keep = _keep(seed_ptr, row, head, key, threshold, BLOCK_M, BLOCK_N)
    _, ds = _bwd_scores(
        s, dp, lse[:, None], delta[:, None], keep, mask, scale, cap, keep_scale, SOFTCAP, DROPOUT, MASKED
    )
    if MASKED and SHARED:
        k, _ = _finite(k)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _attn_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, seq_ptr, tiles_ptr,
    seed_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    stride_gt, stride_gh, stride_lh,
    softmax_scale, scale, cap, left, right, threshold, keep_scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SHARED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    first = tl.load(tiles_ptr + 2 * tl.program_id(0))
    last = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1) - 1
    if last < first:
        return
    pid_h = tl.program_id(1)
    lo0, hi0 = _visible(first // G, tl.load(seq_ptr + first // G), cu_q_ptr, cu_k_ptr, left, right, WINDOW)
    lo1, hi1 = _visible(last // G, tl.load(seq_ptr + last // G), cu_q_ptr, cu_k_ptr, left, right, WINDOW)
    begin, num_head, full, num_full, tail, num_tail = _span(lo0, hi0, lo1, hi1, BLOCK_N, 32 if DROPOUT else 1)

    offs_m = tl.minimum(first + tl.arange(0, BLOCK_M), last)
    token, head = offs_m // G, offs_m % G + pid_h * G
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    rows = token.to(tl.int64)[:, None]
    q = tl.load(
        q_ptr + rows * stride_qt + head[:, None] * stride_qh + offs_d[None, :], mask=mask_d, other=0.0
    )
    dout = tl.load(
        dout_ptr + rows * stride_dt + head[:, None] * stride_dh + offs_d[None, :], mask=mask_d, other=0.0
    )
    lse = tl.load(lse_ptr + head.to(tl.int64) * stride_lh + token) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(delta_ptr + head.to(tl.int64) * stride_lh + token)
    if not TMA:
        k_ptr += pid_h.to(tl.int64) * stride_kh
        v_ptr += pid_h.to(tl.int64) * stride_vh

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(num_full):
        dq = _bwd_dq_step(
            dq, q, dout, lse, delta, k_ptr, v_ptr, full + i * BLOCK_N, stride_kt, stride_vt, lo0, hi0, hi1,
            token, head, pid_h, seed_ptr, scale, cap, threshold, keep_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, SOFTCAP, DROPOUT, False, PRECISION, SHARED, TMA,
        )  # fmt: skip
    # only blocks at an edge need every row's own bounds: loaded late, they cost the loop above no registers
    lo, hi = _visible(token, tl.load(seq_ptr + token), cu_q_ptr, cu_k_ptr, left, right, WINDOW)
    for i in range(num_head + num_tail):
        key = tl.where(i < num_head, begin + i * BLOCK_N, tail + (i - num_head) * BLOCK_N)
        dq = _bwd_dq_step(
            dq, q, dout, lse, delta, k_ptr, v_ptr, key, stride_kt, stride_vt, lo, hi, hi1,
            token, head, pid_h, seed_ptr, scale, cap, threshold, keep_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, SOFTCAP, DROPOUT, True, PRECISION, SHARED, TMA,
        )  # fmt: skip
    mask_m = tl.arange(0, BLOCK_M) <= last - first
    dq_ptrs = dq_ptr + rows * stride_gt + head[:, None] * stride_gh + offs_d[None, :]
    tl.store(dq_ptrs, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d)


@triton.jit
def _bwd_dkv_step(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, row, stride_qt, stride_qh, stride_dt, stride_dh,
    stride_lh, lo, hi, end, key, seed_ptr, scale, cap, threshold, keep_scale, pid_h,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    offs_m, offs_d = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token, head = offs_m // G, offs_m % G + pid_h * G
    rows, stat = token.to(tl.int64)[:, None], head.to(tl.int64) * stride_lh + token
    q_ptrs = q_ptr + rows * stride_qt + head[:, None] * stride_qh + offs_d[None, :]
    dout_ptrs = dout_ptr + rows * stride_dt + head[:, None] * stride_dh + offs_d[None, :]
    if MASKED:
        mask_m = offs_m < end
        mask = mask_m[:, None] & (offs_d < D)[None, :]
        q, dout = tl.load(q_ptrs, mask=mask, other=0.0), tl.load(dout_ptrs, mask=mask, other=0.0)
        lse = tl.load(lse_ptr + stat, mask=mask_m, other=float("-inf")) * 1.4426950408889634
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(delta_ptr + stat, mask=mask_m, other=0.0)
    else:
        mask_d = (offs_d < D)[None, :]
        q, dout = tl.load(q_ptrs, mask=mask_d, other=0.0), tl.load(dout_ptrs, mask=mask_d, other=0.0)
        lse = tl.load(lse_ptr + stat) * 1.4426950408889634
        delta = tl.load(delta_ptr + stat)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    mask_s = s
    if MASKED:
        mask_s = (offs_m[None, :] >= lo[:, None]) & (offs_m[None, :] < hi[:, None])
    keep = s
    if DROPOUT:
        keep = tl.trans(_keep(seed_ptr, token, head, key, threshold, BLOCK_M, BLOCK_N))
    p, ds = _bwd_scores(
        s, dp, lse[None, :], delta[None, :], keep, mask_s, scale, cap, keep_scale, SOFTCAP, DROPOUT, MASKED
    )
    if MASKED and SHARED:
        q, _ = _finite(q)
        dout, bad = _finite(dout)
        p = tl.where((p > 0) & bad[None, :], float("nan"), p)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _attn_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    seq_ptr, tiles_ptr, seed_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    stride_gt, stride_gh, stride_lh,
    softmax_scale, scale, cap, left, right, threshold, keep_scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    first = tl.load(tiles_ptr + 2 * tl.program_id(0))
    last = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1) - 1
    if last < first:
        return
    pid_h = tl.program_id(1).to(tl.int64)
    # seen from a key, the window opens the other way
    lo0, hi0 = _visible(first, tl.load(seq_ptr + first), cu_k_ptr, cu_q_ptr, right, left, WINDOW)
    lo1, hi1 = _visible(last, tl.load(seq_ptr + last), cu_k_ptr, cu_q_ptr, right, left, WINDOW)
    begin, num_head, full, num_full, tail, num_tail = _span(lo0 * G, hi0 * G, lo1 * G, hi1 * G, BLOCK_M, 1)

    base = first // 32 * 32 if DROPOUT else first
    offs_n = base + tl.arange(0, BLOCK_N)
    mask_n = (offs_n >= first) & (offs_n <= last)
    token = tl.minimum(tl.maximum(offs_n, first), last)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    rows = token.to(tl.int64)[:, None]
    k = tl.load(k_ptr + pid_h * stride_kh + rows * stride_kt + offs_d[None, :], mask=mask_d, other=0.0)
    v = tl.load(v_ptr + pid_h * stride_vh + rows * stride_vt + offs_d[None, :], mask=mask_d, other=0.0)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(num_full):
        dk, dv = _bwd_dkv_step(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, full + i * BLOCK_M,
            stride_qt, stride_qh, stride_dt, stride_dh, stride_lh, lo0, hi0, hi1 * G, base, seed_ptr,
            scale, cap, threshold, keep_scale, tl.program_id(1),
            G, D, BLOCK_D, BLOCK_M, BLOCK_N, SOFTCAP, DROPOUT, False, PRECISION, SHARED,
        )  # fmt: skip
    lo, hi = _visible(token, tl.load(seq_ptr + token), cu_k_ptr, cu_q_ptr, right, left, WINDOW)
    lo, hi = lo * G, hi * G
    for i in range(num_head + num_tail):
        row = tl.where(i < num_head, begin + i * BLOCK_M, tail + (i - num_head) * BLOCK_M)
        dk, dv = _bwd_dkv_step(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, row,
            stride_qt, stride_qh, stride_dt, stride_dh, stride_lh, lo, hi, hi1 * G, base, seed_ptr,
            scale, cap, threshold, keep_scale, tl.program_id(1),
            G, D, BLOCK_D, BLOCK_M, BLOCK_N, SOFTCAP, DROPOUT, True, PRECISION, SHARED,
        )  # fmt: skip
    mask = mask_n[:, None] & mask_d
    offs = pid_h * stride_gh + rows * stride_gt + offs_d[None, :]
    tl.store(dk_ptr + offs, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def _kernel_options(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, options: Options) -> dict[str, Any]:
    """Arguments and compile-time flags that the kernels share."""
    windowed = options.left >= 0 or options.right >= 0
    scale = options.scale * LOG2E
    if options.softcap > 0:
        scale *= 2 / options.softcap
    return dict(
        q_ptr=q, k_ptr=k, v_ptr=v, cu_q_ptr=cu_seqlens_q, cu_k_ptr=cu_seqlens_k,
        seed_ptr=cu_seqlens_q if seed is None else seed,
        stride_qt=q.stride(0), stride_qh=q.stride(1), stride_kt=k.stride(0), stride_kh=k.stride(1),
        stride_vt=v.stride(0), stride_vh=v.stride(1), stride_lh=q.shape[0],
        scale=scale, cap=options.softcap * LOG2E,
        left=options.left if options.left >= 0 else MAX_TOKENS,
        right=options.right if options.right >= 0 else MAX_TOKENS,
        threshold=dropout_threshold(options.dropout_p),
        keep_scale=65536 / (65536 - dropout_threshold(options.dropout_p)),
        G=q.shape[1] // k.shape[1], D=q.shape[2], BLOCK_D=max(16, triton.next_power_of_2(q.shape[2])),
        WINDOW=windowed, SOFTCAP=options.softcap > 0, DROPOUT=options.dropout_p > 0,
        PRECISION="ieee", SHARED=options.shared,
    )  # fmt: skip


def _describe(arguments: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Complete a launch: where table and tensors allow it, keys come through TMA descriptors."""
    config = dict(config)
    tensors = {name: arguments[name] for name in ("k_ptr", "v_ptr")}
    dim = arguments["D"]
    if (
        config.pop("TMA", False)
        and dim == arguments["BLOCK_D"]
        and all(
            x.stride(1) == dim
            and x.stride(0) * x.element_size() % 16 == 0
            and x.data_ptr() % 16 == 0
            and len(x)
            for x in tensors.values()
        )
    ):
        for name, x in tensors.items():
            shape, strides = [x.shape[0], x.shape[1] * dim], [x.stride(0), 1]
            arguments = arguments | {name: TensorDescriptor(x, shape, strides, [config["BLOCK_N"], dim])}
        return arguments | config | dict(TMA=True)
    return arguments | config | dict(TMA=False)


def _maps(
    layout_q: PackedLayout,
    layout_k: PackedLayout,
    q: Tensor,
    k: Tensor,
    dropout: bool,
    backward: bool,
    shared: bool,
):
    """Return the maps that the kernels walk: tokens' sequences and tiles, of queries and then of keys."""
    group, arch = q.shape[1] // k.shape[1], architecture(q.device)
    config = {
        kernel: attention_config(kernel, q.shape[2], q.element_size(), arch, shared)
        for kernel in ("fwd", "dq", "dkv")
    }
    maps = [layout_q.sequence_of_token(), layout_q.tiles(config["fwd"]["BLOCK_M"], group)]
    if backward:
        # dropout wants keys from a multiple of 32 on, so that a tile gives up to 31 of them away
        block = config["dkv"]["BLOCK_N"] - (32 if dropout else 0)
        maps += [layout_q.tiles(config["dq"]["BLOCK_M"], group)]
        maps += [layout_k.sequence_of_token(), layout_k.tiles(block)]
    return maps


def _triton_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seed, maps, options: Options
) -> tuple[Tensor, Tensor]:
    sequences, tiles = maps[:2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    if len(tiles):
        config = attention_config("fwd", q.shape[2], q.element_size(), architecture(q.device), options.shared)
        _attn_fwd_kernel[len(tiles), k.shape[1]](
            **_describe(_kernel_options(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, options), config),
            out_ptr=out, lse_ptr=lse, seq_ptr=sequences, tiles_ptr=tiles,
            stride_ot=out.stride(0), stride_oh=out.stride(1),
        )  # fmt: skip
    return out, lse


def _triton_backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed, maps, options: Options):
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    arch, dim = architecture(q.device), q.shape[2]
    sequences_q, _, tiles_q, sequences_k, tiles_k = maps
    shared = _kernel_options(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, options)
    shared |= dict(
        dout_ptr=dout, lse_ptr=lse, delta_ptr=delta, softmax_scale=options.scale,
        stride_dt=dout.stride(0), stride_dh=dout.stride(1),
    )  # fmt: skip
    if len(tiles_q):
        _attn_bwd_delta_kernel[triton.cdiv(q.shape[0], 64), q.shape[1]](
            out, dout, out if dlse is None else dlse, delta, out.stride(0), out.stride(1),
            dout.stride(0), dout.stride(1), q.shape[0], q.shape[0],
            D=dim, BLOCK_D=shared["BLOCK_D"], BLOCK_M=64, HAS_DLSE=dlse is not None,
        )  # fmt: skip
        _attn_bwd_dq_kernel[len(tiles_q), k.shape[1]](
            **_describe(shared, attention_config("dq", dim, q.element_size(), arch, options.shared)),
            dq_ptr=dq, seq_ptr=sequences_q, tiles_ptr=tiles_q, stride_gt=dq.stride(0), stride_gh=dq.stride(1),
        )  # fmt: skip
    if len(tiles_k):
        _attn_bwd_dkv_kernel[len(tiles_k), k.shape[1]](
            **shared, dk_ptr=dk, dv_ptr=dv, seq_ptr=sequences_k, tiles_ptr=tiles_k,
            stride_gt=dk.stride(0), stride_gh=dk.stride(1),
            **attention_config("dkv", dim, q.element_size(), arch, options.shared),
        )  # fmt: skip
    return dq, dk, dv


def _torch_arguments(
    q, k, cu_seqlens_q, cu_seqlens_k, seed, dropout_p, softmax_scale, left, right, softcap, direct=True
):
    heads = k.shape[1]
    direct = direct and q.device.type == "cpu" and left < 0 and right < 0 and softcap == 0 and dropout_p == 0
    cu_q, cu_k = tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist())
    plan = plan_batch(cu_q, cu_k, heads, q.shape[1] // heads, direct, q.device)
    return plan, Options(softmax_scale, left, right, softcap, dropout_p, 0 if seed is None else int(seed))


@torch.library.custom_op("uncausal::flash_attn_varlen", mutates_args=())
def _flash_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    maps: list[Tensor],
    dropout_p: float,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend != "torch":
        shared = backend == "triton_shared"  # several sequences may share a tile
        options = Options(softmax_scale, left, right, softcap, dropout_p, 0, shared)
        return _triton_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, maps, options)
    arguments = (cu_seqlens_q, cu_seqlens_k, seed, dropout_p, softmax_scale, left, right, softcap)
    return attention_forward(q, k, v, *_torch_arguments(q, k, *arguments))


@_flash_attn_varlen.register_fake
def _(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seed, maps, dropout_p, softmax_scale, left, right, softcap, backend
):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[1], q.shape[0], dtype=lse_dtype
    )


@torch.library.custom_op("uncausal::flash_attn_varlen_backward", mutates_args=())
def _flash_attn_varlen_backward(
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
    maps: list[Tensor],
    dropout_p: float,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend != "torch":
        shared = backend == "triton_shared"  # several sequences may share a tile
        options = Options(softmax_scale, left, right, softcap, dropout_p, 0, shared)
        if dlse is not None:
            dlse = dlse.contiguous()
        return _triton_backward(
            dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed, maps, options
        )
    arguments = (cu_seqlens_q, cu_seqlens_k, seed, dropout_p, softmax_scale, left, right, softcap)
    return attention_backward(
        dout, dlse, q, k, v, out, lse, *_torch_arguments(q, k, *arguments, dlse is None)
    )


@_flash_attn_varlen_backward.register_fake
def _(dout, dlse, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, seed, maps, *options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, seed, *maps)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed, *maps = ctx.saved_tensors
    if dout is None and dlse is None:
        return *(None,) * 6, [None] * len(maps), *(None,) * 6
    dout = torch.zeros_like(out) if dout is None else dout
    grads = _flash_attn_varlen_backward(
        dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed, maps, *ctx.options
    )
    return *grads, None, None, None, [None] * len(maps), *(None,) * 6


_flash_attn_varlen.register_autograd(_backward, setup_context=_setup_context)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    layout: PackedLayout | tuple[PackedLayout, PackedLayout] | None = None,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
):
    """Attend within each sequence of a packed batch, in both directions unless a window says otherwise.

    Args:
        q: (T, H, D) packed queries, fp16, bf16 or fp32 (fp64 on the torch backend).
        k, v: (Tk, HK, D) packed keys and values; H is a multiple of HK.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 offsets of the sequences, from 0 to T and Tk.
        max_seqlen_q, max_seqlen_k: accepted for compatibility; nothing needs them.
        dropout_p: probability of dropping a score after softmax, rounded to a multiple of 2^-16.
        softmax_scale: D ** -0.5 when None.
        causal: the window (window_size[0], 0).
        window_size: (left, right) keys visible around the diagonal, -1 for all; where a sequence has other
            lengths of queries and keys, its last query faces its last key.
        softcap: cap of the scores, softcap * tanh(score / softcap); 0 for none.
        alibi_slopes, block_table: not supported.
        deterministic: accepted for compatibility; backward is always deterministic.
        return_attn_probs: also return the log-sum-exp.
        layout: the batch's PackedLayout, or one for the queries and one for the keys: keeps the maps of the
            kernels.
        dropout_seed: (1,) int64 tensor or integer that replays a dropout mask; drawn from torch's generator
            when None.
        backend: "auto", "triton" or "torch".

    Returns:
        out (T, H, D); with return_attn_probs (out, lse, None), where lse (H, T) is differentiable, in natural
        units and -inf for a query without keys, whose output and gradients are zero.

    Raises:
        NotImplementedError: for an argument that flash-attn has and this function has not.
        ValueError: for shapes, dtypes or devices that don't fit.

    Source: Dao, FlashAttention-2 (2023), algorithms 1 and 2.
    """
    if alibi_slopes is not None:
        raise NotImplementedError("alibi_slopes is not supported")
    if block_table is not None:
        raise NotImplementedError("block_table is not supported")
    _check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    left, right = (-1 if w is None or w < 0 else int(w) for w in window_size)
    right = 0 if causal else right
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    seed = _dropout_seed(dropout_p, dropout_seed, q.device)
    backend = resolve_backend(backend, q)
    maps: list[Tensor] = []
    if backend == "triton":
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        layouts = _layouts(layout, cu_seqlens_q, cu_seqlens_k, q, k)
        backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        shared = any(layout.lengths is None or min(layout.lengths, default=0) < 128 for layout in layouts)
        backend = "triton_shared" if shared else "triton"
        maps = _maps(*layouts, q, k, dropout_p > 0, backward, shared)
    out, lse = _flash_attn_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seed,
        maps,
        float(dropout_p),
        scale,
        left,
        right,
        float(softcap),
        backend,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    *,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
):
    """Attend within each sequence of a dense batch; see `flash_attn_varlen_func` for the other arguments.

    Args:
        q: (B, L, H, D) queries.
        k, v: (B, Lk, HK, D) keys and values.

    Returns:
        out (B, L, H, D); with return_attn_probs (out, lse (B, H, L), None).
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k, v must be (B, L, H, D), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch = q.shape[0]
    cu_q, cu_k = (torch.arange(batch + 1, device=q.device, dtype=torch.int32) * x.shape[1] for x in (q, k))
    out, lse, _ = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_q,
        cu_k,
        q.shape[1],
        k.shape[1],
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        True,
        dropout_seed=dropout_seed,
        backend=backend,
    )
    out = out.view(q.shape)
    return (out, lse.unflatten(1, (batch, -1)).transpose(0, 1), None) if return_attn_probs else out


def _layouts(layout, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q: Tensor, k: Tensor):
    if isinstance(layout, PackedLayout):
        return layout, layout
    if layout is not None:
        return layout
    layout_q = PackedLayout.from_cu_seqlens(cu_seqlens_q, q.shape[0])
    if cu_seqlens_k is cu_seqlens_q:
        return layout_q, layout_q
    return layout_q, PackedLayout.from_cu_seqlens(cu_seqlens_k, k.shape[0])


def _dropout_seed(dropout_p: float, seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(-(2**62), 2**62, (1,), device=device)
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64).view(1)
    return torch.tensor([seed], dtype=torch.int64, device=device)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    if (
        q.dim() != 3
        or k.dim() != 3
        or k.shape != v.shape
        or q.shape[2] != k.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            "expected q (T, H, D) and k, v (Tk, HK, D) with H a multiple of HK, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k, v must share a floating point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dim() != 1 or cu.dtype != torch.int32 or len(cu) == 0:
            raise ValueError(f"{name} must be (B + 1,) int32, got {tuple(cu.shape)} {cu.dtype}")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens of queries and keys differ in length: {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    devices = {x.device for x in (q, k, v, cu_seqlens_q, cu_seqlens_k)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {sorted(map(str, devices))}")


def flash_attn_varlen_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Specify `flash_attn_varlen_func` in plain torch, in the dtype of q, sequence by sequence.

    Returns:
        out (T, H, D) and lse (H, T).
    """
    group = q.shape[1] // k.shape[1]
    left, right = window_size[0], 0 if causal else window_size[1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [q[:0]], [q[:0, :, 0].t()]
    for i in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        qi = q[rows].transpose(0, 1)  # [H, L, D]
        ki, vi = (x[keys].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))  # [H, Lk, D]
        scores = qi @ ki.mT * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        len_q, len_k = scores.shape[1:]
        offset = (
            torch.arange(len_k, device=q.device)
            - torch.arange(len_q, device=q.device)[:, None]
            - (len_k - len_q)
        )
        hidden = torch.zeros_like(offset, dtype=torch.bool)
        if left >= 0:
            hidden |= offset < -left
        if right >= 0:
            hidden |= offset > right
        alone = hidden.all(-1)[:, None]  # queries without keys
        scores = scores.masked_fill(hidden & ~alone, -math.inf)
        lses.append(scores.logsumexp(-1).masked_fill(alone[:, 0], -math.inf))
        probs = scores.softmax(-1).masked_fill(alone, 0)
        if dropout_p > 0:
            assert dropout_seed is not None
            tokens = torch.arange(len_q, device=q.device)[None, None] + starts_q[i]
            heads = torch.arange(q.shape[1], device=q.device)[None, :, None]
            first = torch.tensor([starts_k[i]], device=q.device)
            keep = dropout_keep(int(dropout_seed), dropout_p, tokens, heads, first, len_k)[0]
            probs = probs * keep / (1 - dropout_threshold(dropout_p) / 65536)
        outs.append((probs @ vi).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses, 1)
