"""The matrix products of attention for a block of scores, as they stand in Triton's intermediate code.

`python -m uncausal.bench.static --products`.
"""

from __future__ import annotations

from uncausal.bench import cycles
from uncausal.bench.launches.recorded import recorded_launches
from uncausal.bench.launches.trace import packed

KERNELS = ("attn_fwd", "attn_bwd_dq", "attn_bwd_dkv")
FLASH_ATTENTION_2 = 5
WHY = """\
Backward computes scores and their gradient twice, for dQ and for dK/dV. One kernel for all three would
need five products, but there the programs of different keys add to the same rows of dQ: by atomics, whose
order no two runs share, or into a part of dQ for each block of keys, fp32, for a second pass to add in
order. The two products are the price of the same bits every time in memory that is linear in the tokens.
Above 128 dimensions the registers hold dK or dV, not both, and scores are computed a third time."""


def count(arch: str, dims: tuple[int, ...] = (64, 128, 256)) -> dict[int, dict[str, list[int]]]:
    """Count the products of a block: by head dimension and kernel, a number for every launch."""
    found: dict[int, dict[str, list[int]]] = {}
    for dim in dims:
        with recorded_launches(arch) as launches:
            packed([300, 512], dim)
        found[dim] = {}
        for launch in launches:
            name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
            if name in KERNELS:
                (blocks,) = set(cycles.products(launch.compile(arch).ttgir))  # full blocks and edges alike
                found[dim].setdefault(name, []).append(blocks)
    return found


def table(counts: dict[int, dict[str, list[int]]]) -> str:
    """A Markdown table, and the reason for the products that FlashAttention-2 has not."""
    lines = ["| D | forward | dQ | dK/dV | backward | FlashAttention-2's backward |", "|---" * 6 + "|"]
    for dim, kernels in counts.items():
        cells = [" + ".join(map(str, kernels[name])) for name in KERNELS]
        backward = sum(sum(kernels[name]) for name in KERNELS[1:])
        lines.append(f"| {dim} | {' | '.join(cells)} | {backward} | {FLASH_ATTENTION_2} |")
    return "\n".join([*lines, "", WHY])
