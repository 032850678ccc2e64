"""Which scores attention drops: the mask that the kernels, the torch path and the reference share."""

import torch
from torch import Tensor

PHILOX_ROUNDS = 7  # the fewest rounds that pass BigCrush (Salmon et al., 2011, table 2)


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

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011), section 3.3.
    """
    low = 0xFFFFFFFF
    c1 = first_group[..., None] * 4 + torch.arange(4 * groups, device=rows.device)
    c0, c2 = (x[..., None].expand_as(c1) for x in (rows, heads))
    c3 = torch.zeros((), dtype=torch.int64, device=rows.device)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(PHILOX_ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        # the upper halves of c1 and c3 hold garbage, which the last mask removes
        c0 = (b >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(low)
        c2 = (a >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(low)
        c1, c3 = b, a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    bits = c1.new_empty(*c1.shape[:-1], groups, 4, 4, dtype=torch.int32)
    for word, c in enumerate((c0, c1, c2, c3)):
        bits[..., word, :] = c.unflatten(-1, (groups, 4))  # keeps the lower half
    halves = bits.view(torch.int16).flatten(-3)  # the lowest half comes first
    return halves >= dropout_threshold(dropout_p) - 32768


def dropout_threshold(dropout_p: float) -> int:
    """Return how many of the 65536 values of 16 bits dropout drops."""
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
