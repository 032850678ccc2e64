"""In-batch InfoNCE with torch, chunk by chunk of complete rows; the equations stand in info_nce.py.

A chunk holds complete rows, so its softmax is final at once and one sweep of three matrix products gives the
loss and both gradients (`sum_and_gradients`). The symmetric form needs the column statistics first, and
weights per query come from autograd, hence two sweeps (`sweep_lse`, `sweep_gradients`); Triton has them too.
Positives and hard negatives, O(B K D) work, stay outside the sweep.

Legend: B queries, M keys, K hard negatives, D dimensions; key offset + i is the positive of query i.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_BYTES = 64 << 20  # logits of one chunk of rows on a CPU
CACHED_BYTES = 32 << 20  # on a GPU: what its second-level cache keeps of them
_CHUNK_ROWS = (128, 1024)  # fewer rows starve the matrix products, more gain nothing
DROPPED = (
    -1e30
)  # stands for a logit that takes no part; finite, so that its product with a probability of 0 is 0
_BLOCK_BYTES = 1 << 20  # what one round of elementwise passes works on, to stay in cache


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    """The temperature as a tensor (), on the device of another and in its accumulation dtype."""
    acc = acc_dtype(like.dtype)
    if isinstance(temperature, Tensor):
        return temperature.reshape(()).to(like.device, acc)
    return torch.full((), temperature, dtype=acc, device=like.device)


@dataclasses.dataclass
class Negatives:
    """Which in-batch logits are negatives: not the positive, not of an equal id, not above the limit.

    row_ids (B,), col_ids (M,) and limit (B,), the largest logit allowed beside each positive, may be None. An
    offset of M says that the keys hold no positive.
    """

    row_ids: Tensor | None
    col_ids: Tensor | None
    offset: int
    limit: Tensor | None

    def mask_(self, z: Tensor, start: int) -> Tensor:
        """Put -inf where row start + r and column c are a positive or share an id."""
        if self.offset + start < z.shape[1]:
            z.diagonal(self.offset + start).fill_(-math.inf)
        if self.row_ids is not None and self.col_ids is not None:
            same = self.row_ids[start : start + len(z), None] == self.col_ids[None, :]
            z.masked_fill_(same, -math.inf)
        return z

    def mask_rows_(self, z: Tensor, start: int) -> Tensor:
        """Put -inf where a logit exceeds the limit of its row."""
        if self.limit is not None:
            z.masked_fill_(z > self.limit[start : start + len(z), None], -math.inf)
        return z

    def mask_columns_(self, z: Tensor) -> Tensor:
        """Put -inf where a logit, of the own columns alone, exceeds the limit of its column."""
        return z if self.limit is None else z.masked_fill_(z > self.limit[None, :], -math.inf)


@dataclasses.dataclass
class Pairs:
    """What does not need the sweep, in the accumulation dtype: own holds the positives' keys (B, D)."""

    qs: Tensor  # (B, D) queries / temperature
    own: Tensor  # (B, D)
    hard: Tensor  # (B, K, D)
    temperature: Tensor
    pos: Tensor  # (B,) logits of the positives
    hard_logits: Tensor  # (B, K)
    limit: Tensor | None  # (B,)

    @classmethod
    def of(cls, q: Tensor, own: Tensor, hard: Tensor, temperature: Tensor, margin: float | None) -> "Pairs":
        acc = acc_dtype(q.dtype)
        temperature = temperature.to(acc)
        qs, own, hard = q.to(acc) / temperature, own.to(acc), hard.to(acc)
        pos = (qs * own).sum(-1)
        # The margin compares scores, so it is divided by the temperature with them.
        limit = None if margin is None else pos + margin / temperature
        logits = torch.bmm(qs[:, None], hard.mT).squeeze(1)  # the other way round it is slower, less exact
        if limit is not None:
            logits.masked_fill_(logits > limit[:, None], -math.inf)
        return cls(qs, own, hard, temperature, pos, logits, limit)

    def loss(self, lse: Tensor) -> Tensor:
        """softplus(lse - pos), from the log-sum-exp of all negatives; exact for tiny and huge arguments."""
        return -F.logsigmoid(self.pos - lse)

    def gradients(
        self, dq: Tensor, dk: Tensor, mass: Tensor, weight: Tensor | None, total: Tensor
    ) -> list[Tensor]:
        """Add the pairs' part to a sweep's gradients, in place; derive the temperature's from the queries'.

        Args:
            dq: (B, D), per unit of scaled query.
            dk: (B, D), of the positives' keys.
            mass: (B,), sum of the loss gradients of all in-batch logits that contrast with the positive.
            weight: (B,), loss gradient of each row; None for 1.
            total: (B,), log-sum-exp of all logits of the row.

        Returns:
            The gradients of queries, hard negatives and temperature.
        """
        hard_coef = torch.exp(self.hard_logits - total[:, None])
        if weight is not None:
            hard_coef *= weight[:, None]
        # The positive's coefficient is minus the sum of the negatives'. Summed from them it keeps its digits
        # where p(positive) - 1 has none, and the rounding of a large common logit cancels.
        pos_coef = mass + hard_coef.sum(1)
        dq.addcmul_(self.own, pos_coef[:, None], value=-1)
        dk.addcmul_(self.qs, pos_coef[:, None], value=-1)
        dq[:, None].baddbmm_(hard_coef[:, None], self.hard)
        dhard = hard_coef[:, :, None] * self.qs[:, None, :]
        dtemperature = -(self.qs * dq).sum() / self.temperature
        return [dq.div_(self.temperature), dhard, dtemperature]


