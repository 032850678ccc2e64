"""In-batch InfoNCE with Triton: statistics and gradients of the in-batch negatives, tile by tile.

Rows x (N, D) meet columns y (M, D): the queries and the keys, or the reverse for what belongs to a key. The
positive of row i is column i + diagonal. Programs split the columns among them when the rows alone don't fill
the device; their partial results are added up afterwards in a fixed order: no atomics, the same bits.
Logits are in base 2 inside.

Up to D = 256 the gradient kernel keeps its (BLOCK_M, D) accumulator on chip. Above, that would shrink the
tiles: a kernel writes the weights of a chunk of rows, (rows, M), and two large matrix products take over.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# (inside a kernel, and in a launch, values are not what their annotations say)

import math
from contextlib import suppress

import torch
import triton
import triton.language as tl
from torch import Tensor

from uncausal.kernels.cpu.info_nce_torch import CACHED_BYTES, Negatives
from uncausal.kernels.launch import FUSED, architecture, info_nce_config, precision, processors

_LOG2E = math.log2(math.e)
_FUSED_D = 256
_CHUNK_BYTES = CACHED_BYTES  # weights of one chunk of rows, above _FUSED_D
_CHUNK_ROWS = 1024  # at least: every chunk adds to all of dK
_COUNTS = [
    "N",
    "M",
    "diagonal",
    "columns_per_split",
]  # vary by batch: nothing is compiled for one that is 1 or even


@triton.jit
def _scores(
    x_ptr, y_ptr, offs_m, offs_n, mask_m, mask_n, stride_x, stride_y,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x y^T for one tile, [BLOCK_M, BLOCK_N], walking D."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x
    y_rows = y_ptr + offs_n.to(tl.int64)[None, :] * stride_y
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = tl.load(x_rows + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0)
        y = tl.load(y_rows + offs_d[:, None], mask=mask_n[None, :] & mask_d[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _keep(
    offs_m, offs_n, mask_m, mask_n, x_id, y_ids_ptr, diagonal, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """Which elements of the tile exist, are no positives and have two different ids, [BLOCK_M, BLOCK_N]."""
    keep = mask_m[:, None] & mask_n[None, :] & (offs_n[None, :] != offs_m[:, None] + diagonal)
    if HAS_IDS:
        y_id = tl.load(y_ids_ptr + offs_n, mask=mask_n, other=0)
        keep = keep & (x_id[:, None] != y_id[None, :])
    return keep


@triton.jit
def _weights(
    z, keep, x_total, x_weight, x_limit, y_total_ptr, y_weight_ptr, y_limit_ptr, offs_n, mask_n,
    HAS_X: tl.constexpr, HAS_Y: tl.constexpr, HAS_LIMIT: tl.constexpr,
):  # fmt: skip
    """Loss gradient of the tile's logits, and its row sums and column sums by the softmax they come from."""
    # A dropped logit may exceed the totals by far: where() after exp2 also drops its infinity.
    g = tl.zeros_like(z)
    x_mass = tl.zeros([z.shape[0]], tl.float32)
    y_mass = tl.zeros([z.shape[1]], tl.float32)
    if HAS_X:
        p = tl.exp2(z - x_total[:, None]) * x_weight[:, None]
        if HAS_LIMIT:
            p = tl.where(z <= x_limit[:, None], p, 0.0)
        g = tl.where(keep, p, 0.0)
        x_mass = tl.sum(g, 1)
    if HAS_Y:
        y_total = tl.load(y_total_ptr + offs_n, mask=mask_n, other=0.0)
        y_weight = tl.load(y_weight_ptr + offs_n, mask=mask_n, other=0.0)
        p = tl.exp2(z - y_total[None, :]) * y_weight[None, :]
        if HAS_LIMIT:
            y_limit = tl.load(y_limit_ptr + offs_n, mask=mask_n, other=0.0)
            p = tl.where(z <= y_limit[None, :], p, 0.0)
        p = tl.where(keep, p, 0.0)
        y_mass = tl.sum(p, 0)
        g += p
    return g, x_mass, y_mass


