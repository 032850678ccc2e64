"""In-batch InfoNCE without the B x B matrix of logits.

    z_ij = q_i . k_j / temperature,    n_i = log sum exp(z_ij) over the negatives of query i
    loss_i = -z_ii + log(exp(z_ii) + exp(n_i)) = softplus(n_i - z_ii)

Only n_i needs the whole batch: no more than one chunk of rows of the B x M logits is ever kept, so memory is
O((B + K B + M) D) plus that chunk. The gradient of the temperature is -(1 / temperature) sum_i q_i . dq_i:
no further pass.

Legend: B queries, M >= B keys (key i is the positive of query i), K hard negatives, D dimensions.
Source: van den Oord et al. 2018, arXiv 1807.03748, eq. 4; Inf-CL, arXiv 2410.17243, for the tiling.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from uncausal.kernels.cpu import info_nce_torch
from uncausal.kernels.cpu.info_nce_torch import (
    DROPPED,
    Negatives,
    Pairs,
    acc_dtype,
    as_temperature,
    first_order,
    sum_and_gradients,
)
from uncausal.kernels.info_nce_ranks import gather_rows, ring_rows, rows_per_rank, sum_over_ranks
from uncausal.kernels.launch import on_device, resolve_backend

_DENSE_LOGITS = 1 << 25  # 128 MB in fp32: with fewer a GPU waits for the host, whose operations all count


class _Form(NamedTuple):
    """How a loss is computed: the sweeps' backend, and the number of logits below which they all are held."""

    backend: str
    dense_below: float


def _sweeps(backend: str) -> tuple[Callable, Callable]:
    if backend == "torch":
        return info_nce_torch.sweep_lse, info_nce_torch.sweep_gradients
    from uncausal.kernels.gpu import info_nce_triton  # Triton exists on Linux alone

    return info_nce_triton.sweep_lse, info_nce_triton.sweep_gradients


@torch.library.custom_op("uncausal::info_nce_sum", mutates_args=())
def _info_nce_sum(
    q: Tensor,
    k: Tensor,
    hard: Tensor,
    temperature: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    offset: int,
    margin: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return sum_and_gradients(q, k, hard, temperature, row_ids, col_ids, offset, margin)


@_info_nce_sum.register_fake
def _(q, k, hard, temperature, row_ids, col_ids, offset, margin):
    acc = acc_dtype(q.dtype)
    like = [torch.empty_like(x, dtype=acc, memory_format=torch.contiguous_format) for x in (q, k, hard)]
    return q.new_empty((), dtype=acc), *like, q.new_empty((), dtype=acc)


def _sum_setup_context(ctx, inputs, output):
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads, *inputs[:4])


def _sum_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    saved = ctx.saved_tensors  # read once: a checkpoint unpacks once
    return *first_order([grad * kept for kept in saved[:4]], saved[4:]), None, None, None, None


_info_nce_sum.register_autograd(_sum_backward, setup_context=_sum_setup_context)


@torch.library.custom_op("uncausal::info_nce_rows", mutates_args=())
def _info_nce_rows(
    q: Tensor,
    k: Tensor,
    hard: Tensor,
    temperature: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    offset: int,
    margin: float | None,
    symmetric: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = Pairs.of(q, k[offset : offset + len(q)], hard, temperature, margin)
    negatives = Negatives(row_ids, col_ids, offset, pairs.limit)
    with on_device(q):
        lse, col_lse = _sweeps(backend)[0](q, k, pairs.temperature, negatives, symmetric)
    lse = torch.logaddexp(lse, pairs.hard_logits.logsumexp(1))
    loss = pairs.loss(lse)
    if col_lse is None:
        return loss, lse, lse.new_empty(0)
    return (loss + pairs.loss(col_lse)) / 2, lse, col_lse


@_info_nce_rows.register_fake
def _(q, k, hard, temperature, row_ids, col_ids, offset, margin, symmetric, backend):
    rows = q.shape[0]  # where len() would fix the number for good
    loss = q.new_empty(rows, dtype=acc_dtype(q.dtype))
    return loss, torch.empty_like(loss), loss.new_empty(rows if symmetric else 0)


@torch.library.custom_op("uncausal::info_nce_rows_backward", mutates_args=())
def _info_nce_rows_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    hard: Tensor,
    temperature: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    offset: int,
    margin: float | None,
    symmetric: bool,
    backend: str,
    lse: Tensor,
    col_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = slice(offset, offset + len(q))
    weight = grad / 2 if symmetric else grad
    with on_device(q), torch.autocast(q.device.type, enabled=False):  # backward may run under it
        pairs = Pairs.of(q, k[own], hard, temperature, margin)
        negatives = Negatives(row_ids, col_ids, offset, pairs.limit)
        total = torch.logaddexp(lse, pairs.pos)
        col_total = torch.logaddexp(col_lse, pairs.pos) if symmetric else None
        dq, dk, mass = _sweeps(backend)[1](q, k, pairs.temperature, negatives, weight, total, col_total)
        dq, dhard, dtemperature = pairs.gradients(dq, dk[own], mass, weight, total)
    return dq.to(q.dtype), dk.to(k.dtype), dhard.to(hard.dtype), dtemperature.to(temperature.dtype)


@_info_nce_rows_backward.register_fake
def _(grad, q, k, hard, temperature, row_ids, col_ids, offset, margin, symmetric, backend, lse, col_lse):
    dq, dk, dhard = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, hard))
    return dq, dk, dhard, torch.empty_like(temperature)


