"""In-batch InfoNCE without the B x B matrix of logits.

    z_ij = q_i . k_j / temperature,    n_i = log sum exp(z_ij) over the negatives of query i
    loss_i = -z_ii + log(exp(z_ii) + exp(n_i)) = softplus(n_i - z_ii)

Only n_i needs the whole batch. The positives and the hard negatives, O(B K D) work, are plain torch; the sweep over
the B x M in-batch logits never keeps more than one chunk of rows. Memory: O((B + M) D) plus that chunk.
A chunk holds complete rows, so its softmax is final at once and one sweep of three matrix products gives the loss
and both gradients. The symmetric form needs the column statistics first, hence a second sweep.
The gradient of the temperature is -(1 / temperature) sum_i q_i . dq_i: no further pass.

Legend: B queries, M >= B keys (key i is the positive of query i), K hard negatives, D dimensions.
Sources: van den Oord et al. 2018, arXiv 1807.03748, eq. 4; the chunked sweep follows arXiv 2410.17243 in spirit.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK_BYTES = 64 << 20  # logits of one chunk of rows
_CHUNK_ROWS = (128, 1024)  # fewer rows starve the matrix products, more gain nothing
_BLOCK_BYTES = 1 << 20  # what one round of elementwise passes works on, to stay in cache


# ---- torch: chunks of complete rows ----------------------------------------------------------------------------


def _chunks(num_rows: int, num_columns: int, itemsize: int) -> list[slice]:
    """Split the rows so that a chunk of logits meets the memory budget."""
    low, high = _CHUNK_ROWS
    step = min(max(_CHUNK_BYTES // (num_columns * itemsize), low), high)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _blocks(z: Tensor) -> list[slice]:
    step = max(_BLOCK_BYTES // (z.shape[1] * z.element_size()), 1)
    return [slice(start, min(start + step, len(z))) for start in range(0, len(z), step)]


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
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
    acc = _acc_dtype(q.dtype)
    temperature = temperature.to(acc)
    qs, k, hard = q.to(acc) / temperature, k.to(acc), hard.to(acc)
    pos = (qs * k[offset : offset + len(qs)]).sum(-1)
    negatives = _Negatives(pos, temperature, row_ids, col_ids, offset, margin)
    return qs, k, hard, temperature, pos, negatives, _hard_logits(qs, hard, negatives.limit)


def _exp_rows_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite z with exp(z - max of its row); return that maximum and the log of the row's sum, both (rows,)."""
    # A row whose logits are all -inf has no negatives: any finite maximum gives exp = 0 and log sum = -inf.
    m = z.amax(1).clamp_min_(torch.finfo(z.dtype).min)
    z.sub_(m[:, None]).exp_()
    return m, z.sum(1).log_()


def _pair_gradients(qs, k, hard, temperature, offset, dq, dk, pos_coef, hard_coef):
    """Add the positives and the hard negatives to the gradients; derive the temperature's from the queries'.

    dq arrives per unit of scaled query, pos_coef = -dloss/dz_ii and hard_coef = dloss/dz of the hard negatives.
    """
    own = slice(offset, offset + len(qs))
    dq.addcmul_(k[own], pos_coef[:, None], value=-1)
    dk[own].addcmul_(qs, pos_coef[:, None], value=-1)
    for i in range(hard.shape[1]):
        dq.addcmul_(hard[:, i], hard_coef[:, i, None])
    dhard = hard_coef[:, :, None] * qs[:, None, :]
    dtemperature = -torch.linalg.vecdot(qs, dq).sum() / temperature
    return dq.div_(temperature), dk, dhard, dtemperature


def _sum_torch(q, k, hard, temperature, row_ids, col_ids, offset, margin):
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


def _rows_torch(q, k, hard, temperature, row_ids, col_ids, offset, margin, symmetric):
    """Loss per query and the log-sum-exp of the negatives of every row, and of every own column if symmetric."""
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


def _rows_backward_torch(
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


# ---- ops -------------------------------------------------------------------------------------------------------


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
    return _sum_torch(q, k, hard, temperature, row_ids, col_ids, offset, margin)


@_info_nce_sum.register_fake
def _(q, k, hard, temperature, row_ids, col_ids, offset, margin):
    acc = _acc_dtype(q.dtype)
    like = [torch.empty_like(x, dtype=acc, memory_format=torch.contiguous_format) for x in (q, k, hard)]
    return q.new_empty((), dtype=acc), *like, q.new_empty((), dtype=acc)


def _sum_setup_context(ctx, inputs, output):
    _, *grads = output
    ctx.dtypes = [x.dtype for x in inputs[:4]]
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)


