"""In-batch InfoNCE at nested prefixes of the embeddings (Matryoshka), in one pass over the largest.

Prefix p has the cosine logits z_p = a_p[i] b_p[j] S_p[i, j], S_p being the inner products of the first d_p
dimensions and a_p, b_p the norms' inverses. S_p is S_{p-1} plus the product of the dimensions in between, and
the gradient of those goes through the summed weights of all prefixes with them: three matrix products over
max(d) dimensions instead of sum(d), by chunks of complete rows as in info_nce_torch.py.

Legend: B queries, M >= B keys (key i is the positive of query i), D dimensions, P prefixes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from uncausal.kernels.cpu import info_nce_torch as chunked


def _norms(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Norms of all prefixes, (P, rows)."""
    return torch.stack([torch.linalg.vector_norm(x[:, :d], dim=1) for d in dims]).clamp_min_(1e-12)


def _suffix_sums(x: Tensor) -> Tensor:
    return x.flip(0).cumsum(0).flip(0)


class _Sweep:
    """The loss of all prefixes, summed over queries, and what its gradient needs."""

    def __init__(self, q: Tensor, k: Tensor, temperature: Tensor, row_ids, col_ids, dims, weights):
        acc = chunked.acc_dtype(q.dtype)
        self.q, self.k, self.temperature = q.to(acc), k.to(acc), temperature.to(acc)
        self.row_ids, self.col_ids, self.dims, self.weights = row_ids, col_ids, dims, weights
        self.spans = [slice(a, b) for a, b in zip((0, *dims), dims, strict=False)]
        self.q_norm, self.k_norm = _norms(self.q, dims), _norms(self.k, dims)  # (P, B), (P, M)
        self.a, self.b = 1 / (self.q_norm * self.temperature), 1 / self.k_norm
        own = self.k[: len(q)]
        products = torch.stack([(self.q[:, s] * own[:, s]).sum(1) for s in self.spans])
        self.pos = products.cumsum(0) * self.a * self.b[:, : len(q)]  # (P, B)
        self.lse, self.mass = torch.empty_like(self.pos), torch.empty_like(self.pos)
        # per row and per column, the sum of logit * its loss gradient: what the norms' gradients need
        self.q_pull, self.k_pull = torch.empty_like(self.pos), torch.zeros_like(self.k_norm)
        self.dq, self.dk = torch.empty_like(self.q), torch.zeros_like(self.k)

    def run(self) -> None:
        q, k = self.q, self.k
        step = max(
            chunked._CHUNK_BYTES // (len(self.dims) * len(k) * k.element_size()), chunked._CHUNK_ROWS[0]
        )
        step = min(step, chunked._CHUNK_ROWS[1])
        buffer = k.new_empty(len(self.dims) + 1, min(step, len(q)), len(k))
        for start in range(0, len(q), step):
            rows = slice(start, min(start + step, len(q)))
            *s, weights = buffer[:, : rows.stop - start]
            for p, span in enumerate(self.spans):
                if p == 0:
                    torch.mm(q[rows, span], k[:, span].T, out=s[p])
                else:
                    torch.addmm(s[p - 1], q[rows, span], k[:, span].T, out=s[p])
            weights.zero_()
            for p in reversed(range(len(self.dims))):
                self._softmax_(s[p], p, rows)
                weights += s[p]
                span = self.spans[p]
                self.dq[rows, span] = weights @ k[:, span]
                self.dk[:, span].addmm_(weights.T, q[rows, span])
        self._pairs_and_norms()

    def _softmax_(self, s: Tensor, p: int, rows: slice) -> None:
        """Overwrite S_p with its loss gradient, and note the statistics of its rows and columns."""
        for at, z in chunked._blocks(rows, s):
            z.mul_(self.a[p, at, None]).mul_(self.b[p])
            z.diagonal(at.start).fill_(chunked.DROPPED)
            if self.row_ids is not None and self.col_ids is not None:
                z.masked_fill_(self.row_ids[at, None] == self.col_ids[None, :], chunked.DROPPED)
            m = z.amax(1)
            z.sub_(m[:, None])
            e = z.exp()
            row_sum = e.sum(1)
            self.lse[p, at] = m + row_sum.log()
            factor = torch.exp(m - torch.logaddexp(self.lse[p, at], self.pos[p, at]))
            self.mass[p, at] = factor * row_sum
            z.mul_(e)  # (z - m) exp(z - m)
            self.q_pull[p, at] = factor * z.sum(1) + m * self.mass[p, at]
            self.k_pull[p] += factor @ z + (factor * m) @ e
            torch.mul(e, (self.weights[p] * factor * self.a[p, at])[:, None], out=z).mul_(self.b[p])

    def _pairs_and_norms(self) -> None:
        n = len(self.q)
        own_pull = self.mass * self.pos
        self.q_pull -= own_pull
        self.k_pull[:, :n] -= own_pull
        w = torch.tensor(self.weights, dtype=self.pos.dtype, device=self.pos.device)[:, None]
        pair = _suffix_sums(w * self.mass * self.a * self.b[:, :n])
        q_norm, k_norm = (
            _suffix_sums(w * pull / norm.square())
            for pull, norm in ((self.q_pull, self.q_norm), (self.k_pull, self.k_norm))
        )
        for p, span in enumerate(self.spans):
            self.dq[:, span] -= pair[p, :, None] * self.k[:n, span] + q_norm[p, :, None] * self.q[:, span]
            self.dk[:n, span] -= pair[p, :, None] * self.q[:, span]
            self.dk[:, span] -= k_norm[p, :, None] * self.k[:, span]
        last = self.dims[-1]  # dimensions beyond the largest prefix take no part
        self.dq[:, last:] = 0
        self.dtemperature = -(w * self.q_pull).sum() / self.temperature
        self.loss = -(w * F.logsigmoid(self.pos - self.lse)).sum()


