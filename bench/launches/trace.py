"""What calls of attention as users make them launch: tiles, and the share of their work that is of use.

`python -m uncausal.bench.static --trace`. A launch computes whole blocks of scores; of use are those of a
query and a key that it sees. Rows in excess of a tile, keys outside a row's sequence or window, and what the
draws of dropout align are not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uncausal.bench.launches.recorded import replaced_launches

COLUMNS = (
    "call",
    "kernel",
    "D",
    "tile",
    "warps, stages",
    "sequences",
    "tiles",
    "rows of use",
    "scores of use",
)


class Traced(NamedTuple):
    """One launch of an attention kernel."""

    arch: str
    call: str
    kernel: str
    dim: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    shared: bool  # whether sequences share a tile
    tiles: int  # without the empty ones, which end at once
    rows: float  # share of the tiles' rows that are tokens
    computed: int  # scores, of all heads
    scores: float  # share of them that are visible


def _lengths(kind: str) -> list[int]:
    """Token counts: log-normal texts, sentences of 12 to 39, or a batch that encoding makes of such texts."""
    generator = torch.Generator().manual_seed(0)
    if kind in ("sentences", "paragraphs"):
        low, high = (12, 39) if kind == "sentences" else (64, 512)
        return torch.randint(low, high + 1, (64,), generator=generator).tolist()
    count = 64 if kind == "texts" else 1000
    lengths = torch.randn(count, generator=generator).mul(0.8).add(4.5).exp().clamp(16, 512).int().tolist()
    if kind == "texts":
        return lengths
    from uncausal.encoder.batching import token_batches

    batches = [[lengths[i] for i in batch] for batch in token_batches(lengths, 16384)]
    return batches[{"first batch": 0, "middle batch": len(batches) // 2, "last batch": -1}[kind]]


def _tensors(total: tuple[int, ...], heads: tuple[int, int], dim: int) -> Any:
    shapes = ((*total, h, dim) for h in (heads[0], heads[1], heads[1]))
    return [torch.empty(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]


def dense(batch: int, length: int, dim: int, heads: tuple[int, int] = (2, 2), **options: Any) -> None:
    from uncausal.kernels.attention import flash_attn_func

    q, k, v = _tensors((batch, length), heads, dim)
    out: Any = flash_attn_func(q, k, v, backend="triton", **options)
    out.sum().backward()


def packed(lengths: list[int], dim: int, heads: tuple[int, int] = (2, 2), known=True, **options: Any) -> None:
    """The host knows the lengths, as in an encoder, or but the offsets and the greatest, as in flash-attn."""
    from uncausal.kernels.attention import flash_attn_varlen_func
    from uncausal.kernels.packing import PackedLayout

    layout = PackedLayout.from_lengths(lengths)
    cu, longest = layout.cu_seqlens, max(lengths)
    options |= {"layout": layout} if known else {}
    q, k, v = _tensors((layout.total,), heads, dim)
    out: Any = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, backend="triton", **options)
    out.sum().backward()


CALLS: dict[str, Callable[[], None]] = {
    **{f"dense 4 x 2048, D {d}": partial(dense, 4, 2048, d) for d in (64, 80, 96, 128, 192, 256)},
    "dense 2 x 512, GQA 9:3": partial(dense, 2, 512, 64, (9, 3)),
    "dense 2 x 512, GQA 32:8": partial(dense, 2, 512, 128, (32, 8)),
    "drop-in varlen, log-normal 16 to 512": lambda: packed(_lengths("texts"), 64, known=False),
    "drop-in varlen, uniform 64 to 512": lambda: packed(_lengths("paragraphs"), 64, known=False),
    "drop-in varlen, sentences": lambda: packed(_lengths("sentences"), 64, known=False),
    **{
        f"encoder, {kind}, GQA 9:3": lambda kind=kind: packed(_lengths(kind), 64, (9, 3))
        for kind in ("first batch", "middle batch", "last batch")
    },
    "SimCSE, sentences, dropout 0.3": lambda: packed(_lengths("sentences"), 64, dropout_p=0.3),
    "SimCSE, uniform 64 to 512, dropout 0.3": lambda: packed(_lengths("paragraphs"), 64, dropout_p=0.3),
    "Gemma, window 512, 2048 and 1024, GQA 4:1": lambda: packed(
        [2048, 1024], 256, (4, 1), window_size=(512, 512)
    ),
}


def trace(arch: str, calls: dict[str, Callable[[], None]] | None = None) -> list[Traced]:
    """List the launches of attention's kernels that calls make on an architecture, forward and backward."""
    found: list[Traced] = []
    for name, call in (calls or CALLS).items():

        def record(kernel, *args, grid, warmup, name=name, **facts):
            if "tiles_ptr" in facts:
                found.append(_traced(arch, name, kernel.__name__.strip("_").removesuffix("_kernel"), facts))

        with replaced_launches(arch, record):
            call()
    return found