def _rows_setup_context(ctx, inputs, output):
    *tensors, offset, margin, symmetric, backend = inputs
    _, lse, col_lse = output
    ctx.options = offset, margin, symmetric, backend
    ctx.mark_non_differentiable(lse, col_lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, lse, col_lse)


def _rows_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    *tensors, lse, col_lse = ctx.saved_tensors
    grads = _info_nce_rows_backward(grad.contiguous(), *tensors, *ctx.options, lse, col_lse)
    return *grads, None, None, None, None, None, None


_info_nce_rows.register_autograd(_rows_backward, setup_context=_rows_setup_context)


def _check(query, key, hard_negatives, temperature, ids, symmetric, in_batch_negatives, reduction, exchange):
    if query.ndim != 2 or key.ndim != 2 or query.shape[1] != key.shape[1] or len(key) < len(query):
        raise ValueError(
            "expected query (B, D) and key (M, D) with M >= B, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    tensors = [query, key]
    if hard_negatives is not None:
        tensors.append(hard_negatives)
        expected = (len(query), query.shape[1])
        if hard_negatives.ndim != 3 or (hard_negatives.shape[0], hard_negatives.shape[2]) != expected:
            raise ValueError(
                f"expected hard_negatives ({expected[0]}, K, {expected[1]}), "
                f"got {tuple(hard_negatives.shape)}"
            )
    if any(not t.is_floating_point() or t.dtype != query.dtype or t.device != query.device for t in tensors):
        got = ", ".join(f"{t.dtype} on {t.device}" for t in tensors)
        raise TypeError(f"expected one floating dtype and one device, got {got}")
    if ids is not None:
        if ids.shape != (len(key),) or ids.is_floating_point() or ids.is_complex():
            raise ValueError(f"expected integer ids ({len(key)},), got {ids.dtype} {tuple(ids.shape)}")
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"expected one temperature, got shape {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"expected temperature > 0, got {temperature}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"expected reduction 'mean', 'sum' or 'none', got {reduction!r}")
    if exchange not in ("all_gather", "ring"):
        raise ValueError(f"expected exchange 'all_gather' or 'ring', got {exchange!r}")
    if not in_batch_negatives:
        if symmetric:
            raise ValueError(
                "symmetric=True needs in_batch_negatives=True: a key has no negatives of its own"
            )
        if hard_negatives is None or hard_negatives.shape[1] == 0:
            raise ValueError("in_batch_negatives=False needs hard_negatives, or there is nothing to contrast")


def _own_loss(q: Tensor, k: Tensor, hard: Tensor, temperature: Tensor, margin: float | None) -> Tensor:
    """Loss per query against its own hard negatives alone: O(B K D), so autograd may keep it all."""
    pos = (q * k[: len(q)]).sum(-1) / temperature
    z = torch.einsum("bd,bkd->bk", q, hard) / temperature
    if margin is not None:
        z = z.masked_fill(z > (pos + margin / temperature)[:, None], -math.inf)
    # cross_entropy, because a row masked entirely must give 0 and not NaN gradients
    target = torch.zeros(len(q), dtype=torch.long, device=q.device)
    return F.cross_entropy(torch.cat([pos[:, None], z], 1), target, reduction="none")


