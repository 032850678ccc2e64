"""In-batch InfoNCE across ranks: the loss of the concatenated batch, ranks holding any number of rows each.

all_gather: every rank holds all keys; one sweep over its own queries; the keys' gradients are summed back.
ring: every rank holds two foreign blocks of keys at a time, the one it works on and the one on its way. Keys
travel the ring once for the statistics and once, with their gradient, for the backward sweep.

Every rank returns the same loss and calls backward on it; then each input's gradient is the single process's.
A temperature lives on every rank, so it receives this rank's share: their sum is the whole.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

# Imported later, as torch's compiler does on the first call of an op, its default arguments would hold the
# process group for good: the group's threads outlive destroy_process_group and may abort the process at exit.
import torch.distributed.nn
from torch import Tensor

from uncausal.kernels.cpu.info_nce_torch import Negatives, Pairs, acc_dtype, first_order
from uncausal.kernels.launch import on_device


def rows_per_rank(group: dist.ProcessGroup, *tensors: Tensor) -> list[list[int]]:
    """Return for each tensor the rows that every rank holds: one exchange, and one wait for the device."""
    mine = torch.tensor([len(x) for x in tensors], device=tensors[0].device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, mine, group=group)
    return torch.stack(counts, 1).tolist()


def _gather(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    # Collectives want equal shapes, so blocks travel padded to the longest.
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    blocks = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(blocks, padded, group=group)
    return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """Rows of all ranks in rank order; backward sums what all ranks made of this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather(x, sizes, group)

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        with torch.no_grad():
            mine = _scatter(grad, ctx.sizes, ctx.group)
        return *first_order([mine], [grad]), None, None


def _scatter(grad: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of this rank's rows."""
    acc = acc_dtype(grad.dtype)  # in bf16 it would round at every step
    padded = grad.new_zeros(len(sizes), max(sizes), *grad.shape[1:], dtype=acc)
    for block, part in zip(padded, grad.split(sizes), strict=True):
        block[: len(part)] = part
    mine = torch.empty_like(padded[0])
    dist.reduce_scatter(mine, list(padded), group=group)
    return mine[: sizes[dist.get_rank(group)]]


def gather_rows(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """Concatenate the rows of all ranks, with gradients for floating dtypes."""
    return _Gather.apply(x, sizes, group) if x.is_floating_point() else _gather(x, sizes, group)


class _Sum(torch.autograd.Function):
    """Sum over ranks. Every rank back-propagates the same sum, so backward changes nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum a loss over ranks."""
    return _Sum.apply(x, group)


class _Exchange:
    """Blocks on their way, to the next rank and from the previous one, while other work goes on."""

    def __init__(self, tensors: list[Tensor], rows: int, group: dist.ProcessGroup):
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        after = dist.get_global_rank(group, (rank + 1) % world)
        before = dist.get_global_rank(group, (rank - 1) % world)
        self.sent = [x.contiguous() for x in tensors]  # held until they have left
        self.received = [x.new_empty(rows, *x.shape[1:]) for x in tensors]
        exchange = []
        for x, y in zip(self.sent, self.received, strict=True):
            exchange += [dist.P2POp(dist.isend, x, after, group), dist.P2POp(dist.irecv, y, before, group)]
        self.requests = dist.batch_isend_irecv(exchange)

    def wait(self) -> list[Tensor]:
        """Return the blocks of the previous rank."""
        for request in self.requests:
            request.wait()
        return self.received


class _RingRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, hard, temperature, row_ids, col_ids, margin, sizes, group, sweeps):
        sweep_lse, _ = sweeps
        world, rank = len(sizes), dist.get_rank(group)
        pairs = Pairs.of(q, k[: len(q)], hard, temperature, margin)
        lse = pairs.hard_logits.logsumexp(1)
        block = [k] if col_ids is None else [k, col_ids]
        for step in range(world):
            keys, ids = block[0], block[1] if len(block) > 1 else None
            coming = None
            if step < world - 1:
                coming = _Exchange(block, sizes[(rank - step - 1) % world], group)
            negatives = Negatives(row_ids, ids, 0 if step == 0 else len(keys), pairs.limit)
            with on_device(q):
                block_lse = sweep_lse(q, keys, temperature, negatives, False)[0]
            lse = torch.logaddexp(lse, block_lse)
            if coming is not None:
                block = coming.wait()
        ctx.save_for_backward(q, k, hard, temperature, row_ids, col_ids, lse)
        ctx.options = margin, sizes, group, sweeps
        return pairs.loss(lse)

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # read once: a checkpoint unpacks once
        with torch.no_grad(), torch.autocast(grads[0].device.type, enabled=False):
            found = _RingRows.sweep_back(saved, ctx.options, grads[0])
        return *first_order(found, saved[:4]), *[None] * 6

    @staticmethod
    def sweep_back(saved, options, grad: Tensor):
        q, k, hard, temperature, row_ids, col_ids, lse = saved
        margin, sizes, group, (_, sweep_gradients) = options
        world, rank = len(sizes), dist.get_rank(group)
        pairs = Pairs.of(q, k[: len(q)], hard, temperature, margin)
        weight, total = grad.contiguous(), torch.logaddexp(lse, pairs.pos)
        dq, dk = torch.zeros_like(pairs.qs), torch.zeros_like(k, dtype=pairs.qs.dtype)
        mass = torch.zeros_like(total)
        block, home = [k] if col_ids is None else [k, col_ids], None
        for step in range(world):
            keys, ids = block[0], block[1] if len(block) > 1 else None
            rows, coming = sizes[(rank - step - 1) % world], None
            if step < world - 1:
                coming = _Exchange(block, rows, group)
            negatives = Negatives(row_ids, ids, 0 if step == 0 else len(keys), pairs.limit)
            with on_device(q):
                parts = sweep_gradients(q, keys, temperature, negatives, weight, total, None)
            dq += parts[0]
            mass += parts[2]
            # A block's gradient follows it a sweep later. After as many hops as ranks it is home, with what
            # all ranks added to it.
            if home is not None:
                (dk,) = home.wait()
            dk += parts[1]
            home = _Exchange([dk], rows, group)
            if coming is not None:
                block = coming.wait()
        assert home is not None
        (dk,) = home.wait()
        dq, dhard, dtemperature = pairs.gradients(dq, dk[: len(q)], mass, weight, total)
        return dq, dk, dhard, dtemperature


def ring_rows(
    q: Tensor,
    k: Tensor,
    hard: Tensor,
    temperature: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    margin: float | None,
    sizes: list[int],
    group: dist.ProcessGroup,
    sweeps: tuple[Callable, Callable],
) -> Tensor:
    """Loss per local query (B,) against the keys of all ranks, of which two foreign blocks are held.

    Args:
        q, k, hard, temperature: this rank's (B, D), (M, D), (B, K, D) and (); key i is query i's positive.
        row_ids, col_ids: (B,) and (M,), or None.
        margin: as for `info_nce`.
        sizes: the number of keys of every rank.
        group: the ranks.
        sweeps: `sweep_lse` and `sweep_gradients` of a backend.
    """
    return _RingRows.apply(q, k, hard, temperature, row_ids, col_ids, margin, sizes, group, sweeps)