def _sum_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    grads = [(grad * g).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
    return *grads, None, None, None, None


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
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_torch(q, k, hard, temperature, row_ids, col_ids, offset, margin, symmetric)


@_info_nce_rows.register_fake
def _(q, k, hard, temperature, row_ids, col_ids, offset, margin, symmetric):
    loss = q.new_empty(len(q), dtype=_acc_dtype(q.dtype))
    return loss, torch.empty_like(loss), loss.new_empty(len(q) if symmetric else 0)


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
    lse: Tensor,
    col_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _rows_backward_torch(
        grad, q, k, hard, temperature, row_ids, col_ids, offset, margin, symmetric, lse, col_lse
    )
    dq, dk, dhard, dtemperature = (
        g.to(x.dtype) for g, x in zip(grads, (q, k, hard, temperature), strict=True)
    )
    return dq, dk, dhard, dtemperature


@_info_nce_rows_backward.register_fake
def _(grad, q, k, hard, temperature, row_ids, col_ids, offset, margin, symmetric, lse, col_lse):
    dq, dk, dhard = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, hard))
    return dq, dk, dhard, torch.empty_like(temperature)


def _rows_setup_context(ctx, inputs, output):
    q, k, hard, temperature, row_ids, col_ids, *ctx.options = inputs
    _, lse, col_lse = output
    ctx.mark_non_differentiable(lse, col_lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, hard, temperature, row_ids, col_ids, lse, col_lse)


def _rows_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    *inputs, lse, col_lse = ctx.saved_tensors
    grads = _info_nce_rows_backward(grad.contiguous(), *inputs, *ctx.options, lse, col_lse)
    return *grads, None, None, None, None, None


_info_nce_rows.register_autograd(_rows_backward, setup_context=_rows_setup_context)


# ---- public ----------------------------------------------------------------------------------------------------


def _check(query, key, hard_negatives, temperature, ids, symmetric, in_batch_negatives, reduction):
    if query.ndim != 2 or key.ndim != 2 or query.shape[1] != key.shape[1] or len(key) < len(query):
        raise ValueError(
            f"expected query (B, D) and key (M, D) with M >= B, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    tensors = [query, key]
    if hard_negatives is not None:
        tensors.append(hard_negatives)
        expected = (len(query), query.shape[1])
        if hard_negatives.ndim != 3 or (hard_negatives.shape[0], hard_negatives.shape[2]) != expected:
            raise ValueError(
                f"expected hard_negatives ({expected[0]}, K, {expected[1]}), got {tuple(hard_negatives.shape)}"
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
        backend: "auto", "triton" or "torch".

    Returns:
        The loss in fp32 (fp64 for fp64 inputs): () or (B,).

    Raises:
        ValueError: shapes or options that do not fit together.
        TypeError: mixed dtypes or devices.
    """
    _check(query, key, hard_negatives, temperature, ids, symmetric, in_batch_negatives, reduction)
    hard = query.new_empty(len(query), 0, query.shape[1]) if hard_negatives is None else hard_negatives
    acc = _acc_dtype(query.dtype)
    if isinstance(temperature, Tensor):
        tau = temperature.reshape(()).to(acc)
    else:
        tau = torch.full((), temperature, dtype=acc, device=query.device)
    q, k, hard = (F.normalize(x.to(acc), dim=-1) if normalize else x.to(acc) for x in (query, key, hard))
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, hard, tau))
    if not in_batch_negatives:
        rows = _own_loss(q, k, hard, tau, margin)
    else:
        row_ids = None if ids is None else ids[: len(query)]
        if grad and not symmetric and reduction != "none":
            loss = _info_nce_sum(q, k, hard, tau, row_ids, ids, 0, margin)[0]
            return loss / len(query) if reduction == "mean" else loss
        rows = _info_nce_rows(q, k, hard, tau, row_ids, ids, 0, margin, symmetric)[0]
    return rows.mean() if reduction == "mean" else rows.sum() if reduction == "sum" else rows


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