class _Scores(torch.autograd.Function):
    """a b^T of (..., N, D) and (..., M, D), whose gradients keep their dtype under autocast too."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b.mT

    @staticmethod
    def backward(ctx, *grads):
        (grad,), (a, b) = grads, ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            return grad @ b, grad.mT @ a


def _dense_loss(
    q: Tensor,
    k: Tensor,
    hard: Tensor,
    temperature: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    offset: int,
    margin: float | None,
    symmetric: bool,
) -> Tensor:
    """Loss per query with all logits in memory, by library products; autograd keeps them."""
    q, k, hard = (x.to(temperature.dtype) for x in (q, k, hard))
    q = q / temperature
    z = _Scores.apply(q, k)
    pos = z.diagonal(offset)  # (B,)
    dropped = torch.zeros_like(z, dtype=torch.bool)
    dropped.diagonal(offset).fill_(True)
    if row_ids is not None and col_ids is not None:
        dropped |= row_ids[:, None] == col_ids[None, :]

    def loss(z: Tensor, dropped: Tensor) -> Tensor:
        """From (B, N) logits. Dropped ones stay finite: without a negative the gradient is 0, not NaN."""
        if margin is not None:
            dropped = dropped | (z > (pos + margin / temperature)[:, None])
        return -F.logsigmoid(pos - z.masked_fill(dropped, DROPPED).logsumexp(1))

    if hard.shape[1] == 0:
        rows = loss(z, dropped)
    else:
        own_z = _Scores.apply(q[:, None], hard).squeeze(1)
        rows = loss(torch.cat([z, own_z], 1), torch.cat([dropped, torch.zeros_like(own_z).bool()], 1))
    if not symmetric:
        return rows
    columns = slice(offset, offset + len(q))
    return (rows + loss(z[:, columns].T, dropped[:, columns].T)) / 2


def _all_ranks(q, k, hard, temperature, row_ids, col_ids, sizes, margin, group, exchange, form, reduce):
    """One direction across ranks, whose keys are as many as sizes tell."""
    if exchange == "ring":
        sweeps = _sweeps(form.backend)
        return ring_rows(q, k, hard, temperature, row_ids, col_ids, margin, sizes, group, sweeps)
    offset = sum(sizes[: dist.get_rank(group)])
    k = gather_rows(k, sizes, group)
    if col_ids is not None:
        col_ids = gather_rows(col_ids, sizes, group)
    return _one_rank(q, k, hard, temperature, row_ids, col_ids, offset, margin, False, form, reduce)


def _one_rank(q, k, hard, temperature, row_ids, col_ids, offset, margin, symmetric, form, reduce):
    arguments = q, k, hard, temperature, row_ids, col_ids, offset, margin
    if form.dense_below and q.shape[0] * k.shape[0] < form.dense_below:
        return _dense_loss(*arguments, symmetric)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, hard, temperature))
    if reduce and needs_grad and not symmetric and form.backend == "torch":
        return _info_nce_sum(*arguments)[0]
    return _info_nce_rows(*arguments, symmetric, form.backend)[0]


def info_nce(
    query: Tensor,
    key: Tensor,
    hard_negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    ids: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
    in_batch_negatives: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    exchange: str = "all_gather",
    backend: str = "auto",
) -> Tensor:
    """In-batch contrastive loss that never holds the B x B logits (arXiv 1807.03748, eq. 4).

    Args:
        query: (B, D) in bf16, fp16, fp32 or fp64.
        key: (M, D), M >= B. Row i is the positive of query i and a negative of all others; rows beyond B are
            negatives shared by every query.
        hard_negatives: (B, K, D), negatives of their own query only.
        temperature: divides the scores; a tensor of one element receives a gradient.
        ids: (M,) integers, one per key (the first B hold for the queries too). Equal ids are never negatives.
        margin: drops a negative, hard ones included, whose score exceeds the positive's by more than this.
        symmetric: average with the loss of each positive key against all queries.
        in_batch_negatives: False contrasts with the own hard negatives only.
        normalize: scores are cosines; False takes the inner product as it is.
        reduction: "mean", "sum" or "none" (a loss per query).
        group: contrast with the keys of all its ranks, whose B and M may differ. "mean" and "sum" then run
            over all queries of all ranks, and gradients equal those of one process holding the concatenated
            batch (a temperature receives its rank's share). DistributedDataParallel averages gradients: under
            it, multiply the gradient by the number of ranks, as `InfoNCELoss` does.
        exchange: "all_gather" (fastest) or "ring" (holds the keys of two other ranks at a time).
        backend: "torch" and "triton" sweep over chunks or tiles of the logits; "dense" holds them all, with
            the fewest operations. "auto" is "torch" on a CPU; on a GPU "dense" below 2^25 logits, else
            "triton" for half precision and "torch" for fp32, whose products the library does best.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs): () or (B,).

    Raises:
        ValueError: shapes or options that do not fit together.
        TypeError: mixed dtypes or devices.
    """
    _check(query, key, hard_negatives, temperature, ids, symmetric, in_batch_negatives, reduction, exchange)
    form = _resolve(backend, query)
    hard = query.new_empty(len(query), 0, query.shape[1]) if hard_negatives is None else hard_negatives
    dtype = query.dtype if form.backend == "triton" else acc_dtype(query.dtype)
    reduce = reduction != "none"
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    sizes = None if group is None else rows_per_rank(group, query, key)
    with torch.autocast(query.device.type, enabled=False):  # the statistics need their 24 bits
        tau = as_temperature(temperature, query)
        q, k = (_prepared(x, normalize, dtype) for x in (query, key))
        hard = _prepared(hard, normalize and hard_negatives is not None, dtype)
        if in_batch_negatives:
            loss = _in_batch(q, k, hard, tau, ids, margin, symmetric, sizes, group, exchange, form, reduce)
        else:
            loss = _own_loss(q.to(tau.dtype), k.to(tau.dtype), hard.to(tau.dtype), tau, margin)
    if not reduce:
        return loss
    loss, count = loss.sum(), len(query)
    if group is not None and sizes is not None:
        loss, count = sum_over_ranks(loss, group), sum(sizes[0])
    return loss / count if reduction == "mean" else loss


def _in_batch(q, k, hard, temperature, ids, margin, symmetric, sizes, group, exchange, form, reduce):
    """Loss per local query, or their sum where reduce allows it; sizes are the ranks' rows of q and of k."""
    b = len(q)
    ids = None if ids is None else ids.contiguous()  # kernels know no stride of theirs
    row_ids = None if ids is None else ids[:b]
    if group is None:
        return _one_rank(q, k, hard, temperature, row_ids, ids, 0, margin, symmetric, form, reduce)
    options = margin, group, exchange, form, reduce
    loss = _all_ranks(q, k, hard, temperature, row_ids, ids, sizes[1], *options)
    if symmetric:  # the positives' keys as queries, the queries as keys
        none = q.new_empty(b, 0, q.shape[1])
        other = _all_ranks(k[:b], q, none, temperature, row_ids, row_ids, sizes[0], *options)
        loss = (loss + other) / 2
    return loss


