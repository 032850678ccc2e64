"""Packed attention: every path against the float64 reference, forward and every gradient."""

import itertools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncausal.bench import ladder
from uncausal.kernels import packing
from uncausal.kernels.attention import (
    _flash_attn_varlen,
    _flash_attn_varlen_backward,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_ref,
)
from uncausal.kernels.attention_dropout import dropout_threshold, philox_keep
from uncausal.kernels.cpu import attention_cpu
from uncausal.kernels.gpu import attention_triton
from uncausal.kernels.launch import ARCHS, OWN_TILE_TOKENS, attention_config
from uncausal.kernels.packing import PackedLayout, TileMaps

SEED = 0x123456789ABCDE

# one aligned, one prime, a length-1 sequence, zero-length ones on either side or both, one extreme skew
LENGTHS = {
    "aligned": ([64, 64], [64, 64]),
    "self": ([5, 1, 0, 17, 131, 3, 0, 2], [5, 1, 0, 17, 131, 3, 0, 2]),
    "cross": ([5, 1, 0, 17, 131, 3, 9, 2], [7, 1, 4, 11, 97, 0, 2, 139]),
}
MODES = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(13, 13)),
    "left": dict(window_size=(7, 0)),
    "right": dict(window_size=(-1, 4)),
    "softcap": dict(softcap=2.0),
    "dropout": dict(dropout_p=0.3, dropout_seed=SEED),
    "all": dict(window_size=(9, 21), softcap=1.5, dropout_p=0.2, dropout_seed=SEED, softmax_scale=0.2),
}


def make(lengths, heads, kv_heads, dim, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int().to(device) for x in lengths)
    shapes = [(sum(lengths[0]), heads, dim)] + [(sum(lengths[1]), kv_heads, dim)] * 2
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes)
    return q, k, v, cu_q, cu_k


def gradients(function, q, k, v, *args, **kwargs):
    """Output, log-sum-exp and the gradients of q, k, v through both, for one fixed pair of cotangents."""
    out, lse = function(q, k, v, *args, **kwargs)[:2]
    generator = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x.device) for x in (out, lse))
    dout = dout.to(q.dtype).to(out.dtype)
    finite = lse.isfinite()
    total = (out * dout).sum() + (lse.masked_fill(~finite, 0) * dlse).sum()
    return out, lse, *torch.autograd.grad(total, (q, k, v))


