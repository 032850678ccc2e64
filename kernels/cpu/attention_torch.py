"""Packed attention in torch operations: the CPU path.

A sequence of some length goes to torch's own flash kernel, as it lies: the G heads of a group are views of
one key head. Many short ones, and everything that kernel can't do (dropout, windows, softcap, a gradient of
the log-sum-exp), form buckets of like length, computed by dense matrix products with the G heads folded into
rows, about BLOCK_SCORES scores at a time. So memory is linear in the tokens.

Layout legend: T packed tokens, H heads, HK key heads, G = H / HK, D head dimension.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from uncausal.kernels.attention_dropout import dropout_keep, dropout_threshold
from uncausal.kernels.cpu import attention_cpu

BLOCK_SCORES = 1 << 17  # half a MB in fp32, with its gradient the second-level cache of one core
COMPILED_LENGTH = 256  # tokens; longer sequences go to torch's kernel where it can compute them
DIRECT_LENGTH = 32  # tokens; longer sequences go to torch's kernel, and buckets of few: bench/NOTES.md
BUCKET_SIZE = 12  # sequences
BUCKET_SCORES = 1 << 15  # padding that costs as much as the calls for one more bucket


class Options(NamedTuple):
    """What every score goes through."""

    scale: float
    left: int
    right: int
    softcap: float
    dropout_p: float
    seed: int

    @property
    def plain(self) -> bool:
        """Whether no score is outside a window, capped or dropped."""
        return self.left < 0 and self.right < 0 and self.softcap == 0 and self.dropout_p == 0


class Side(NamedTuple):
    """The queries or the keys of a bucket of n sequences, padded to one length."""

    start: Tensor  # (n,) int64, first packed token
    count: Tensor  # (n,) int64, tokens
    length: int  # max(count)
    index: Tensor  # (n * HK * length,) int64 rows of (T * HK, ...); padding repeats a sequence's last token
    places: Tensor | None  # places that are not padded, or None where no place is
    rows: Tensor  # index[places]

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Gather (T * HK, G * E) into (n * HK, length * G, E), E known from the caller's view."""
        return x.index_select(0, self.index).to(dtype)

    def scatter(self, x: Tensor, into: Tensor) -> None:
        """Write gathered rows back, without the padding."""
        if self.places is not None:
            x = x.index_select(0, self.places)
        into.index_copy_(0, self.rows, x.to(into.dtype))


class Bucket(NamedTuple):
    """Sequences of like length, computed together."""

    q: Side
    k: Side


class Compiled(NamedTuple):
    """Sequences that the compiled kernel computes."""

    cu_q: Tensor  # (B + 1,) int32
    cu_k: Tensor
    sequences: Tensor  # (n,) int32
    longest_k: int


class Plan(NamedTuple):
    """Which sequences are computed by the compiled kernel, which alone by torch's, and which together."""

    compiled: Compiled | None

    sizes_q: list[int]
    sizes_k: list[int]
    direct: list[int]  # sequences
    buckets: tuple[Bucket, ...]
    heads: int  # HK
    group: int  # G
    idle_q: bool  # whether some query, or some key, has no partner: its results are set beforehand
    idle_k: bool


