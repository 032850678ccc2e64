"""Registers, spills and cycle bounds of shipped kernels stay within tests/static_budget.json.

A change that improves the figures, or accepts worse ones, renews the file with
`python -m uncausal.bench.static --write-budget`, and says so in its commit.
"""

import json

import pytest
import torch

from uncausal.bench import cycles, ladder, static

BUDGET = json.loads(static.BUDGET.read_text())
REGISTERS_SLACK, BOUND_SLACK = 8, 0.01

# What `make test` has time for; `python -m uncausal.bench.static` builds the rest.
SUBSET = [("attention", "sm80"), ("attention", "sm90"), ("info_nce", "sm90"), ("latent_pooling", "sm90")]


def _within(line: dict, allowed: dict) -> list[str]:
    found = list(line["problems"])
    if line["registers"] > allowed["registers"] + REGISTERS_SLACK:
        found.append(f"{line['registers']} registers, the budget is {allowed['registers']}")
    if line.get("bound", 0.0) < allowed["bound"] - BOUND_SLACK:
        found.append(f"bound {line.get('bound', 0.0):.3f}, the budget is {allowed['bound']}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "arch"), SUBSET)
def test_kernel_stays_within_budget(kernel, arch):
    violations, seen = {}, set()
    for launch in static.launches(kernel, arch):
        line = static.row(kernel, arch, launch)
        key = static.budget_key(line)
        seen.add(key)
        assert key in BUDGET, f"{key} has no budget: run python -m uncausal.bench.static --write-budget"
        if found := _within(line, BUDGET[key]):
            violations[key] = found
    assert violations == {}
    assert seen == {key for key in BUDGET if key.startswith(f"{kernel}-") and f"-{arch}-" in key}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"registers": 150}, "registers"),
        ({"bound": 0.45}, "bound"),
        ({"problems": ["spills 8 B"]}, "spills"),
    ],
    ids=["registers", "bound", "spill"],
)
def test_within_fails_on_a_regression(change, word):
    line = {"registers": 128, "bound": 0.5, "problems": []}
    allowed = {"registers": 128, "bound": 0.5}
    assert _within(line, allowed) == []
    (found,) = _within(line | change, allowed)
    assert word in found


def test_recorded_launches_keep_types_constants_and_alignment():
    with static.recorded_launches("sm90") as found:
        from uncausal.kernels.info_nce import info_nce

        query, key = (torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        info_nce(query, key, backend="triton")
    launch = found[0]
    assert dict(launch.signature)["x_ptr"] == "*bf16" and dict(launch.constexprs)["D"] == 128
    assert "x_ptr" in launch.divisible and dict(launch.options)["num_warps"] in (4, 8)


def _sass(*lines: str) -> str:
    out, address = [], 0
    for line in lines:
        if line.endswith(":"):
            out.append(line)
        else:
            out.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join(out)


def test_main_loop_counts_cycles_of_a_known_loop():
    """Four warps, sm80: HMMA.16816 is 4096 FLOP a warp; the waiting block behind EXIT belongs to the loop."""
    loop = _sass(
        "MOV R1, R2",
        ".L_x_0:",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        "MUFU.EX2 R1, R1",
        "@P1 BRA `(.L_x_2)",
        ".L_x_1:",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_2:",
        "NOP",
        "BRA `(.L_x_1)",
    )
    ttgir = "%s = tt.dot %a, %b : tensor<64x32xbf16, #x> * tensor<32x64xbf16, #x> -> tensor<64x64xf32, #mma>"
    built = ladder.Compiled(ladder.ARCHS["sm80"], 4, 2, 32, 0, 0, 0, {}, loop, ttgir)
    cost = cycles.main_loop(built)
    assert cost == cycles.Cost(mma=2 * 4 * 4096 / 2048, exp=8.0, issue=7.0, useful=1.0)
    assert cost.bound == pytest.approx(16 / 24)
    layout = "#mma = #ttg.nvidia_mma<{versionMajor = 2, warpsPerCTA = [8, 1], instrShape = [16, 8]}>\n"
    built.ttgir = layout + ttgir  # eight warps of 16 rows on 64 rows
    assert cycles.main_loop(built).useful == 0.5


def test_main_loop_is_the_innermost_one():
    nested = _sass(
        ".L_x_0:",
        "MOV R1, R2",
        ".L_x_1:",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0",
        "@P0 BRA `(.L_x_1)",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    )
    assert cycles.main_loops(nested) == [["HMMA.16816.F32.BF16", "BRA"]]


def test_tensor_memory_products_of_an_unrolled_loop():
    """One product of 128x128x64 takes four UTCHMMA; the assembler may unroll the loop around it."""
    product = "ttng.tc_gen5_mma %a : tensor<128x64xbf16, #x> tensor<64x128xbf16, #x> tensor<128x128xf32, #t>"
    ttgir = f"  scf.for %i = %a to %b {{\n    {product}\n  }}"
    flops = 2 * 128 * 128 * 64
    assert cycles._tensor_memory_flops(ttgir, 4) == flops
    assert cycles._tensor_memory_flops(ttgir, 16) == 4 * flops
    with pytest.raises(ValueError, match="0 loops"):
        cycles._tensor_memory_flops(ttgir, 6)