def check(tensors, mode, **call):
    """Bound the error by that of eager torch in the same dtype, both against the reference in float64."""
    q, k, v, cu_q, cu_k = tensors
    exact = gradients(
        flash_attn_varlen_ref, *(x.detach().double().requires_grad_() for x in (q, k, v)), cu_q, cu_k, **mode
    )
    eager = gradients(flash_attn_varlen_ref, q, k, v, cu_q, cu_k, **mode)
    ours = gradients(flash_attn_varlen_func, q, k, v, cu_q, cu_k, **mode, return_attn_probs=True, **call)
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), ours, exact, eager, strict=True):
        factor = ladder.FORWARD_FACTOR if name in ("out", "lse") else ladder.GRADIENT_FACTOR
        atol = 1e-5 if q.dtype == torch.float32 else 1e-3
        ladder.assert_close_to_float64(a, b, c, atol=atol, factor=factor, name=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
def test_flash_attn_varlen_func_cpu(lengths, heads, mode):
    check(make(LENGTHS[lengths], *heads, 16, torch.float32), MODES[mode])


@pytest.fixture
def no_compiler(monkeypatch):
    """Run the test as on a system where the CPU's kernel cannot be compiled."""
    monkeypatch.setattr(attention_cpu, "library", lambda: None)


@pytest.fixture
def compiled():
    if attention_cpu.library() is None:
        pytest.skip("no C compiler")


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_flash_attn_varlen_func_cpu_without_compiler(lengths, mode):
    check(make(LENGTHS[lengths], 6, 2, 16, torch.float32), MODES[mode])


@pytest.mark.parametrize("mode", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_flash_attn_varlen_func_cpu_low_precision(dtype, mode):
    check(make(LENGTHS["self"], 6, 2, 80, dtype), MODES[mode])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dim", [5, 16])
def test_cpu_kernel_takes_tensors_as_they_lie(dim):
    """Heads before tokens, as a model's projections leave them, and elements of a row that lie apart."""
    q, k, v, cu, _ = make(([9, 20, 300], [9, 20, 300]), 4, 2, dim, torch.float32)
    expected = gradients(flash_attn_varlen_func, q, k, v, cu, cu, return_attn_probs=True)
    for order in ((1, 0, 2), (2, 0, 1)):
        inverse = [order.index(i) for i in range(3)]
        views = [x.detach().permute(order).contiguous().permute(inverse).requires_grad_() for x in (q, k, v)]
        assert not views[0].is_contiguous()
        got = gradients(flash_attn_varlen_func, *views, cu, cu, return_attn_probs=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("mode", ["plain", "window", "softcap"])
def test_cpu_kernel_gives_a_sequence_the_same_bits_in_any_company(mode):
    """Buckets padded a sequence to the length of its neighbours, and its sums came in another order."""
    lengths = [30, 7, 64, 5, 6, 129, 1, *range(8, 24)]
    q, k, v, cu, _ = make((lengths, lengths), 4, 2, 16, torch.float32)
    call = dict(return_attn_probs=True, **MODES[mode])
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))

    def run(rows):
        parts = [x[rows].detach().requires_grad_() for x in (q, k, v)]
        offsets = cu if rows == slice(None) else torch.tensor([0, len(parts[0])], dtype=torch.int32)
        out, lse, _ = flash_attn_varlen_func(*parts, offsets, offsets, **call)
        return out, lse.t(), *torch.autograd.grad(out, parts, dout[rows])

    together = run(slice(None))
    for begin, end in itertools.pairwise(cu.tolist()):
        for a, b in zip(together, run(slice(begin, end)), strict=True):
            assert torch.equal(a[begin:end], b)


@pytest.mark.usefixtures("compiled")
def test_cpu_kernel_does_not_depend_on_the_number_of_threads():
    tensors = make(LENGTHS["cross"], 6, 2, 16, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(gradients(flash_attn_varlen_func, *tensors, return_attn_probs=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_cpu_kernel_is_compiled_where_a_compiler_is(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(attention_cpu.shutil, "which", lambda name: None)
    assert attention_cpu.library.__wrapped__() is None and "no C compiler" in caplog.text
    monkeypatch.undo()
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert attention_cpu.library.__wrapped__() is not None
    built = list((tmp_path / "uncausal").iterdir())
    assert [path.suffix for path in built] == [".so"]
    stamp = built[0].stat().st_mtime_ns
    assert attention_cpu.library.__wrapped__() is not None and built[0].stat().st_mtime_ns == stamp
    broken = tmp_path / "broken.c"
    broken.write_text("int attention_forward(")
    monkeypatch.setattr(attention_cpu, "SOURCE", broken)
    assert attention_cpu.library.__wrapped__() is None and "expected" in caplog.text


@pytest.mark.parametrize("path", ["compiled", "no_compiler"])
@pytest.mark.parametrize("mode", ["causal", "plain", "dropout"])
def test_autocast_casts_as_it_does_for_sdpa(mode, path, request):
    """Under autocast the buckets' products became bf16 and raised; fp32 q, k with bf16 v were refused."""
    request.getfixturevalue(path)
    q, k, v, cu, _ = make(([12, 40, 12], [12, 40, 12]), 4, 2, 16, torch.float32)
    low = [x.detach().bfloat16() for x in (q, k, v)]
    expected = flash_attn_varlen_func(*low, cu, cu, **MODES[mode])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_varlen_func(q, k, v, cu, cu, **MODES[mode])
        mixed = flash_attn_varlen_func(q, k, low[2], cu, cu, **MODES[mode])
        dense = flash_attn_func(*(x[:12][None] for x in (q, k, v)), causal=True)
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))  # within, as some loops do
    assert out.dtype == dense.dtype == torch.bfloat16
    assert torch.equal(out, expected) and torch.equal(mixed, expected)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in grads)


@pytest.mark.parametrize("mode", ["plain", "all"])
def test_gradcheck(mode):
    q, k, v, cu_q, cu_k = make(([3, 0, 5], [4, 2, 1]), 2, 1, 4, torch.float64)

    def call(q, k, v):
        out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, **MODES[mode], return_attn_probs=True)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(call, (q, k, v))


# --- the parametrisation of flash-attn's variable-length test, reduced ---


DIMS = [32, 59, 64, 80, 96, 128, 160, 192, 256]
HEADS = {"mha": (6, 6), "mqa": (6, 1), "gqa": (6, 2)}
SIZES = [(1, 147), (113, 203), (108, 256), (128, 128), (256, 113)]


def random_lengths(size, dim):
    generator = torch.Generator().manual_seed(sum(size) + dim)
    return [torch.randint(max(1, n - 20), n + 1, (2,), generator=generator).tolist() for n in size]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_random_lengths(size, heads, dim):
    check(make(random_lengths(size, dim), *HEADS[heads], dim, torch.float32), {})


# every dimension meets mha, mqa and gqa; pairs of lengths take turns, half as long for two of the three
@pytest.mark.interpret
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("size", "heads", "dim"),
    [
        (tuple(-(-n // (1 if turn == i % 3 else 2)) for n in SIZES[(i + turn) % 5]), heads, dim)
        for i, dim in enumerate(DIMS)
        for turn, heads in enumerate([(2, 2), (2, 1), (4, 2)])
    ],
    ids=str,
)
def test_random_lengths_interpreted(size, heads, dim):
    lengths = random_lengths(size, dim)
    check(make(lengths, *heads, dim, torch.float16), {}, backend="triton")


# --- properties ---


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=12), st.sampled_from(["plain", "window", "dropout"]))
def test_random_batches(lengths, mode):
    check(make((lengths, lengths), 3, 1, 8, torch.float32), MODES[mode])


def test_thousands_of_short_sequences():
    lengths = torch.randint(1, 41, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    q, k, v, cu, _ = make((lengths, lengths), 3, 1, 8, torch.float32)
    out = flash_attn_varlen_func(q, k, v, cu, cu)
    check_rows = slice(int(cu[1900]), None)
    sub = cu[1900:] - cu[1900]
    expected, _ = flash_attn_varlen_ref(q[check_rows], k[check_rows], v[check_rows], sub, sub)
    torch.testing.assert_close(out[check_rows], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_sequence_leaves_the_others_alone(value):
    lengths = [30, 7, 64, 5, 6]
    q, k, v, cu, _ = make((lengths, lengths), 4, 2, 16, torch.float32)
    good = gradients(flash_attn_varlen_func, q, k, v, cu, cu, return_attn_probs=True)
    with torch.no_grad():
        for x in (q, k, v):
            x[cu[3] : cu[4]] = value
    bad = gradients(flash_attn_varlen_func, q, k, v, cu, cu, return_attn_probs=True)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[cu[3] : cu[4]] = False
    for a, b in zip(good, bad, strict=True):
        a, b = (x.t() if x.dim() == 2 else x for x in (a, b))
        assert torch.equal(a[others], b[others])
    assert bad[0][~others].isnan().all()


def test_two_backwards_give_the_same_bits():
    tensors = make(LENGTHS["cross"], 6, 2, 16, torch.float32)
    first, second = (gradients(flash_attn_varlen_func, *tensors, return_attn_probs=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_follows_the_generator_and_its_rate():
    q, k, v, cu, _ = make(([96], [96]), 4, 2, 8, torch.float32)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(flash_attn_varlen_func(q, k, v, cu, cu, dropout_p=0.3))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    rows = torch.arange(500)
    keep = philox_keep(SEED, rows, torch.zeros_like(rows), torch.zeros_like(rows), 32, 0.3)
    assert keep.shape == (500, 1024)
    sigma = (0.3 * 0.7 / keep.numel()) ** 0.5
    assert abs(float(keep.float().mean()) - (1 - dropout_threshold(0.3) / 65536)) < 4 * sigma
    columns = keep.float() - keep.float().mean()
    correlation = columns.T @ columns / len(rows) / 0.21  # of neighbouring keys, which share Philox calls
    assert float(correlation.fill_diagonal_(0).abs().max()) < 7 / len(rows) ** 0.5


def test_philox_known_answer():
    """Philox4x32 with seven rounds, counter and key zero: the known answer of the Random123 distribution."""
    zero = torch.zeros(1, dtype=torch.int64)
    expected = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    bits = philox_bits_of_first_call(zero)
    assert bits == expected


def philox_bits_of_first_call(zero):
    """Read the words behind `philox_keep` bit by bit: a half is kept when it is at least the threshold."""
    words = []
    for word in range(4):
        halves = []
        for half in range(2):
            low, high = -32768, 32767  # the signed half lies in [low, high]
            while low < high:
                middle = (low + high + 1) // 2
                kept = philox_keep(0, zero, zero, zero, 1, (middle + 32768) / 65536)[0, 8 * word + half]
                low, high = (middle, high) if kept else (low, middle - 1)
            halves.append(low & 0xFFFF)
        words.append(halves[0] | halves[1] << 16)
    return words


# --- interfaces ---


def test_flash_attn_func_is_the_dense_case():
    q, k, v, cu_q, cu_k = make(([12] * 3, [20] * 3), 4, 2, 8, torch.float32)
    packed, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=True, return_attn_probs=True)
    dense = flash_attn_func(
        *(x.unflatten(0, (3, -1)) for x in (q, k, v)), causal=True, return_attn_probs=True
    )
    assert torch.equal(dense[0].flatten(0, 1), packed)
    assert torch.equal(dense[1], torch.stack(lse.split(12, 1)))


def test_positional_order_is_flash_attns():
    q, k, v, cu, _ = make(([12, 5], [12, 5]), 4, 2, 8, torch.float32)
    a = flash_attn_varlen_func(
        q, k, v, cu, cu, 12, 12, 0.0, 0.3, True, (4, -1), 2.0, None, False, False, None
    )
    b = flash_attn_varlen_func(
        q, k, v, cu, cu, softmax_scale=0.3, causal=True, window_size=(4, 0), softcap=2.0
    )
    assert torch.equal(a, b)


def test_unsupported_arguments_are_named():
    q, k, v, cu, _ = make(([4], [4]), 2, 1, 8, torch.float32)
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn_varlen_func(q, k, v, cu, cu, block_table=torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"\(4, 2, 8\).*\(4, 1, 4\)"):
        flash_attn_varlen_func(q, k[..., :4], v[..., :4], cu, cu)
    with pytest.raises(ValueError, match="int32"):
        flash_attn_varlen_func(q, k, v, cu.long(), cu.long())
    with pytest.raises(ValueError, match="backend"):
        flash_attn_varlen_func(q, k, v, cu, cu, backend="cuda")
    with pytest.raises(ValueError, match=r"softmax_scale must be above 0, got 0\.0"):
        flash_attn_varlen_func(q, k, v, cu, cu, softmax_scale=0.0)
    with pytest.raises(ValueError, match="int32, got .* not contiguous"):
        flash_attn_varlen_func(q, k, v, torch.stack([cu, cu + 9], 1)[:, 0], cu)


@pytest.mark.parametrize("bad", [[0, 200], [0, 3], [1, 4], [0, 6, 4], [0, 4, 2, 4]], ids=str)
def test_offsets_beyond_the_tensors_are_refused(bad):
    """Regression: the compiled kernel read and wrote past the end of the tensors."""
    q, k, v, cu, _ = make(([4], [4]), 2, 1, 8, torch.float32)
    cu = torch.cat([cu, cu.new_full((len(bad) - 2,), 4)])
    bad = torch.tensor(bad, dtype=torch.int32)
    for offsets in ((bad, cu), (cu, bad)):
        with pytest.raises(ValueError, match=r"must rise from 0 to 4, got \["):
            flash_attn_varlen_func(q, k, v, *offsets)
        with pytest.raises(ValueError, match=r"must rise from 0 to 4, got \["):
            flash_attn_varlen_func(q, k, v, *offsets, alibi_slopes=torch.ones(2))


def test_dense_batches_that_do_not_fit_are_refused():
    """Regression: keys of fewer sequences were read, and their gradients written, past the end."""
    q, k = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 4, 16)
    for keys, values in ((k[:1], k[:1]), (k[:1], k), (k, k[:, :7]), (k.repeat(2, 1, 1, 1),) * 2):
        with pytest.raises(ValueError, match="must be of one batch, and k and v of one length"):
            flash_attn_func(q, keys, values)
    out, lse, _ = flash_attn_func(q[:0], k[:0], k[:0], return_attn_probs=True)
    assert out.shape == (0, 8, 4, 16) and lse.shape == (0, 4, 8)


@pytest.mark.usefixtures("compiled")
def test_a_negative_softcap_is_none():
    q, k, v, cu, _ = make(([9, 20], [9, 20]), 4, 2, 16, torch.float32)
    assert torch.equal(
        flash_attn_varlen_func(q, k, v, cu, cu, softcap=-1.0), flash_attn_varlen_func(q, k, v, cu, cu)
    )


def test_opcheck():
    q, k, v, cu_q, cu_k = make(([3, 0, 5], [4, 2, 1]), 4, 2, 8, torch.float32)
    seed = torch.tensor([SEED])
    for options in (
        (None, *TileMaps(), 0.3, -1, -1, 0.0, 0.0, "torch"),
        (seed, *TileMaps(), 0.3, 2, -1, 1.0, 0.2, "torch"),
    ):
        torch.library.opcheck(_flash_attn_varlen, (q, k, v, cu_q, cu_k, *options))
        out, lse = _flash_attn_varlen(q, k, v, cu_q, cu_k, *options)
        saved = [x.detach() for x in (out, q, k, v, out, lse)]
        torch.library.opcheck(_flash_attn_varlen_backward, (saved[0], None, *saved[1:], cu_q, cu_k, *options))


def test_compiles_without_graph_breaks():
    q, k, v, cu, _ = make(([12, 5], [12, 5]), 4, 2, 8, torch.float32)

    def loss(q, k, v, cu):
        out, lse, _ = flash_attn_varlen_func(q, k, v, cu, cu, window_size=(3, 3), return_attn_probs=True)
        return out.square().sum() + lse.sum()

    expected = torch.autograd.grad(loss(q, k, v, cu), (q, k, v))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(expected, torch.autograd.grad(compiled(q, k, v, cu), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


# --- the kernels, without a GPU ---


@pytest.mark.interpret
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("mode", ["plain", "causal", "all"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_kernels_interpreted(lengths, mode, dtype):
    heads = (4, 2) if dtype == torch.float16 else (2, 1)
    check(make(LENGTHS[lengths], *heads, 16, dtype), MODES[mode], backend="triton")


@pytest.mark.interpret
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dim", [80, 192])
def test_kernels_interpreted_padded_heads(dim):
    dtype = torch.float16 if dim > 128 else torch.float32
    check(make(([3, 70], [40, 33]), 2, 1, dim, dtype), MODES["dropout"], backend="triton")


@pytest.mark.interpret
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", ["plain", "dropout"])
def test_kernels_interpreted_with_tensor_descriptors(mode, monkeypatch):
    monkeypatch.setattr(attention_triton, "architecture", lambda device: "sm90")
    check(
        make(([5, 1, 0, 17, 131, 3], [7, 1, 4, 11, 297, 0]), 2, 1, 32, torch.float16),
        MODES[mode],
        backend="triton",
    )


# long sequences have tiles of their own, short ones before, between and behind them share tiles
MIXED = [7, OWN_TILE_TOKENS + 20, 0, 40, 1, 90, OWN_TILE_TOKENS, 12]


@pytest.mark.interpret
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", ["plain", "all"])
@pytest.mark.parametrize("known", [False, True], ids=["offsets", "lengths"])
def test_kernels_interpreted_with_two_launches(known, mode):
    """Regression: one short sequence gave every long one the small tiles, and so did unknown lengths."""
    tensors = make((MIXED, MIXED), 2, 1, 16, torch.float16)
    layout = PackedLayout.from_lengths(MIXED) if known else None
    check(tensors, MODES[mode], backend="triton", layout=layout)


@pytest.mark.interpret
@pytest.mark.usefixtures("poison")
def test_a_layout_serves_calls_of_other_kinds():
    """Maps of forward alone, of backward, and of dropout, whose draws align tiles, are others."""
    lengths = [5, 20, 90, 3]
    tensors, layout = make((lengths, lengths), 2, 1, 16, torch.float16), PackedLayout.from_lengths(lengths)
    with torch.no_grad():
        flash_attn_varlen_func(*tensors, layout=layout, backend="triton")
    for mode in ("plain", "dropout", "plain"):
        check(tensors, MODES[mode], backend="triton", layout=layout)


@pytest.mark.interpret
@pytest.mark.usefixtures("poison")
def test_kernels_interpreted_with_a_maximal_length_that_is_too_small():
    """It chooses tiles alone: no token may be left out for it."""
    lengths = [5, OWN_TILE_TOKENS + 3, 20]
    tensors = make((lengths, lengths), 2, 1, 16, torch.float16)
    check(tensors, {}, backend="triton", max_seqlen_q=20, max_seqlen_k=20)


@pytest.mark.interpret
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("dim", "arch", "mode"),
    [
        (64, "sm80", "plain"),
        (64, "sm90", "plain"),
        (128, "sm90", "plain"),
        (256, "sm80", "plain"),
        (64, "sm90", "window"),
        (32, "sm80", "softcap"),
    ],
)
def test_kernels_interpreted_with_large_tiles(dim, arch, mode, monkeypatch):
    """A layout whose sequences are all long: tiles of their own, by pointers and by descriptors."""
    monkeypatch.setattr(attention_triton, "architecture", lambda device: arch)
    lengths = [OWN_TILE_TOKENS + 1, OWN_TILE_TOKENS + 20]
    tensors = make((lengths, lengths), 2, 1, dim, torch.float16)
    check(tensors, MODES[mode], backend="triton", layout=PackedLayout.from_lengths(lengths))


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("form", "mode", "arch", "value"),
    [
        ("shared", "plain", "sm80", float("nan")),  # keys come by pointers
        ("shared", "dropout", "sm90", float("inf")),  # or by descriptors
        ("alone", "plain", "sm90", float("nan")),
        ("alone", "window", "sm90", float("inf")),
        ("alone", "dropout", "sm80", float("nan")),
    ],
)
def test_kernels_keep_a_bad_sequence_to_itself(form, mode, arch, value, monkeypatch):
    """A tile multiplied its neighbours' NaN by a probability of zero, and NaN reached sequences beside it."""
    lengths, bad = ([129, 131], int(mode != "dropout")) if form == "alone" else ([30, 7, 64, 5, 6], 3)
    monkeypatch.setattr(attention_triton, "architecture", lambda device: arch)
    layout = PackedLayout.from_lengths(lengths)
    call = dict(return_attn_probs=True, backend="triton", layout=layout, **MODES[mode])
    q, k, v, cu, _ = make((lengths, lengths), 1, 1, 16, torch.float16)
    good = gradients(flash_attn_varlen_func, q, k, v, cu, cu, **call)
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[cu[bad] : cu[bad + 1]] = False
    for i in range(3):
        inputs = [x.detach().clone() for x in (q, k, v)]
        inputs[i][~others] = value
        got = gradients(flash_attn_varlen_func, *(x.requires_grad_() for x in inputs), cu, cu, **call)
        for a, b in zip(good, got, strict=True):
            a, b = (x.t() if x.dim() == 2 else x for x in (a, b))
            assert torch.equal(a[others], b[others])
        own = got[0][~others].isfinite()
        assert not (own.all() if mode == "dropout" else own.any())  # dropout may drop all of a row's keys


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["plain", "all"])
def test_kernels_do_not_depend_on_the_order_of_programs(mode, monkeypatch):
    call = dict(return_attn_probs=True, backend="triton", **MODES[mode])
    tensors = make(LENGTHS["cross"], 3, 1, 16, torch.float16)
    first = gradients(flash_attn_varlen_func, *tensors, **call)
    monkeypatch.setattr(packing, "_recent", {})  # or the second run would find the maps of the first
    tiles, turned = PackedLayout._tiles, []

    def other_way_round(self, *args, **kwargs):
        turned.append(tiles(self, *args, **kwargs))
        return turned[-1].flip(0)

    monkeypatch.setattr(PackedLayout, "_tiles", other_way_round)
    second = gradients(flash_attn_varlen_func, *tensors, **call)
    assert any(len(one) > 1 for one in turned)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.interpret
def test_kernels_reach_beyond_32_bit_offsets():
    """The last sequence of a batch of 2**31 elements; the memory before it is never touched."""
    heads, dim, tail = 16, 64, 40
    total = 2**31 // (heads * dim) + tail
    q, k, v = (torch.empty(total, heads, dim, dtype=torch.float16) for _ in range(3))
    ends = torch.randn(3, tail, heads, dim, generator=torch.Generator().manual_seed(0)).half()
    for x, end in zip((q, k, v), ends, strict=True):
        x[-tail:] = end
    cu = torch.tensor([total - tail, total], dtype=torch.int32)
    layout = PackedLayout(cu, total, lengths=(tail,))
    out = flash_attn_varlen_func(q, k, v, cu, cu, layout=layout, backend="triton")[-tail:]
    expected, _ = flash_attn_varlen_ref(*ends.double(), cu - cu[0], cu - cu[0])
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "strides", [(2**22 + 8, 16, 1), (16, 2**30 + 8, 1), (2**26 + 8, 16, 1)], ids=["token", "head", "copied"]
)
def test_kernels_reach_beyond_32_bit_offsets_with_strides(strides):
    """Offsets pass 2**31 between tokens, or between heads, forward and backward."""
    lengths, heads = ([500, 37], 1) if strides[0] == 2**22 + 8 else ([20, 17], 3)
    tensors = make((lengths, lengths), heads, heads, 16, torch.float16)
    cu, shape = tensors[3], tensors[0].shape
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert extent > 2**31
    far = []  # few of their pages are ever touched
    for x in (*tensors[:3], dout):
        far.append(torch.empty(extent, dtype=x.dtype).as_strided(shape, strides).copy_(x.detach()))
    results = []
    for q, k, v, dout in (far, [x.contiguous() for x in far]):
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = flash_attn_varlen_func(q, k, v, cu, cu, backend="triton")
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("part", ["random_lengths", "not random_lengths"])
def test_interpreted(part):
    ladder.interpret(__file__, select=part)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("lengths", "heads", "dim", "mode", "dtype"),
    [
        pytest.param("short", (6, 2), 32, "plain", torch.bfloat16, id="small-T91-H6-HK2-D32-bf16"),
        pytest.param("long", (2, 1), 64, "dropout", torch.float16, id="T300-H2-HK1-D64-dropout-fp16"),
        pytest.param("short", (2, 2), 80, "all", torch.bfloat16, id="T91-H2-HK2-D80-all-bf16"),
        pytest.param("short", (4, 2), 128, "dropout", torch.float16, id="T91-H4-HK2-D128-dropout-fp16"),
        pytest.param("long", (2, 2), 64, "window", torch.bfloat16, id="T300-H2-HK2-D64-window-bf16"),
    ],
)
def test_kernels_sanitised(lengths, heads, dim, mode, dtype):
    lengths = {"short": [5, 1, 0, 17, 40, 3, 25], "long": [213, 87]}[lengths]
    tensors = make((lengths, lengths), *heads, dim, dtype, device="cuda")
    check(tensors, MODES[mode], backend="triton")


def test_sanitised():
    ladder.sanitize(__file__, select="small")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["plain", "dropout", "window"])
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (64, torch.bfloat16),
        (128, torch.bfloat16),
        (256, torch.float16),
        (64, torch.float32),
        (128, torch.float32),
    ],
)
def test_large_tiles_on_a_gpu(dim, dtype, mode):
    """Many blocks of keys a tile: the loops' steady state, which batches for an interpreter never reach."""
    lengths = [700, 130, 5, 513]
    check(make((lengths, lengths), 4, 2, dim, dtype, device="cuda"), MODES[mode], backend="triton")


