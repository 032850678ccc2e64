"""Bidirectional packed attention in torch operations: the CPU path, and the dropout mask that every path
shares.

Sequences of like length form a bucket of dense matrix products; the G query heads of a key head are folded
into rows, so that keys are never repeated. Scores exist for one bucket at a time, in blocks of rows: memory
is linear in the tokens. Backward recomputes them from the log-sum-exp.

Layout legend: T packed tokens, H heads, HK key heads, G = H / HK, D head dimension.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_SCORES = 1 << 18  # scores alive at a time: 1 MB in fp32, the second-level cache of one core
PHILOX_ROUNDS = 7  # the fewest rounds that pass BigCrush (Salmon et al., 2011, table 2)


class Bucket(NamedTuple):
    """Sequences computed together; (rows) and (keys) are their slices of the gathered tensors."""

    rows: slice
    keys: slice
    num_seqs: int
    len_q: int
    len_k: int
    start_q: Tensor  # (n,) int64, first packed query
    start_k: Tensor  # (n,) int64, first packed key
    lens_q: Tensor  # (n,) int64
    lens_k: Tensor  # (n,) int64
    ragged: bool  # whether some sequence has fewer than len_k keys


class Plan(NamedTuple):
    """How packed tensors become buckets (gather) and how results come back (scatter, itself a gather)."""

    buckets: tuple[Bucket, ...]
    gather_q: Tensor
    gather_k: Tensor
    scatter_q: Tensor
    scatter_k: Tensor
    padding: Tensor  # places of the gathered rows that repeat another one


@lru_cache(maxsize=32)
def plan_buckets(
    cu_q: tuple[int, ...], cu_k: tuple[int, ...], group: int, heads: int, device: torch.device
) -> Plan:
    """Sort sequences into buckets of like length; every layer of a batch finds the same plan again."""
    lens = [(cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i], i) for i in range(len(cu_q) - 1)]
    lens = sorted((x for x in lens if x[0] and x[1]), reverse=True)
    groups: list[list[tuple[int, int, int]]] = []
    for lq, lk, i in lens:
        if groups:
            top_q, top_k = groups[-1][0][0], max(x[1] for x in groups[-1])
            near = top_q <= lq + max(lq // 16, 3) and abs(top_k - lk) <= max(min(top_k, lk) // 16, 3)
            small = (len(groups[-1]) + 1) * heads * group * top_q * max(top_k, lk) <= BLOCK_SCORES
            if near and small:
                groups[-1].append((lq, lk, i))
                continue
        groups.append([(lq, lk, i)])

    buckets, sides = [], ([], [])
    ends = [0, 0]
    for members in groups:
        size = max(x[0] for x in members), max(x[1] for x in members)
        slices = []
        for side, cu in enumerate((cu_q, cu_k)):
            first = torch.tensor([cu[x[2]] for x in members])
            count = torch.tensor([x[side] for x in members])
            # padded places repeat the sequence's own last token: no other sequence can leak in
            token = first[:, None] + torch.minimum(torch.arange(size[side]), count[:, None] - 1)
            index = token[:, None, :] * heads + torch.arange(heads)[:, None]  # [n, HK, L]
            sides[side].append((index, torch.arange(size[side]) < count[:, None]))
            slices.append((slice(ends[side], ends[side] + index.numel()), first, count))
            ends[side] += index.numel()
        (rows, start_q, lens_q), (keys, start_k, lens_k) = slices
        ragged = bool((lens_k < size[1]).any())
        buckets.append(Bucket(rows, keys, len(members), *size, start_q, start_k, lens_q, lens_k, ragged))

    maps = []
    for side, cu in enumerate((cu_q, cu_k)):
        gather = (
            torch.cat([index.flatten() for index, _ in sides[side]]) if buckets else torch.zeros(0).long()
        )
        valid = [keep[:, None].expand(-1, heads, -1).flatten() for _, keep in sides[side]]
        place = torch.cat(valid).nonzero().squeeze(1) if buckets else gather
        # sequences without a partner on the other side read the row behind the last one, which holds the
        # neutral value
        scatter = torch.full((cu[-1] * heads,), len(gather))
        scatter[gather[place]] = place
        maps += [gather, scatter]
    padding = [~keep[:, None].expand(-1, heads, -1).flatten() for _, keep in sides[0]]
    padding = torch.cat(padding).nonzero().squeeze(1) if buckets else torch.zeros(0).long()
    moved = [
        b._replace(**{f: getattr(b, f).to(device) for f in ("start_q", "start_k", "lens_q", "lens_k")})
        for b in buckets
    ]
    return Plan(tuple(moved), *(x.to(device) for x in (maps[0], maps[2], maps[1], maps[3], padding)))


def philox_keep(
    seed: int, rows: Tensor, heads: Tensor, first_group: Tensor, groups: int, dropout_p: float
) -> Tensor:
    """Return which scores dropout keeps, for 32 * groups consecutive keys from key 32 * first_group on.

    One Philox4x32 call with key `seed` and counter (row, 4 * (key // 32) + key % 8 // 2, head, 0) serves
    eight keys: word key % 32 // 8, lower half for even keys and upper half for odd ones. The kernels make the
        same calls.

    Args:
        seed: 64 bits.
        rows, heads, first_group: int64 tensors of one shape S: packed query, query head, first group of 32
            keys.
        groups: number of groups of 32 keys.
        dropout_p: probability of a zero, rounded to a multiple of 2^-16.

    Returns:
        bool, (*S, 32 * groups).
    """
    rows, heads, first_group = rows[..., None], heads[..., None], first_group[..., None]
    low = 0xFFFFFFFF
    c0, c1 = rows & low, first_group * 4 + torch.arange(4 * groups, device=rows.device)
    c2, c3 = heads, torch.zeros_like(c0)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(PHILOX_ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = [c.unflatten(-1, (groups, 4)) for c in torch.broadcast_tensors(c0, c1, c2, c3)]
    bits = torch.stack(words, -2).to(torch.int32).view(torch.int16)  # [..., groups, 4, 8]: half, lowest first
    return bits.flatten(-3) >= dropout_threshold(dropout_p) - 32768


def dropout_threshold(dropout_p: float) -> int:
    """Return the number of 16-bit values that dropout drops."""
    return min(round(dropout_p * 65536), 65535)


def dropout_keep(
    seed: int, dropout_p: float, rows: Tensor, heads: Tensor, start_k: Tensor, len_k: int
) -> Tensor:
    """Return the (n, ..., len_k) bool mask of n sequences; rows, heads (n, ...); first keys start_k (n,)."""
    offset = start_k % 32
    groups = int(offset.max() + len_k + 31) // 32
    rows, heads = torch.broadcast_tensors(rows, heads)
    first = (start_k // 32).view(-1, *[1] * (rows.dim() - 1)).expand_as(rows)
    keep = philox_keep(seed, rows, heads, first, groups, dropout_p)
    if len(start_k) == 1:
        return keep[..., int(offset) : int(offset) + len_k]
    index = offset[:, None] + torch.arange(len_k, device=keep.device)
    return keep.gather(-1, index.view(-1, *[1] * (rows.dim() - 1), len_k).expand(*rows.shape, -1))


class Options(NamedTuple):
    """What every score goes through."""

    scale: float
    left: int
    right: int
    softcap: float
    dropout_p: float
    seed: int
    heads: int  # HK
    group: int  # G


class Block(NamedTuple):
    """Some rows of a bucket: their slice of the gathered rows, and which of them per key head."""

    bucket: Bucket
    begin: int  # first row per key head
    end: int


def blocks_of(bucket: Bucket, opts: Options):
    """Cut a bucket's rows into about BLOCK_SCORES scores each, the heads of a token together."""
    step = max(BLOCK_SCORES // (bucket.num_seqs * opts.heads * bucket.len_k * opts.group), 16) * opts.group
    for begin in range(0, bucket.len_q * opts.group, step):
        yield Block(bucket, begin, min(begin + step, bucket.len_q * opts.group))


def visible(block: Block, opts: Options) -> Tensor | None:
    """Return the (n, 1, rows or 1, len_k) bool mask of visible keys, or None where every key is visible."""
    b = block.bucket
    windowed = opts.left >= 0 or opts.right >= 0
    if not (windowed or b.ragged):
        return None
    key = torch.arange(b.len_k, device=b.start_q.device)
    mask = (key < b.lens_k[:, None])[:, None, None]
    if windowed:
        row = torch.arange(block.begin, block.end, device=key.device) // opts.group
        diagonal = (
            row[:, None] + (b.lens_k - b.lens_q)[:, None, None, None]
        )  # flash-attn aligns the last row and key
        if opts.left >= 0:
            mask = mask & (key >= diagonal - opts.left)
        if opts.right >= 0:
            mask = mask & (key <= diagonal + opts.right)
    return mask


def scores_of(q: Tensor, k: Tensor, block: Block, opts: Options) -> tuple[Tensor, Tensor | None]:
    """Return the (n * HK, rows, len_k) scores, and the derivative of the softcap."""
    slope = None
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=opts.scale)
    if opts.softcap > 0:
        scores = scores.div_(opts.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(opts.softcap)
    mask = visible(block, opts)
    if mask is not None:
        scores.unflatten(0, (block.bucket.num_seqs, -1)).masked_fill_(~mask, -torch.inf)
    return scores, slope


def drop_of(block: Block, opts: Options) -> Tensor | None:
    """Return which scores dropout keeps, (n * HK, rows, len_k) bool, or None without dropout."""
    if opts.dropout_p == 0:
        return None
    b = block.bucket
    row = torch.arange(block.begin, block.end, device=b.start_q.device)
    head = torch.arange(opts.heads, device=row.device)[:, None] * opts.group + row % opts.group
    rows = (b.start_q[:, None] + row // opts.group)[:, None]
    return dropout_keep(opts.seed, opts.dropout_p, rows, head[None], b.start_k, b.len_k).flatten(0, 1)


def gathered(x: Tensor, index: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Gather the rows of (T, heads, ...) in bucket order: (len(index), -1)."""
    return x.reshape(x.shape[0] * heads, -1).index_select(0, index).to(dtype)


def scattered(x: Tensor, index: Tensor, neutral: float, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return bucket-ordered rows to the packed order; rows that no bucket computed become `neutral`."""
    x[-1] = neutral
    return x.index_select(0, index).view(shape).to(dtype)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, opts: Options) -> tuple[Tensor, Tensor]:
    """Return out (T, H, D) and the natural log-sum-exp (H, T).

    Args:
        q: (T, H, D). k, v: (Tk, HK, D).
        plan: from `plan_buckets`.
        opts: the options of the call; a dropout_p above 0 drops exactly the scores that `philox_keep` tells.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, group, dim = opts.heads, opts.group, q.shape[2]
    qs = gathered(q, plan.gather_q, heads, dtype)
    ks, vs = (gathered(x, plan.gather_k, heads, dtype) for x in (k, v))
    outs = qs.new_empty(len(qs) + 1, group * dim)
    lses = qs.new_empty(len(qs) + 1, group)
    keep_scale = 65536 / (65536 - dropout_threshold(opts.dropout_p))
    for bucket in plan.buckets:
        batch = bucket.num_seqs * heads
        kb, vb = (x[bucket.keys].view(batch, -1, dim) for x in (ks, vs))
        qb, ob = (x[bucket.rows].view(batch, -1, dim) for x in (qs, outs))
        lb = lses[bucket.rows].view(batch, -1, 1)
        for block in blocks_of(bucket, opts):
            rows = slice(block.begin, block.end)
            p, _ = scores_of(qb[:, rows], kb, block, opts)
            top = p.amax(-1, keepdim=True).clamp_min_(torch.finfo(dtype).min)
            p.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            lb[:, rows] = total.log().add_(top)
            keep = drop_of(block, opts)
            if keep is not None:
                p.mul_(keep)
                total = total / keep_scale
            ob[:, rows] = torch.bmm(p, vb).div_(total.clamp_min_(torch.finfo(dtype).tiny))
    out = scattered(outs, plan.scatter_q, 0, tuple(q.shape), q.dtype)
    lse = scattered(lses, plan.scatter_q, -torch.inf, tuple(q.shape[:2]), dtype)
    return out, lse.t().contiguous()


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    opts: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of `attention_forward` given those of out (T, H, D) and lse (H, T)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, dim = opts.heads, q.shape[2]
    delta = (out.to(dtype) * dout).sum(-1)  # (T, H)
    if dlse is not None:
        delta -= dlse.t()
    qs, dos, lses, deltas = (gathered(x, plan.gather_q, heads, dtype) for x in (q, dout, lse.t(), delta))
    ks, vs = (gathered(x, plan.gather_k, heads, dtype) for x in (k, v))
    dos.index_fill_(0, plan.padding, 0)
    deltas.index_fill_(0, plan.padding, 0)
    dqs = qs.new_empty(len(qs) + 1, qs.shape[1])
    dks, dvs = ks.new_empty(len(ks) + 1, dim), vs.new_empty(len(vs) + 1, dim)
    lses.clamp_min_(torch.finfo(dtype).min)
    keep_scale = 65536 / (65536 - dropout_threshold(opts.dropout_p))
    for bucket in plan.buckets:
        batch = bucket.num_seqs * heads
        kb, vb, dkb, dvb = (x[bucket.keys].view(batch, -1, dim) for x in (ks, vs, dks, dvs))
        qb, dob, dqb = (x[bucket.rows].view(batch, -1, dim) for x in (qs, dos, dqs))
        lb, deltab = (x[bucket.rows].view(batch, -1, 1) for x in (lses, deltas))
        for block in blocks_of(bucket, opts):
            rows = slice(block.begin, block.end)
            qr, dor = qb[:, rows], dob[:, rows]
            p, slope = scores_of(qr, kb, block, opts)
            p.sub_(lb[:, rows]).exp_()
            ds = torch.bmm(dor, vb.mT)
            keep = drop_of(block, opts)
            dropped = p
            if keep is not None:
                ds.mul_(keep).mul_(keep_scale)
                dropped = p * keep * keep_scale
            accumulate = 1 if block.begin else 0
            dvb.baddbmm_(dropped.mT, dor, beta=accumulate)
            ds.sub_(deltab[:, rows]).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            dkb.baddbmm_(ds.mT, qr, beta=accumulate, alpha=opts.scale)
            dqb[:, rows] = torch.baddbmm(ds.new_empty(()), ds, kb, beta=0, alpha=opts.scale)
    dq = scattered(dqs, plan.scatter_q, 0, tuple(q.shape), q.dtype)
    dk = scattered(dks, plan.scatter_k, 0, tuple(k.shape), k.dtype)
    dv = scattered(dvs, plan.scatter_k, 0, tuple(v.shape), v.dtype)
    return dq, dk, dv
