"""What calls ask of the host and launch on a GPU: counted without one."""

import csv
from unittest import mock

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from uncausal.bench import static
from uncausal.bench.launches import host, products, trace
from uncausal.bench.launches.recorded import replaced_launches
from uncausal.kernels import attention
from uncausal.kernels.launch import ARCHS, attention_config, unobserved

# --- the host path


@pytest.fixture
def unlaunched():
    """Launches left out, as on a GPU whose tensors' values the host cannot see."""
    with replaced_launches("sm90", lambda *args, **kwargs: None):
        yield


CALLS = tuple(host.calls(attention, "meta", True))


@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize("name", CALLS)
def test_attention_asks_little_of_the_host(name):
    """Regression: a drop-in call built its maps anew, by 44 operations, 86 with gradients."""
    call = host.calls(attention, "meta", True)[name]
    call()  # the maps of a batch are made once
    assert 0 < host.operations(call).total() <= 10


@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize("name", CALLS)
def test_attention_asks_little_of_python(name):
    """143 functions were 40 microseconds, 212 of two launches 55, where torch's dispatcher took 20 more."""
    call = host.calls(attention, "cpu", True)[name]
    call()
    assert host.functions(call) <= 240


@pytest.mark.usefixtures("unlaunched")
def test_the_first_call_of_a_batch_does_not_wait_either():
    for lengths in host.LENGTHS.values():
        batch = host.Inputs(attention, lengths, "meta", True)
        assert host.operations(lambda batch=batch: batch.varlen(batch.leaves)).total() > 10


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "to": lambda x: x.to("meta"),
    "copy": lambda x: torch.empty(3, device="meta").copy_(x),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_refused(name):
    with pytest.raises(RuntimeError, match="waits for the device"):
        host.operations(lambda: WAITING[name](torch.ones(3)))