def test_a_layout_of_another_batch_is_refused():
    """Regression: its tiles were read and written behind the tensors' end."""
    q, k, v, cu, _ = make(([3, 5], [3, 5]), 2, 2, 16, torch.float32)
    for lengths in ([3, 6], [3, 2, 3]):
        with pytest.raises(ValueError, match="the layout of queries is of"):
            flash_attn_varlen_func(q, k, v, cu, cu, layout=PackedLayout.from_lengths(lengths))
    right = PackedLayout.from_lengths([3, 5])
    with pytest.raises(
        ValueError, match="the layout of keys is of 9 tokens in 2 sequences on cpu, they are 8"
    ):
        flash_attn_varlen_func(q, k, v, cu, cu, layout=(right, PackedLayout.from_lengths([3, 6])))
    with pytest.raises(ValueError, match=r"the layout of queries has offsets \[0, 4, 8\], not \[0, 3, 8\]"):
        flash_attn_varlen_func(q, k, v, cu, cu, layout=PackedLayout.from_lengths([4, 4]))
    flash_attn_varlen_func(q, k, v, cu, cu, layout=right)


@pytest.mark.parametrize("arch", ARCHS)
def test_configurations_cover_every_head_dimension(arch):
    for kernel, plain in itertools.product(("fwd", "dq", "dkv"), (False, True)):
        for dim, itemsize in itertools.product((16, 32, 64, 80, 96, 128, 160, 192, 256), (2, 4)):
            if dim * itemsize > 512:
                with pytest.raises(ValueError, match=f"{dim} with 4 bytes"):
                    attention_config(kernel, dim, itemsize, arch, plain)
                continue
            config = attention_config(kernel, dim, itemsize, arch, plain)
            assert config["BLOCK_N"] % 32 == 0  # dropout draws for 32 keys at a time
            assert OWN_TILE_TOKENS >= config["BLOCK_N" if kernel == "dkv" else "BLOCK_M"]
