"""The proof helpers themselves: each must pass what is right and fail what is wrong."""

import sys

import pytest
import torch
import triton
import triton.language as tl

from uncausal.bench import ladder


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, out_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros([M, N], tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs_m[:, None] * K + k + offs_k[None, :])
        b = tl.load(b_ptr + (k + offs_k[:, None]) * N + offs_n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], acc)


@triton.jit
def _double_kernel(x_ptr, out_ptr, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    if MASKED:
        tl.store(out_ptr + offs, x * 2, mask=offs < n)
    else:
        tl.store(out_ptr + offs, x * 2)


def _double(x, masked=True):
    out = torch.empty_like(x)
    _double_kernel[(triton.cdiv(x.numel(), 32),)](x, out, x.numel(), MASKED=masked, BLOCK=32)
    return out


def _compile_matmul(arch, size, num_warps):
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "K": "i32"}
    return ladder.compile_for(
        _matmul_kernel,
        signature,
        {"M": size, "N": size, "BLOCK_K": 32},
        arch,
        num_warps=num_warps,
        divisible=["a_ptr", "b_ptr", "out_ptr", "K"],
    )


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942"])
def test_compile_for_reads_what_the_compiler_built(arch):
    built = _compile_matmul(arch, 64, 4)
    assert built.problems() == []
    assert 16 < built.registers <= 255 and built.occupancy >= 1
    assert 2 * 64 * 32 * 2 <= built.shared_bytes <= built.arch.shared_program
    assert all(name.startswith(built.arch.matrix_unit) for name in built.matrix_instructions)


def test_compile_for_sees_spills():
    """A 256x128 fp32 accumulator takes 1024 registers a thread with one warp."""
    built = _compile_matmul("sm80", 128, 1)
    assert built.spill_bytes > 100 and built.local_accesses > 100
    assert any("spills" in problem for problem in built.problems())


def test_compile_for_sees_the_wrong_matrix_unit():
    """A tile of 32 rows is too small for HGMMA: Triton falls back to HMMA, at half the rate."""
    (problem,) = _compile_matmul("sm90", 32, 4).problems()
    assert "HMMA" in problem and problem.endswith("instead of HGMMA")


def test_compile_for_sees_a_missing_matrix_unit():
    pointers = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}
    built = ladder.compile_for(_double_kernel, pointers, {"MASKED": True, "BLOCK": 128}, "sm80")
    assert built.problems() == ["uses no matrix instruction instead of HMMA"]
    assert built.problems(matrix_unit=False) == []


def test_compile_for_rejects_unknown_arguments():
    with pytest.raises(ValueError, match="no type for"):
        ladder.compile_for(_double_kernel, {"x_ptr": "*fp32"}, {}, "sm80")
    with pytest.raises(ValueError, match="unknown architecture"):
        ladder.compile_for(_double_kernel, {}, {}, "sm75")


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "programs"),
    [
        (255, 49152, 4, "sm80", 2),  # 64 K / (256 * 128) registers; three would fit into shared memory
        (128, 49152, 4, "sm80", 3),  # four by registers, three by shared memory
        (32, 0, 4, "sm90", 16),  # 64 warps
        (168, 131072, 8, "sm90", 1),
        (241, 32768, 4, "gfx942", 2),  # two waves on each SIMD
        (128, 70000, 4, "gfx942", 0),
    ],
)
def test_occupancy(registers, shared, warps, arch, programs):
    facts = ladder.ARCHS[arch]
    assert ladder.Compiled(facts, warps, 2, registers, 0, 0, shared, {}, "", "").occupancy == programs


def test_assert_close_bounds_the_error_by_eagers():
    expected = torch.randn(7, 5, dtype=torch.float64)
    eager = expected + 1e-3
    error, eager_error = ladder.assert_close_to_float64(expected + 1.9e-3, expected, eager, atol=0)
    assert error == pytest.approx(1.9e-3) and eager_error == pytest.approx(1e-3)
    with pytest.raises(AssertionError, match="exceeds 2 x"):
        ladder.assert_close_to_float64(expected + 2.1e-3, expected, eager, atol=0)
    ladder.assert_close_to_float64(expected + 2.1e-3, expected, eager, atol=0, factor=ladder.GRADIENT_FACTOR)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_assert_close_fails_on_a_single_bad_element(bad):
    expected = torch.zeros(4, dtype=torch.float64)
    actual = torch.tensor([0.0, bad, 0.0, 0.0])
    with pytest.raises(AssertionError, match="not finite"):
        ladder.assert_close_to_float64(actual, expected, expected, atol=1.0)
    with pytest.raises(AssertionError, match="differ from the reference"):
        ladder.assert_close_to_float64(torch.zeros(4), actual.double(), actual, atol=1.0)
    ladder.assert_close_to_float64(actual, actual.double(), actual, atol=0.0)


def test_poisoned_empty_reaches_every_allocation(poison):
    like = torch.ones(3, dtype=torch.bfloat16)
    for tensor in (
        torch.empty(3),
        torch.empty_like(like),
        like.new_empty(2),
        torch.empty_strided((2, 2), (2, 1)),
    ):
        assert tensor.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def test_poisoned_empty_restores_torch():
    with ladder.poisoned_empty():
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_double_in_the_interpreter(dtype, poison):
    x = torch.randn(70, dtype=dtype)
    assert torch.equal(_double(x), x * 2)


@pytest.mark.sanitize
def test_double_small(poison):
    x = torch.randn(70, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(_double(x), x * 2)


@pytest.mark.sanitize
@pytest.mark.skipif("ttsem.sanitize" not in str(sys.modules["__main__"].__spec__), reason="a GPU forgives it")
def test_double_small_unmasked_is_caught():
    x = torch.randn(70, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(Exception, match="past the end of the tensor"):
        _double(x, masked=False)


def test_interpret_runs_the_marked_tests():
    assert "2 passed" in ladder.interpret(__file__)


def test_interpret_fails_when_nothing_runs():
    with pytest.raises(AssertionError, match="failed"):
        ladder.interpret(__file__, select="no_such_test")


def test_sanitize_runs_the_marked_tests():
    assert "2 passed" in ladder.sanitize(__file__, select="small")