def table(rows: list[Traced]) -> str:
    """A Markdown table of launches."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [row.call, row.kernel, row.dim, f"{row.block_m} x {row.block_n}"]
        cells += [f"{row.warps}, {row.stages}", "share a tile" if row.shared else "have tiles of their own"]
        cells += [row.tiles, f"{row.rows:.2f}", f"{row.scores:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _traced(arch: str, call: str, kernel: str, facts: dict[str, Any]) -> Traced:
    keys_side = kernel == "attn_bwd_dkv"  # whose tiles are of keys, and walk the rows of queries
    block_m, block_n, edge, group = (facts[x] for x in ("BLOCK_M", "BLOCK_N", "EDGE_BLOCK", "G"))
    tiles = facts["tiles_ptr"].long()
    first, last = tiles[tiles[:, 1] > tiles[:, 0]].sub(torch.tensor([0, 1])).unbind(1)
    own, other, window = facts["cu_q_ptr"], facts["cu_k_ptr"], (facts["left"], facts["right"])
    if keys_side:
        own, other, window = other, own, window[::-1]
    lo, hi = _visible(own.long(), other.long(), *window)
    mine, theirs = (1, group) if keys_side else (group, 1)  # rows of a token on either side
    block, step = (block_n, block_m) if keys_side else (block_m, block_n)
    align = 32 if facts["DROPOUT"] and not keys_side else 1
    a, b = first // mine, last // mine
    # as the kernels cut what a tile sees: whole blocks from its first key to its last
    begin = lo[a] * theirs // align * align
    head = (lo[b] * theirs - begin).clamp(min=0).add(edge - 1) // edge * edge
    full = (hi[a] * theirs - begin - head).clamp(min=0) // step * step
    tail = (hi[b] * theirs - begin - head - full).clamp(min=0).add(edge - 1) // edge * edge
    computed = int((head + full + tail).sum()) * block
    sums = torch.cat(
        [torch.zeros(1, dtype=torch.long), ((hi - lo) * theirs).repeat_interleave(mine).cumsum(0)]
    )
    visible = int((sums[last + 1] - sums[first]).sum())
    return Traced(
        arch,
        call,
        kernel,
        facts["D"],
        block_m,
        block_n,
        facts["num_warps"],
        facts["num_stages"],
        facts["SHARED"],
        len(first),
        int((last - first + 1).sum()) / (len(first) * block),
        computed * facts["k_ptr"].shape[1],
        visible / computed,
    )


def _visible(own: Tensor, other: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Bounds of what each token of one side sees of the other, from the offsets of both."""
    token = torch.arange(int(own[-1]))
    seq = torch.searchsorted(own, token, right=True) - 1
    lo, hi = other[seq], other[seq + 1]
    diagonal = hi + token - own[seq + 1]
    return (
        torch.minimum(torch.maximum(diagonal - left, lo), hi),
        torch.minimum(torch.maximum(diagonal + right + 1, lo), hi),
    )
