"""In-batch InfoNCE with torch, chunk by chunk of complete rows; the equations stand in info_nce.py.

A chunk holds complete rows, so its softmax is final at once and one sweep of three matrix products gives the
loss and both gradients. The symmetric form needs the column statistics first, hence a second sweep.
Positives and hard negatives, O(B K D) work, stay outside the sweep.

Legend: B queries, M >= B keys, K hard negatives, D dimensions; key offset + i is the positive of query i.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_BYTES = 64 << 20  # logits of one chunk of rows
_CHUNK_ROWS = (128, 1024)  # fewer rows starve the matrix products, more gain nothing
_BLOCK_BYTES = 1 << 20  # what one round of elementwise passes works on, to stay in cache


def _chunks(num_rows: int, num_columns: int, itemsize: int) -> list[slice]:
    """Split the rows so that a chunk of logits meets the memory budget."""
    low, high = _CHUNK_ROWS
    step = min(max(_CHUNK_BYTES // (num_columns * itemsize), low), high)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _blocks(z: Tensor) -> list[slice]:
    step = max(_BLOCK_BYTES // (z.shape[1] * z.element_size()), 1)
    return [slice(start, min(start + step, len(z))) for start in range(0, len(z), step)]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Negatives:
    """Which in-batch logits are negatives, as in-place masks on a block of rows."""

    def __init__(self, pos, temperature, row_ids, col_ids, offset, margin):
        self.row_ids, self.col_ids, self.offset = row_ids, col_ids, offset
        # The margin compares scores, so it is divided by the temperature with them.
        self.limit = None if margin is None else pos + margin / temperature

    def mask_(self, z: Tensor, start: int) -> Tensor:
        """Put -inf where row start + r and column c are a positive or share an id."""
        z.diagonal(self.offset + start).fill_(-math.inf)
        if self.row_ids is not None:
            same = self.row_ids[start : start + len(z), None] == self.col_ids[None, :]
            z.masked_fill_(same, -math.inf)
        return z

    def mask_rows_(self, z: Tensor, start: int) -> Tensor:
        """Put -inf where a logit exceeds the limit of its row."""
        if self.limit is not None:
            z.masked_fill_(z > self.limit[start : start + len(z), None], -math.inf)
        return z

    def mask_columns_(self, z: Tensor) -> Tensor:
        """Put -inf where a logit exceeds the limit of its column."""
        return z if self.limit is None else z.masked_fill_(z > self.limit[None, :], -math.inf)


def _hard_logits(qs: Tensor, hard: Tensor, limit: Tensor | None) -> Tensor:
    """(B, D), (B, K, D) -> (B, K), one hard negative at a time: the temporary stays (B, D)."""
    z = [(qs * hard[:, i]).sum(-1) for i in range(hard.shape[1])]
    out = torch.stack(z, 1) if z else qs.new_empty(len(qs), 0)
    return out if limit is None else out.masked_fill(out > limit[:, None], -math.inf)


def _setup(q, k, hard, temperature, row_ids, col_ids, offset, margin):
    """Scale the queries and compute what does not need the sweep, in the accumulation dtype."""
    acc = acc_dtype(q.dtype)
    temperature = temperature.to(acc)
    qs, k, hard = q.to(acc) / temperature, k.to(acc), hard.to(acc)
    pos = (qs * k[offset : offset + len(qs)]).sum(-1)
    negatives = _Negatives(pos, temperature, row_ids, col_ids, offset, margin)
    return qs, k, hard, temperature, pos, negatives, _hard_logits(qs, hard, negatives.limit)


def _exp_rows_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite z with exp(z - maximum of its row); return that maximum and the log of the row's sum."""
    # A row whose logits are all -inf has no negatives: any finite maximum gives exp = 0 and log sum = -inf.
    m = z.amax(1).clamp_min_(torch.finfo(z.dtype).min)
    z.sub_(m[:, None]).exp_()
    return m, z.sum(1).log_()


def _pair_gradients(qs, k, hard, temperature, offset, dq, dk, pos_coef, hard_coef):
    """Add the positives and the hard negatives to the gradients; derive the temperature's from the queries'.

    dq arrives per unit of scaled query; pos_coef = -dloss/dz_ii, hard_coef = dloss/dz of the hard negatives.
    """
    own = slice(offset, offset + len(qs))
    dq.addcmul_(k[own], pos_coef[:, None], value=-1)
    dk[own].addcmul_(qs, pos_coef[:, None], value=-1)
    for i in range(hard.shape[1]):
        dq.addcmul_(hard[:, i], hard_coef[:, i, None])
    dhard = hard_coef[:, :, None] * qs[:, None, :]
    dtemperature = -torch.linalg.vecdot(qs, dq).sum() / temperature
    return dq.div_(temperature), dk, dhard, dtemperature