@lru_cache(maxsize=32)
def plan_batch(
    cu_q: tuple[int, ...],
    cu_k: tuple[int, ...],
    heads: int,
    group: int,
    direct: bool,
    compiled: bool,
    device: torch.device,
) -> Plan:
    """Sort the sequences of a batch, whose offsets rise; every layer finds the same plan again."""
    sizes_q, sizes_k = ([b - a for a, b in zip(cu, cu[1:], strict=False)] for cu in (cu_q, cu_k))
    if compiled:
        alone = [i for i, n in enumerate(sizes_q) if direct and n >= COMPILED_LENGTH and sizes_k[i]]
        sequences = sorted(set(range(len(sizes_q))) - set(alone), key=lambda i: -sizes_q[i] * sizes_k[i])
        batch = None
        if sequences:
            starts_q, starts_k, chosen = (torch.tensor(x, dtype=torch.int32) for x in (cu_q, cu_k, sequences))
            batch = Compiled(starts_q, starts_k, chosen, max(sizes_k[i] for i in sequences))
        return Plan(batch, sizes_q, sizes_k, alone, (), heads, group, False, False)
    alone, members = [], []
    idle_q = idle_k = False
    for i, (q0, q1, k0, k1) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)):
        if q0 == q1 or k0 == k1:
            idle_q |= q0 < q1
            idle_k |= k0 < k1
        elif direct and q1 - q0 >= DIRECT_LENGTH:
            alone.append(i)
        else:
            members.append((q1 - q0, k1 - k0, q0, k0, i))
    buckets: list[list[tuple[int, int, int, int, int]]] = []
    longest_k = real = 0
    for member in sorted(members, reverse=True):
        longest_k, real = max(longest_k, member[1]), real + member[0] * member[1]
        if buckets:
            scores = (len(buckets[-1]) + 1) * buckets[-1][0][0] * longest_k * heads * group
            padding = scores - real * heads * group
            if scores <= BLOCK_SCORES and padding <= max(scores // 8, BUCKET_SCORES):
                buckets[-1].append(member)
                continue
        buckets.append([member])
        longest_k, real = member[1], member[0] * member[1]
    if direct:
        alone += (member[-1] for bucket in buckets if len(bucket) < BUCKET_SIZE for member in bucket)
        buckets = [bucket for bucket in buckets if len(bucket) >= BUCKET_SIZE]
    sides = [
        Bucket(*(_side([m[i + 2] for m in b], [m[i] for m in b], heads, device) for i in (0, 1)))
        for b in buckets
    ]
    return Plan(None, sizes_q, sizes_k, sorted(alone), tuple(sides), heads, group, idle_q, idle_k)


def _side(starts: list[int], counts: list[int], heads: int, device: torch.device) -> Side:
    start, count = torch.tensor(starts), torch.tensor(counts)
    place = torch.arange(max(counts))
    token = start[:, None] + torch.minimum(place, count[:, None] - 1)
    index = (token[:, None] * heads + torch.arange(heads)[:, None]).flatten()  # [n, HK, length]
    real = (place < count[:, None])[:, None].expand(-1, heads, -1).flatten()
    places = None if min(counts) == max(counts) else real.nonzero().squeeze(1).to(device)
    rows = index[real].to(device)
    return Side(start.to(device), count.to(device), max(counts), index.to(device), places, rows)


def _row_slices(bucket: Bucket, plan: Plan) -> Iterator[slice]:
    """Cut a bucket's rows (token, head of the group) so that a slice has about BLOCK_SCORES scores."""
    rows = bucket.q.length * plan.group
    step = max(BLOCK_SCORES // (len(bucket.q.start) * plan.heads * bucket.k.length), 16)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _bias(bucket: Bucket, rows: slice, plan: Plan, opts: Options, dtype: torch.dtype) -> Tensor | None:
    """Return 0 for visible keys and -inf for others, (n, 1, rows or 1, len_k), or None where all are visible.

    To add it takes a quarter of the time of `masked_fill_`."""
    q, k = bucket
    windowed = opts.left >= 0 or opts.right >= 0
    if k.places is None and not windowed:
        return None
    key = torch.arange(k.length, device=k.start.device)
    mask = (key < k.count[:, None])[:, None, None]
    if windowed:
        token = torch.arange(rows.start, rows.stop, device=key.device) // plan.group
        diagonal = (
            token[:, None] + (k.count - q.count)[:, None, None, None]
        )  # the last query faces the last key
        if opts.left >= 0:
            mask = mask & (key >= diagonal - opts.left)
        if opts.right >= 0:
            mask = mask & (key <= diagonal + opts.right)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, opts: Options) -> tuple[Tensor, Tensor | None]:
    """Return the (n * HK, rows, len_k) scores of scaled queries, and the derivative of the softcap."""
    slope = None
    scores = torch.bmm(q, k.mT)
    if opts.softcap > 0:
        scores = scores.div_(opts.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(opts.softcap)
    if bias is not None:
        scores.unflatten(0, (len(bias), -1)).add_(bias)
    return scores, slope


def _keep(bucket: Bucket, rows: slice, plan: Plan, opts: Options) -> Tensor | None:
    """Return which scores dropout keeps, (n * HK, rows, len_k) bool, or None without dropout."""
    if opts.dropout_p == 0:
        return None
    q, k = bucket
    row = torch.arange(rows.start, rows.stop, device=q.start.device)
    head = torch.arange(plan.heads, device=row.device)[:, None] * plan.group + row % plan.group
    token = q.start[:, None, None] + row // plan.group
    return dropout_keep(opts.seed, opts.dropout_p, token, head[None], k.start, k.length).flatten(0, 1)


def _query_heads(x: Tensor, plan: Plan) -> Tensor:
    """View (T, H, ...) as (HK, G, T, ...)."""
    return x.unflatten(1, (plan.heads, plan.group)).movedim(0, 2)


def _key_heads(x: Tensor, plan: Plan) -> Tensor:
    """View (T, HK, D) as (HK, G, T, D), the same keys for each head of a group."""
    return x.transpose(0, 1)[:, None].expand(-1, plan.group, -1, -1)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, opts: Options) -> tuple[Tensor, Tensor]:
    """Return out (T, H, D) and the natural log-sum-exp (H, T).

    Args:
        q: (T, H, D). k, v: (Tk, HK, D).
        plan: from `plan_batch`.
        opts: the options of the call; a dropout_p above 0 drops exactly the scores that `philox_keep` tells.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(q.shape)
    if plan.buckets:
        lse = q.new_empty(q.shape[:2], dtype=dtype)  # (T, H), as the rows of a bucket need it
    else:
        lse = q.new_empty(q.shape[1::-1], dtype=dtype).t()
    if plan.idle_q:
        out.zero_()
        lse.fill_(-torch.inf)
    if plan.compiled:
        attention_cpu.attention_forward(q, k, v, out, lse.t(), plan.compiled, opts)
    if plan.direct:
        _forward_direct(q, k, v, out, lse, plan, opts)
    if plan.buckets:
        _forward_buckets(q, k, v, out, lse, plan, opts)
    return out, lse.t().contiguous()


def _dense(x: Tensor) -> Tensor:
    """Torch's kernel takes the last dimension's elements for neighbours, and asks nobody."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward_direct(q, k, v, out, lse, plan: Plan, opts: Options) -> None:
    """Write out (T, H, D) and lse (T, H) of the plan's direct sequences, with torch's own kernel."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q, k, v = (_dense(x.to(lse.dtype)) for x in (q, k, v))
    qs, outs, lses = (_query_heads(x, plan).split(plan.sizes_q, 2) for x in (q, out, lse))
    ks, vs = (_key_heads(x, plan).split(plan.sizes_k, 2) for x in (k, v))
    for i in plan.direct:
        result, stat = attend(qs[i], ks[i], vs[i], scale=opts.scale)
        outs[i].copy_(result)
        lses[i].copy_(stat)


def _forward_buckets(q, k, v, out, lse, plan: Plan, opts: Options) -> None:
    """Write out (T, H, D) and lse (T, H) of the plan's buckets; scores never leave a block."""
    dtype = lse.dtype
    dim, keep_scale = q.shape[2], 65536 / (65536 - dropout_threshold(opts.dropout_p))
    q, out_rows, lse_rows = (x.reshape(-1, plan.group * n) for x, n in ((q, dim), (out, dim), (lse, 1)))
    k, v = k.reshape(-1, dim), v.reshape(-1, dim)
    for bucket in plan.buckets:
        batch = len(bucket.q.start) * plan.heads
        qb = bucket.q.gather(q, dtype).view(batch, -1, dim).mul_(opts.scale)
        kb, vb = (bucket.k.gather(x, dtype).view(batch, -1, dim) for x in (k, v))
        ob, lb = torch.empty_like(qb), qb.new_empty(*qb.shape[:2], 1)
        for rows in _row_slices(bucket, plan):
            p, _ = _scores(qb[:, rows], kb, _bias(bucket, rows, plan, opts, dtype), opts)
            top = p.amax(-1, keepdim=True).clamp_min_(torch.finfo(dtype).min)
            p.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            lb[:, rows] = total.log().add_(top)
            keep = _keep(bucket, rows, plan, opts)
            if keep is not None:
                p.mul_(keep)
                total.div_(keep_scale)
            ob[:, rows] = torch.bmm(p, vb).div_(total.clamp_min_(torch.finfo(dtype).tiny))
        bucket.q.scatter(ob.view(-1, plan.group * dim), out_rows)
        bucket.q.scatter(lb.view(-1, plan.group), lse_rows)


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
    """Return dq, dk, dv of `attention_forward`, given the gradients of out (T, H, D) and lse (H, T).

    The plan must not send sequences to torch's kernel when dlse is given.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk, dv = (
        x.new_zeros(x.shape) if idle else x.new_empty(x.shape)
        for x, idle in ((q, plan.idle_q), (k, plan.idle_k), (v, plan.idle_k))
    )
    if plan.compiled:
        attention_cpu.attention_backward(dout, dlse, q, k, v, out, lse, dq, dk, dv, plan.compiled, opts)
    if plan.direct:
        _backward_direct(dout, q, k, v, out, lse, dq, dk, dv, plan, opts)
    if plan.buckets:
        _backward_buckets(dout, dlse, q, k, v, out, lse, dq, dk, dv, plan, opts, dtype)
    return dq, dk, dv


def _backward_direct(dout, q, k, v, out, lse, dq, dk, dv, plan: Plan, opts: Options) -> None:
    """Write the gradients of the plan's direct sequences, with torch's own kernel."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    q, out, dout, k, v = (_dense(x.to(lse.dtype)) for x in (q, out, dout, k, v))
    qs, outs, douts = (_query_heads(x, plan).split(plan.sizes_q, 2) for x in (q, out, dout))
    ks, vs = (_key_heads(x, plan).split(plan.sizes_k, 2) for x in (k, v))
    lses = lse.unflatten(0, (plan.heads, plan.group)).split(plan.sizes_q, 2)
    dqs = _query_heads(dq, plan).split(plan.sizes_q, 2)
    dks, dvs = (x.transpose(0, 1).split(plan.sizes_k, 1) for x in (dk, dv))  # [HK, keys, D]
    for i in plan.direct:
        parts = douts[i], qs[i], ks[i], vs[i], outs[i], lses[i]
        grads = attend(*parts, 0.0, False, scale=opts.scale)
        dqs[i].copy_(grads[0])
        dks[i].copy_(grads[1].sum(1))
        dvs[i].copy_(grads[2].sum(1))


def _backward_buckets(
    dout, dlse, q, k, v, out, lse, dq, dk, dv, plan: Plan, opts: Options, dtype: torch.dtype
):
    dim, keep_scale = q.shape[2], 65536 / (65536 - dropout_threshold(opts.dropout_p))
    lse = lse.t().reshape(-1, plan.group)
    dlse = None if dlse is None else dlse.t().reshape(-1, plan.group)
    q, out, dout, dq = (x.reshape(-1, plan.group * dim) for x in (q, out, dout, dq))
    k, v, dk, dv = (x.reshape(-1, dim) for x in (k, v, dk, dv))
    for bucket in plan.buckets:
        batch = len(bucket.q.start) * plan.heads
        qb, ob, dob = (bucket.q.gather(x, dtype).view(batch, -1, dim) for x in (q, out, dout))
        kb, vb = (bucket.k.gather(x, dtype).view(batch, -1, dim) for x in (k, v))
        qb.mul_(opts.scale)
        lb = bucket.q.gather(lse, dtype).view(batch, -1, 1).clamp_min_(torch.finfo(dtype).min)
        delta = (ob * dob).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= bucket.q.gather(dlse, dtype).view(batch, -1, 1)
        if bucket.q.places is not None:  # padded rows must add nothing to the keys' gradients
            real = torch.arange(bucket.q.length, device=q.device) < bucket.q.count[:, None]
            real = real.repeat_interleave(plan.heads, 0).repeat_interleave(plan.group, 1)[..., None]
            dob.masked_fill_(~real, 0)
            delta.masked_fill_(~real, 0)
        dqb, dkb, dvb = torch.empty_like(qb), torch.empty_like(kb), torch.empty_like(vb)
        for rows in _row_slices(bucket, plan):
            p, slope = _scores(qb[:, rows], kb, _bias(bucket, rows, plan, opts, dtype), opts)
            p.sub_(lb[:, rows]).exp_()
            ds = torch.bmm(dob[:, rows], vb.mT)
            keep = _keep(bucket, rows, plan, opts)
            dropped = p
            if keep is not None:
                ds.mul_(keep).mul_(keep_scale)
                dropped = (p * keep).mul_(keep_scale)
            accumulate = 1 if rows.start else 0
            dvb.baddbmm_(dropped.mT, dob[:, rows], beta=accumulate)
            ds.sub_(delta[:, rows]).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            dkb.baddbmm_(ds.mT, qb[:, rows], beta=accumulate)
            dqb[:, rows] = torch.bmm(ds, kb)
        bucket.q.scatter(dqb.mul_(opts.scale).view(-1, plan.group * dim), dq)
        bucket.k.scatter(dkb.view(-1, dim), dk)
        bucket.k.scatter(dvb.view(-1, dim), dv)