def _chunks(qs: Tensor, k: Tensor, negatives: Negatives) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of rows and their logits (rows, M), positives and equal ids masked, in a buffer reused."""
    low, high = _CHUNK_ROWS
    size = _CHUNK_BYTES if k.device.type == "cpu" else CACHED_BYTES
    step = min(max(size // max(k.element_size() * len(k), 1), low), high)
    buffer = k.new_empty(min(step, len(qs)), len(k))
    for start in range(0, len(qs) if len(k) else 0, step):
        rows = slice(start, min(start + step, len(qs)))
        z = torch.mm(qs[rows], k.T, out=buffer[: rows.stop - start])
        yield rows, negatives.mask_(z, start)


def _blocks(rows: slice, z: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(_BLOCK_BYTES // max(z.shape[1] * z.element_size(), 1), 1)
    step = step if z.device.type == "cpu" else max(len(z), 1)  # a GPU's cache holds the chunk
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        yield slice(start, stop), z[start - rows.start : stop - rows.start]


def _exp_rows_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite z with exp(z - maximum of its row); return that maximum and the row's sum."""
    # A row whose logits are all -inf has no negatives: any finite maximum gives exp = 0 and sum = 0.
    m = z.amax(1).clamp_min_(torch.finfo(z.dtype).min)
    z.sub_(m[:, None]).exp_()
    return m, z.sum(1)


def sum_and_gradients(
    q: Tensor,
    k: Tensor,
    hard: Tensor,
    temperature: Tensor,
    row_ids,
    col_ids,
    offset: int,
    margin: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss summed over the queries, and the gradients of the first four arguments, in one sweep."""
    k = k.to(acc_dtype(k.dtype))
    own = slice(offset, offset + len(q))
    pairs = Pairs.of(q, k[own], hard, temperature, margin)
    negatives = Negatives(row_ids, col_ids, offset, pairs.limit)
    lse = pairs.hard_logits.logsumexp(1)
    mass = torch.empty_like(lse)
    dq, dk = torch.empty_like(pairs.qs), torch.zeros_like(k)
    for rows, z in _chunks(pairs.qs, k, negatives):
        factor = []  # from exp(z - maximum) to probabilities
        for at, zb in _blocks(rows, z):
            m, row_sum = _exp_rows_(negatives.mask_rows_(zb, at.start))
            lse[at] = torch.logaddexp(lse[at], m + row_sum.log())
            factor.append(torch.exp(m - torch.logaddexp(lse[at], pairs.pos[at])))
            mass[at] = row_sum * factor[-1]
        factor = torch.cat(factor)[:, None]
        torch.mm(z, k, out=dq[rows]).mul_(factor)
        dk.addmm_(z.T, pairs.qs[rows] * factor)
    total = torch.logaddexp(lse, pairs.pos)
    dq, dhard, dtemperature = pairs.gradients(dq, dk[own], mass, None, total)
    return pairs.loss(lse).sum(), dq, dk, dhard, dtemperature


def sweep_lse(
    q: Tensor, k: Tensor, temperature: Tensor, negatives: Negatives, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of the in-batch negatives of every query and, if symmetric, of every positive key."""
    qs, k = q.to(temperature.dtype) / temperature, k.to(temperature.dtype)
    lse = qs.new_full((len(qs),), -math.inf)
    own = slice(negatives.offset, negatives.offset + len(qs))
    col_max, col_sum = torch.full_like(lse, torch.finfo(lse.dtype).min), torch.zeros_like(lse)
    for rows, z in _chunks(qs, k, negatives):
        for at, zb in _blocks(rows, z):
            if symmetric:
                zc = negatives.mask_columns_(zb[:, own].clone())
                m = torch.maximum(col_max, zc.amax(0))
                col_sum.mul_(torch.exp(col_max - m)).add_(zc.sub_(m).exp_().sum(0))
                col_max = m
            m, row_sum = _exp_rows_(negatives.mask_rows_(zb, at.start))
            lse[at] = m + row_sum.log_()
    return lse, col_max + col_sum.log() if symmetric else None


def sweep_gradients(
    q: Tensor,
    k: Tensor,
    temperature: Tensor,
    negatives: Negatives,
    weight: Tensor,
    total: Tensor,
    col_total: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the in-batch negatives: of queries / temperature, of keys, and their mass (B,).

    weight (B,) is the loss gradient of each query's row, and of its positive's column if col_total is given;
    total and col_total (B,) are the log-sum-exp of all logits, positive included, of that row and column. The
    mass is the sum of the gradients of a row's negatives plus that of its positive's column.
    """
    qs, k = q.to(temperature.dtype) / temperature, k.to(temperature.dtype)
    own = slice(negatives.offset, negatives.offset + len(qs))
    dq, dk, mass = torch.zeros_like(qs), torch.zeros_like(k), qs.new_zeros(len(qs))
    for rows, z in _chunks(qs, k, negatives):
        for at, zb in _blocks(rows, z):
            zc = None
            if col_total is not None:
                zc = negatives.mask_columns_(zb[:, own].clone()).sub_(col_total).exp_().mul_(weight)
                mass += zc.sum(0)
            negatives.mask_rows_(zb, at.start).sub_(total[at, None]).exp_().mul_(weight[at, None])
            mass[at] += zb.sum(1)
            if zc is not None:
                zb[:, own] += zc
        torch.mm(z, k, out=dq[rows])
        dk.addmm_(z.T, qs[rows])
    return dq, dk, mass


class _FirstOrder(torch.autograd.Function):
    """Gradients are constants for autograd, which would take their derivatives for 0."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("info_nce has no second derivative")


def first_order(gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return gradients in the dtypes of their inputs; a derivative of them is refused."""
    found = tuple(g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True))
    if torch.is_grad_enabled():  # a graph of backward was asked for
        return _FirstOrder.apply(len(found), *found, *inputs)  # pyright: ignore[reportReturnType]
    return found