@triton.jit
def _info_nce_lse_kernel(
    x_ptr, y_ptr, lse_ptr, limit_ptr, x_ids_ptr, y_ids_ptr, scale_ptr,
    N, M, diagonal, columns_per_split, stride_x, stride_y,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LIMIT: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_split = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < N
    scale = tl.load(scale_ptr)
    limit = tl.load(limit_ptr + offs_m, mask=mask_m, other=0.0) if HAS_LIMIT else 0.0
    x_id = tl.load(x_ids_ptr + offs_m, mask=mask_m, other=0) if HAS_IDS else 0
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = pid_split * columns_per_split
    for start in range(first, min(first + columns_per_split, M), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < M
        z = _scores(
            x_ptr, y_ptr, offs_m, offs_n, mask_m, mask_n, stride_x, stride_y,
            D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        ) * scale  # fmt: skip
        keep = _keep(offs_m, offs_n, mask_m, mask_n, x_id, y_ids_ptr, diagonal, HAS_IDS)
        if HAS_LIMIT:
            keep = keep & (z <= limit[:, None])
        z = tl.where(keep, z, float("-inf"))  # before the maximum, or padding could win it
        m_new = tl.maximum(m, tl.max(z, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        total = total * tl.exp2(m - m_safe) + tl.sum(tl.exp2(z - m_safe[:, None]), 1)
        m = m_new
    lse = m + tl.log2(total)  # no negatives: -inf
    tl.store(lse_ptr + pid_split.to(tl.int64) * N + offs_m, lse, mask=mask_m)


@triton.jit
def _info_nce_grad_kernel(
    x_ptr, y_ptr, out_ptr, mass_ptr,
    x_total_ptr, x_weight_ptr, x_limit_ptr, y_total_ptr, y_weight_ptr, y_limit_ptr,
    x_ids_ptr, y_ids_ptr, scale_ptr,
    N, M, diagonal, columns_per_split, stride_x, stride_y,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_X: tl.constexpr, HAS_Y: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_split = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D], all of D
    mask_m, mask_d = offs_m < N, offs_d < D
    scale = tl.load(scale_ptr)
    x_total = tl.load(x_total_ptr + offs_m, mask=mask_m, other=0.0) if HAS_X else 0.0
    x_weight = tl.load(x_weight_ptr + offs_m, mask=mask_m, other=0.0) if HAS_X else 0.0
    x_limit = tl.load(x_limit_ptr + offs_m, mask=mask_m, other=0.0) if HAS_X and HAS_LIMIT else 0.0
    x_id = tl.load(x_ids_ptr + offs_m, mask=mask_m, other=0) if HAS_IDS else 0
    mask_x = mask_m[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + offs_m.to(tl.int64)[:, None] * stride_x + offs_d[None, :], mask=mask_x, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    first = pid_split * columns_per_split
    for start in range(first, min(first + columns_per_split, M), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        mask_n = offs_n < M
        y_ptrs = y_ptr + offs_n.to(tl.int64)[:, None] * stride_y + offs_d[None, :]
        y = tl.load(y_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        z = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale
        keep = _keep(offs_m, offs_n, mask_m, mask_n, x_id, y_ids_ptr, diagonal, HAS_IDS)
        g, x_mass, _ = _weights(
            z, keep, x_total, x_weight, x_limit, y_total_ptr, y_weight_ptr, y_limit_ptr, offs_n, mask_n,
            HAS_X, HAS_Y, HAS_LIMIT,
        )  # fmt: skip
        mass += x_mass
        acc = tl.dot(g.to(y.dtype), y, acc, input_precision=PRECISION)
    rows = pid_split.to(tl.int64) * N + offs_m
    tl.store(out_ptr + rows[:, None] * D + offs_d[None, :], acc, mask=mask_x)
    if HAS_X:
        tl.store(mass_ptr + rows, mass, mask=mask_m)


@triton.jit(do_not_specialize=_COUNTS)
def _info_nce_weight_kernel(
    x_ptr, y_ptr, out_ptr, x_mass_ptr, y_mass_ptr,
    x_total_ptr, x_weight_ptr, x_limit_ptr, y_total_ptr, y_weight_ptr, y_limit_ptr,
    x_ids_ptr, y_ids_ptr, scale_ptr,
    N, M, diagonal, stride_x, stride_y, stride_o,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_Y: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tl.program_id(1), tl.program_id(0)  # neighbours share rows
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask_m, mask_n = offs_m < N, offs_n < M
    z = _scores(
        x_ptr, y_ptr, offs_m, offs_n, mask_m, mask_n, stride_x, stride_y,
        D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    ) * tl.load(scale_ptr)  # fmt: skip
    x_total = tl.load(x_total_ptr + offs_m, mask=mask_m, other=0.0)
    x_weight = tl.load(x_weight_ptr + offs_m, mask=mask_m, other=0.0)
    x_limit = tl.load(x_limit_ptr + offs_m, mask=mask_m, other=0.0) if HAS_LIMIT else 0.0
    x_id = tl.load(x_ids_ptr + offs_m, mask=mask_m, other=0) if HAS_IDS else 0
    keep = _keep(offs_m, offs_n, mask_m, mask_n, x_id, y_ids_ptr, diagonal, HAS_IDS)
    g, x_mass, y_mass = _weights(
        z, keep, x_total, x_weight, x_limit, y_total_ptr, y_weight_ptr, y_limit_ptr, offs_n, mask_n,
        True, HAS_Y, HAS_LIMIT,
    )  # fmt: skip
    ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_o + offs_n[None, :]
    tl.store(ptrs, g.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
    tl.store(x_mass_ptr + pid_n.to(tl.int64) * N + offs_m, x_mass, mask=mask_m)
    if HAS_Y:
        tl.store(y_mass_ptr + pid_m.to(tl.int64) * M + offs_n, y_mass, mask=mask_n)


def _split(rows: int, columns: int, block_m: int, block_n: int, device: torch.device) -> tuple[int, int]:
    """Number of programs that share the columns of one row block, and the columns of each."""
    row_blocks, column_blocks = triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)
    splits = max(1, min(2 * processors(device) // max(row_blocks, 1), column_blocks))
    per_split = triton.cdiv(column_blocks, splits) * block_n
    return triton.cdiv(columns, per_split), per_split


def _lse(x, y, scale, limit, x_ids, y_ids, diagonal: int) -> Tensor:
    """Natural log-sum-exp over the columns that are negatives, (N,)."""
    (n, d), m = x.shape, len(y)
    config = info_nce_config("lse", d, x.element_size(), architecture(x.device))
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    splits, per_split = _split(n, m, block_m, block_n, x.device)
    lse = torch.empty(splits, n, dtype=torch.float32, device=x.device)
    _info_nce_lse_kernel[(triton.cdiv(n, block_m), splits)](
        x_ptr=x, y_ptr=y, lse_ptr=lse, limit_ptr=limit, x_ids_ptr=x_ids, y_ids_ptr=y_ids, scale_ptr=scale,
        N=n, M=m, diagonal=diagonal, columns_per_split=per_split, stride_x=x.stride(0), stride_y=y.stride(0),
        D=d, HAS_LIMIT=limit is not None, HAS_IDS=x_ids is not None, PRECISION=precision(x.dtype),
        **config, **FUSED,
    )  # fmt: skip
    lse = lse / _LOG2E
    return lse[0] if splits == 1 else lse.logsumexp(0)


def _grad(x, y, scale, x_side, y_side, x_ids, y_ids, diagonal: int) -> tuple[Tensor, Tensor]:
    """sum_j g_ij y_j (N, D) and each row's mass (N,), fp32; a side is a softmax's (total, weight, limit)."""
    (n, d), m = x.shape, len(y)
    config = info_nce_config("grad", d, x.element_size(), architecture(x.device))
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    splits, per_split = _split(n, m, block_m, block_n, x.device)
    out = torch.empty(splits, n, d, dtype=torch.float32, device=x.device)
    mass = torch.empty(splits, n if x_side else 0, dtype=torch.float32, device=x.device)
    x_total, x_weight, x_limit = x_side or (None,) * 3
    y_total, y_weight, y_limit = y_side or (None,) * 3
    _info_nce_grad_kernel[(triton.cdiv(n, block_m), splits)](
        x_ptr=x, y_ptr=y, out_ptr=out, mass_ptr=mass,
        x_total_ptr=x_total, x_weight_ptr=x_weight, x_limit_ptr=x_limit,
        y_total_ptr=y_total, y_weight_ptr=y_weight, y_limit_ptr=y_limit,
        x_ids_ptr=x_ids, y_ids_ptr=y_ids, scale_ptr=scale,
        N=n, M=m, diagonal=diagonal, columns_per_split=per_split, stride_x=x.stride(0),
        stride_y=y.stride(0), D=d, HAS_X=x_side is not None, HAS_Y=y_side is not None,
        HAS_LIMIT=x_limit is not None or y_limit is not None, HAS_IDS=x_ids is not None,
        PRECISION=precision(x.dtype), **config, **FUSED,
    )  # fmt: skip
    return (out[0], mass[0]) if splits == 1 else (out.sum(0), mass.sum(0))


def _grad_chunked(q, k, scale, row_side, col_side, row_ids, col_ids, offset: int):
    """sum_j g_ij k_j, sum_i g_ij q_i and the masses of rows and columns, by chunks of complete rows."""
    (n, d), m = q.shape, len(k)
    config = info_nce_config("weight", d, q.element_size(), architecture(q.device))
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    step = max(_CHUNK_BYTES // (m * q.element_size()), _CHUNK_ROWS) // block_m * block_m
    dq = torch.empty(n, d, dtype=torch.float32, device=q.device)
    dk = torch.zeros(m, d, dtype=torch.float32, device=q.device)
    # rows a multiple of 16 apart, whatever M is: stores stay wide
    g = torch.empty(min(step, n), triton.cdiv(m, 16) * 16, dtype=q.dtype, device=q.device)[:, :m]
    row_mass = torch.empty(n, dtype=torch.float32, device=q.device)
    col_mass = torch.zeros(m if col_side else 0, dtype=torch.float32, device=q.device)
    y_total, y_weight, y_limit = col_side or (None,) * 3
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        x, part = q[rows], g[: rows.stop - start]
        x_mass = row_mass.new_empty(triton.cdiv(m, block_n), len(x))
        y_mass = row_mass.new_empty(triton.cdiv(len(x), block_m), len(col_mass))
        total, weight, limit = (None if side is None else side[rows] for side in row_side)
        _info_nce_weight_kernel[(triton.cdiv(m, block_n), triton.cdiv(len(x), block_m))](
            x_ptr=x, y_ptr=k, out_ptr=part, x_mass_ptr=x_mass, y_mass_ptr=y_mass,
            x_total_ptr=total, x_weight_ptr=weight, x_limit_ptr=limit,
            y_total_ptr=y_total, y_weight_ptr=y_weight, y_limit_ptr=y_limit,
            x_ids_ptr=None if row_ids is None else row_ids[rows], y_ids_ptr=col_ids, scale_ptr=scale,
            N=len(x), M=m, diagonal=start + offset, stride_x=q.stride(0), stride_y=k.stride(0),
            stride_o=g.stride(0), D=d, HAS_Y=col_side is not None, HAS_LIMIT=limit is not None,
            HAS_IDS=row_ids is not None, PRECISION=precision(q.dtype), **config, **FUSED,
        )  # fmt: skip
        dq[rows] = _wide_product(part, k)
        dk += _wide_product(part.T, x)
        row_mass[rows] = x_mass.sum(0)
        col_mass += y_mass.sum(0)
    return dq, dk, row_mass, col_mass


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32, where the library can without rounding it to the factors' dtype first."""
    if a.dtype != torch.float32 and torch.version.hip is None:
        with suppress(NotImplementedError):  # as where kernels run on a CPU
            return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _columns(side: Tensor, offset: int, m: int, fill: float) -> Tensor:
    """Lay what belongs to the positives' keys (B,) out over all keys (M,)."""
    out = torch.full((m,), fill, dtype=torch.float32, device=side.device)
    out[offset : offset + len(side)] = side
    return out


def sweep_lse(
    q: Tensor, k: Tensor, temperature: Tensor, negatives: Negatives, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """As `info_nce_torch.sweep_lse`; q (B, D) and k (M, D) in bf16, fp16 or fp32."""
    if len(q) == 0 or len(k) == 0:  # as a rank of a ring may have none
        lse = torch.full((len(q),), -math.inf, dtype=torch.float32, device=q.device)
        return lse, lse if symmetric else None
    q, k = _rows_contiguous(q), _rows_contiguous(k)
    scale = _LOG2E / temperature
    limit = None if negatives.limit is None else negatives.limit * _LOG2E
    row_ids, col_ids, offset = negatives.row_ids, negatives.col_ids, negatives.offset
    lse = _lse(q, k, scale, limit, row_ids, col_ids, offset)
    if not symmetric:
        return lse, None
    own = slice(offset, offset + len(q))
    own_ids = None if col_ids is None else col_ids[own]
    return lse, _lse(k[own], q, scale, limit, own_ids, row_ids, 0)


def sweep_gradients(
    q: Tensor,
    k: Tensor,
    temperature: Tensor,
    negatives: Negatives,
    weight: Tensor,
    total: Tensor,
    col_total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `info_nce_torch.sweep_gradients`; q (B, D) and k (M, D) in bf16, fp16 or fp32."""
    if len(q) == 0 or len(k) == 0:
        return weight.new_zeros(q.shape), weight.new_zeros(k.shape), weight.new_zeros(len(q))
    q, k = _rows_contiguous(q), _rows_contiguous(k)
    scale = _LOG2E / temperature
    offset, m = negatives.offset, len(k)
    # Weights of at most 1, or 2**14 in fp16, whose smallest normal number a probability often undercuts.
    top = weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    if q.dtype == torch.float16:
        top = top / 2**14
    weight = weight / top
    limit = None if negatives.limit is None else negatives.limit * _LOG2E
    row_side = (total * _LOG2E, weight, limit)
    col_side = None
    if col_total is not None:
        col_limit = None if limit is None else _columns(limit, offset, m, -math.inf)
        totals, weights = _columns(col_total * _LOG2E, offset, m, math.inf), _columns(weight, offset, m, 0.0)
        col_side = (totals, weights, col_limit)
    row_ids, col_ids = negatives.row_ids, negatives.col_ids
    if q.shape[1] > _FUSED_D:
        dq, dk, mass, col_mass = _grad_chunked(q, k, scale, row_side, col_side, row_ids, col_ids, offset)
    else:
        dq, mass = _grad(q, k, scale, row_side, col_side, row_ids, col_ids, offset)
        dk, col_mass = _grad(k, q, scale, col_side, row_side, col_ids, row_ids, -offset)
    if col_side is not None:
        mass = mass + col_mass[offset : offset + len(q)]
    return dq.mul_(top), dk.mul_(top / temperature), mass * top


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