def info_nce_sum(q, k, hard, temperature, row_ids, col_ids, offset, margin):
    """Loss summed over the queries and its gradients, in one sweep of three matrix products."""
    qs, k, hard, temperature, pos, negatives, hard_z = _setup(
        q, k, hard, temperature, row_ids, col_ids, offset, margin
    )
    hard_lse = hard_z.logsumexp(1)
    lse, dq, dk = torch.empty_like(pos), torch.empty_like(qs), torch.zeros_like(k)
    chunks = _chunks(len(qs), len(k), k.element_size())
    buffer = k.new_empty(max((c.stop - c.start for c in chunks), default=0), len(k))
    for rows in chunks:
        z = torch.mm(qs[rows], k.T, out=buffer[: rows.stop - rows.start])
        negatives.mask_(z, rows.start)
        factor = torch.empty_like(pos[rows])
        for block in _blocks(z):
            at = slice(rows.start + block.start, rows.start + block.stop)
            m, log_sum = _exp_rows_(negatives.mask_rows_(z[block], at.start))
            torch.logaddexp(m + log_sum, hard_lse[at], out=lse[at])
            factor[block] = torch.exp(m - torch.logaddexp(lse[at], pos[at]))
        torch.mm(z, k, out=dq[rows]).mul_(factor[:, None])
        dk.addmm_(z.T, qs[rows] * factor[:, None])
    # 1 - p(positive) as a sigmoid keeps its precision when the positive wins by far; p - 1 would not.
    pos_coef = torch.sigmoid(lse - pos)
    hard_coef = torch.exp(hard_z - torch.logaddexp(lse, pos)[:, None])
    grads = _pair_gradients(qs, k, hard, temperature, offset, dq, dk, pos_coef, hard_coef)
    return -F.logsigmoid(pos - lse).sum(), *grads


def info_nce_rows(q, k, hard, temperature, row_ids, col_ids, offset, margin, symmetric):
    """Loss per query, log-sum-exp of the negatives of every row and, if symmetric, of every own column."""
    qs, k, hard, temperature, pos, negatives, hard_z = _setup(
        q, k, hard, temperature, row_ids, col_ids, offset, margin
    )
    hard_lse = hard_z.logsumexp(1)
    lse = torch.empty_like(pos)
    own = slice(offset, offset + len(qs))
    col_max = torch.full_like(pos, torch.finfo(pos.dtype).min)
    col_sum = torch.zeros_like(pos)
    chunks = _chunks(len(qs), len(k), k.element_size())
    buffer = k.new_empty(max((c.stop - c.start for c in chunks), default=0), len(k))
    for rows in chunks:
        z = torch.mm(qs[rows], k.T, out=buffer[: rows.stop - rows.start])
        negatives.mask_(z, rows.start)
        for block in _blocks(z):
            at = slice(rows.start + block.start, rows.start + block.stop)
            if symmetric:
                zc = negatives.mask_columns_(z[block, own].clone())
                m = torch.maximum(col_max, zc.amax(0))
                col_sum.mul_(torch.exp(col_max - m)).add_(zc.sub_(m).exp_().sum(0))
                col_max = m
            m, log_sum = _exp_rows_(negatives.mask_rows_(z[block], at.start))
            torch.logaddexp(m + log_sum, hard_lse[at], out=lse[at])
    loss = -F.logsigmoid(pos - lse)
    if not symmetric:
        return loss, lse, lse.new_empty(0)
    col_lse = col_max + col_sum.log()
    return (loss - F.logsigmoid(pos - col_lse)) / 2, lse, col_lse


def info_nce_rows_backward(
    grad, q, k, hard, temperature, row_ids, col_ids, offset, margin, symmetric, lse, col_lse
):
    """Gradients of sum_i grad_i loss_i, from the statistics of the forward sweep."""
    qs, k, hard, temperature, pos, negatives, hard_z = _setup(
        q, k, hard, temperature, row_ids, col_ids, offset, margin
    )
    weight = grad.to(qs.dtype) / (2 if symmetric else 1)
    own = slice(offset, offset + len(qs))
    total = torch.logaddexp(lse, pos)
    col_total = torch.logaddexp(col_lse, pos) if symmetric else None
    dq, dk = torch.empty_like(qs), torch.zeros_like(k)
    chunks = _chunks(len(qs), len(k), k.element_size())
    buffer = k.new_empty(max((c.stop - c.start for c in chunks), default=0), len(k))
    for rows in chunks:
        z = torch.mm(qs[rows], k.T, out=buffer[: rows.stop - rows.start])
        negatives.mask_(z, rows.start)
        for block in _blocks(z):
            at = slice(rows.start + block.start, rows.start + block.stop)
            zb, zc = z[block], None
            if col_total is not None:
                zc = negatives.mask_columns_(zb[:, own].clone()).sub_(col_total).exp_().mul_(weight)
            negatives.mask_rows_(zb, at.start).sub_(total[at, None]).exp_().mul_(weight[at, None])
            if zc is not None:
                zb[:, own] += zc
        torch.mm(z, k, out=dq[rows])
        dk.addmm_(z.T, qs[rows])
    pos_coef = torch.sigmoid(lse - pos)
    if symmetric:
        pos_coef += torch.sigmoid(col_lse - pos)
    hard_coef = torch.exp(hard_z - total[:, None]) * weight[:, None]
    return _pair_gradients(qs, k, hard, temperature, offset, dq, dk, pos_coef * weight, hard_coef)