@torch.library.custom_op("uncausal::info_nce_prefixes", mutates_args=())
def _info_nce_prefixes(
    q: Tensor,
    k: Tensor,
    temperature: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    dims: list[int],
    weights: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sweep = _Sweep(q, k, temperature, row_ids, col_ids, dims, weights)
    sweep.run()
    return sweep.loss, sweep.dq, sweep.dk, sweep.dtemperature


@_info_nce_prefixes.register_fake
def _(q, k, temperature, row_ids, col_ids, dims, weights):
    acc = chunked.acc_dtype(q.dtype)
    dq, dk = (torch.empty_like(x, dtype=acc, memory_format=torch.contiguous_format) for x in (q, k))
    return q.new_empty((), dtype=acc), dq, dk, q.new_empty((), dtype=acc)


def _setup_context(ctx, inputs, output):
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads, *inputs[:3])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # read once: a checkpoint unpacks once
    return *chunked.first_order([grad * kept for kept in saved[:3]], saved[3:]), None, None, None, None


_info_nce_prefixes.register_autograd(_backward, setup_context=_setup_context)


def info_nce_prefixes(
    query: Tensor,
    key: Tensor,
    dims: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    temperature: float | Tensor = 0.05,
    ids: Tensor | None = None,
) -> Tensor:
    """Sum over prefixes of weight times `info_nce` of the prefix (Matryoshka, arXiv 2205.13147, eq. 1).

    Args:
        query: (B, D) in bf16, fp16, fp32 or fp64; each prefix is normalised again.
        key: (M, D), M >= B. Row i is the positive of query i and a negative of all others.
        dims: prefix sizes, at most D, in any order.
        weights: one per prefix, 1 by default.
        temperature: divides the cosines; a tensor of one element receives a gradient.
        ids: (M,) integers; equal ids are never negatives.

    Returns:
        The weighted sum of mean losses in fp32 (fp64 for fp64 inputs), ().

    Raises:
        ValueError: dims or weights that do not fit.
    """
    weights = [1.0] * len(dims) if weights is None else weights
    if len(weights) != len(dims) or not dims or len(set(dims)) < len(dims):
        raise ValueError(f"expected distinct dims with a weight each, got {list(dims)} and {list(weights)}")
    if min(dims) < 1 or max(dims) > query.shape[1]:
        raise ValueError(f"expected dims from 1 to {query.shape[1]}, got {list(dims)}")
    order = sorted(range(len(dims)), key=lambda i: dims[i])
    row_ids = None if ids is None else ids[: len(query)]
    sizes, factors = [dims[i] for i in order], [float(weights[i]) for i in order]
    with torch.autocast(query.device.type, enabled=False):
        tau = chunked.as_temperature(temperature, query)
        return _info_nce_prefixes(query, key, tau, row_ids, ids, sizes, factors)[0] / len(query)