def test_values_do_not_pass_unseen():
    """`tolist` and `cpu` ask nothing of a CPU's tensors: they fail on the meta device instead."""
    for read in (lambda x: x.tolist(), lambda x: x.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            host.operations(lambda read=read: read(torch.ones(3, device="meta")))


def test_operations_inside_custom_operators_count():
    q, k, v = (torch.randn(9, 2, 8) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    seen = host.operations(lambda: attention.flash_attn_varlen_func(q, k, v, cu, cu, softcap=1.0))
    assert not any("uncausal" in name for name in seen) and any("aten.new_empty" in name for name in seen)


def test_the_direct_path_is_the_op():
    """Without the dispatcher: the same bits, and an error where backward is differentiated."""
    q, k, v = (torch.randn(9, 2, 8, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    dout, saved = torch.randn(9, 2, 8), []

    def run() -> list[torch.Tensor]:
        out, lse, _ = attention.flash_attn_varlen_func(q, k, v, cu, cu, return_attn_probs=True)
        saved.append(len(out.grad_fn.saved_tensors))
        return [out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, torch.ones_like(lse)))]

    assert unobserved(q, k, v)
    direct = run()
    with mock.patch.object(attention, "unobserved", lambda *tensors: False):
        by_op = run()
    assert all(torch.equal(a, b) for a, b in zip(direct, by_op, strict=True))
    assert saved[0] == saved[1]  # checkpoints may record one and compute the other again
    assert "Direct" in type(direct[0].grad_fn).__name__ and "Direct" not in type(by_op[0].grad_fn).__name__
    out = attention.flash_attn_varlen_func(q, k, v, cu, cu)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula|not have a grad_fn"):
        grad.sum().backward()


def test_what_observes_an_op():
    x = torch.ones(2)
    assert unobserved(x, torch.nn.Parameter(x))
    with host.HostPath():
        assert not unobserved(x)

    class Kind(torch.Tensor):
        pass

    assert not unobserved(x, x.as_subclass(Kind))
    seen = []
    torch.jit.trace(lambda y: (seen.append(unobserved(y)), y + 1)[1], x, check_trace=False)
    make_fx(lambda y: (seen.append(unobserved(y)), y + 1)[1])(x)
    assert seen == [False, False]
    seen.clear()
    torch.func.vmap(lambda y: (seen.append(unobserved(y)), y)[1])(x)
    assert seen == [False]


# --- the launches


@pytest.fixture(scope="module")
def traced():
    return {arch: trace.trace(arch) for arch in ("sm80", "sm90")}


def blocks(row: trace.Traced) -> tuple[int, int]:
    """The large tile of the kernel, dimension and architecture of a launch."""
    kernel = row.kernel.removeprefix("attn_").removeprefix("bwd_")
    config = attention_config(kernel, row.dim, 2, row.arch, True)
    return config["BLOCK_M"], config["BLOCK_N"]


def kinds(name: str) -> set[bool]:
    """Whether sequences share tiles: the short ones do; one launch where a call holds one kind."""
    if "sentences" in name or "last batch" in name:
        return {True}
    return {False, True} if "varlen" in name or "middle" in name or "64 to" in name else {False}


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_long_sequences_have_large_tiles(arch, traced):
    """Regression: one short sequence, or unknown lengths, gave all of a batch the small tiles."""
    for name in trace.CALLS:
        rows = [row for row in traced[arch] if row.call == name]
        assert {row.kernel for row in rows} == {"attn_fwd", "attn_bwd_dq", "attn_bwd_dkv"}
        for kernel in {row.kernel for row in rows}:
            assert {row.shared for row in rows if row.kernel == kernel} == kinds(name), (name, kernel)
        for row in rows:
            if not row.shared and (row.kernel == "attn_fwd" or "dropout" not in name):
                assert (row.block_m, row.block_n) == blocks(row), row


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_most_of_what_launches_compute_is_of_use(arch, traced):
    """From 64 tokens on four fifths of the scores, dropout included; sentences fill their tiles."""
    for row in traced[arch]:
        # lengths just above a multiple of a tile leave a quarter of the last one, as in any such kernel
        assert row.shared or row.scores >= (0.7 if "middle batch" in row.call else 0.8), row
        assert row.rows >= 0.95 or "sentences" not in row.call, row
    for name in trace.CALLS:
        if "64 to" in name:
            for kernel in ("attn_fwd", "attn_bwd_dq", "attn_bwd_dkv"):
                rows = [row for row in traced[arch] if (row.call, row.kernel) == (name, kernel)]
                computed = sum(row.computed for row in rows)
                assert sum(row.scores * row.computed for row in rows) / computed >= 0.8, (name, kernel)


def test_use_of_a_launch_counted_by_hand():
    """Lengths 100, 28 and 300: 128 rows of the third and 64 of what it leaves, and one small tile for two."""
    rows = {
        (row.kernel, row.shared): row
        for row in trace.trace("sm80", {"one": lambda: trace.packed([100, 28, 300], 64)})
    }
    long, short = rows["attn_fwd", False], rows["attn_fwd", True]
    assert (long.block_m, long.block_n, long.tiles, short.block_m, short.tiles) == (128, 128, 2, 64, 4)
    assert long.rows == 1 and long.computed == 2 * 2 * 128 * (2 * 128 + 2 * 32)
    assert long.scores == pytest.approx(256 * 300 / (256 * 320))
    # 64 and 36 rows of 100, 28 of 28, 44 left of 300: keys by blocks of 32
    assert short.computed == 2 * 64 * (128 + 128 + 32 + 320)
    assert short.scores == pytest.approx((100 * 100 + 28 * 28 + 44 * 300) / (64 * (128 + 128 + 32 + 320)))
    assert short.rows == pytest.approx((100 + 28 + 44) / 256)


def test_products_of_a_block():
    """Two more than FlashAttention-2's five, for the reason that the table gives."""
    counts = products.count("sm80", (64,))
    assert counts == {64: {"attn_fwd": [2], "attn_bwd_dq": [3], "attn_bwd_dkv": [4]}}
    assert "| 64 | 2 | 3 | 4 | 7 | 5 |" in products.table(counts)


def test_no_spill_in_the_static_report():
    """bench/static.csv, as the last full run of `python -m uncausal.bench.static` wrote it."""
    with open(static.BENCH / "static.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    ours = [line for line in lines if line["kernel"] in static.KERNELS]
    assert {(line["kernel"], line["arch"]) for line in ours} == {
        (k, a) for k in static.KERNELS for a in ARCHS
    }
    assert [line for line in ours if line["spill_bytes"] != "0"] == []