def _resolve(backend: str, query: Tensor) -> _Form:
    if backend == "dense":
        return _Form("torch", math.inf)
    resolved = resolve_backend(backend, query)
    if backend == "triton" and query.dtype == torch.float64:
        raise ValueError("backend='triton' takes bf16, fp16 and fp32, got float64")
    if backend == "auto" and query.dtype not in (torch.float16, torch.bfloat16):
        resolved = "torch"
    return _Form(resolved, _DENSE_LOGITS if backend == "auto" and query.is_cuda else 0)


def _prepared(x: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    # Norms in at least fp32: the epsilon of normalize underflows in fp16.
    return (F.normalize(x.to(acc_dtype(x.dtype)), dim=-1) if normalize else x).to(dtype)


class InfoNCE(nn.Module):
    """`info_nce` with its options held, and optionally a temperature that is learned.

    Args:
        temperature: divides the scores.
        learn_temperature: keep log(temperature) as a parameter, so that it stays positive.
        options: the keyword arguments of `info_nce`.
    """

    def __init__(self, temperature: float = 0.05, *, learn_temperature: bool = False, **options):
        super().__init__()
        log_temperature = torch.tensor(math.log(temperature))
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=learn_temperature)
        self.options = options

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def forward(
        self, query: Tensor, key: Tensor, hard_negatives: Tensor | None = None, ids: Tensor | None = None
    ) -> Tensor:
        return info_nce(query, key, hard_negatives, temperature=self.temperature, ids=ids, **self.options)


def info_nce_ref(
    query: Tensor,
    key: Tensor,
    hard_negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    ids: Tensor | None = None,
    margin: float | None = None,
    symmetric: bool = False,
    in_batch_negatives: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The specification of `info_nce` in plain torch, with all logits in memory; same arguments."""
    b, m = len(query), len(key)
    hard = query.new_empty(b, 0, query.shape[1]) if hard_negatives is None else hard_negatives
    if normalize:
        query, key, hard = (F.normalize(x, dim=-1) for x in (query, key, hard))
    scores = query @ key.T  # (B, M)
    own = torch.eye(b, m, dtype=torch.bool, device=query.device)
    pos = scores[own]  # (B,)
    dropped = own.clone() if in_batch_negatives else torch.ones_like(own)
    if ids is not None:
        dropped |= ids[:b, None] == ids[None, :]

    def one_direction(negatives: Tensor, dropped: Tensor) -> Tensor:
        if margin is not None:
            dropped = dropped | (negatives > pos[:, None] + margin)
        negatives = (negatives / temperature).masked_fill(dropped, -math.inf)
        logits = torch.cat([pos[:, None] / temperature, negatives], 1)
        return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long), reduction="none")

    own_scores = torch.einsum("bd,bkd->bk", query, hard)
    kept = torch.zeros_like(own_scores, dtype=torch.bool)
    loss = one_direction(torch.cat([scores, own_scores], 1), torch.cat([dropped, kept], 1))
    if symmetric:
        loss = (loss + one_direction(scores[:, :b].T, dropped[:, :b].T)) / 2
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss
