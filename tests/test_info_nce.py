"""info_nce against its reference: torch on any machine, Triton through the ladder, ranks through gloo."""

import contextlib
import itertools
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from uncausal.bench import ladder
from uncausal.bench.launches.host import operations
from uncausal.bench.launches.recorded import replaced_launches
from uncausal.kernels import info_nce as module
from uncausal.kernels import info_nce_ranks, launch
from uncausal.kernels.cpu import info_nce_torch
from uncausal.kernels.info_nce import InfoNCE, _info_nce_rows, _info_nce_sum, info_nce, info_nce_ref
from uncausal.kernels.info_nce_prefixes import _info_nce_prefixes, info_nce_prefixes

NAMES = ("query", "key", "hard_negatives", "temperature")


def inputs(b, m, d, k, dtype=torch.float64, temperature=0.05, seed=0, device="cpu"):
    """Queries near their keys and hard negatives near both, so that no term of the loss is negligible."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(m, d, generator=generator, dtype=torch.float64)
    query = key[:b] + 1.5 * torch.randn(b, d, generator=generator, dtype=torch.float64)
    hard = query[:, None] + 1.5 * torch.randn(b, k, d, generator=generator, dtype=torch.float64)
    tensors = [x.to(dtype).to(device) for x in (query, key, hard)]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return [*tensors, torch.tensor(temperature, dtype=acc, device=device)]


def integer_ids(m, seed=0):
    return torch.randint(0, max(m // 2, 1), (m,), generator=torch.Generator().manual_seed(seed))


def run(loss_of, tensors, weights=None, **options):
    """Loss and gradients of (query, key, hard negatives, temperature)."""
    query, key, hard, temperature = (x.detach().clone().requires_grad_() for x in tensors)
    loss = loss_of(query, key, hard, temperature=temperature, **options)
    total = loss * 1.5 if weights is None else (loss * weights).sum()
    leaves = query, key, hard, temperature
    return [loss.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]


def assert_exact(actual, expected, rtol=1e-9, atol=1e-11):
    for name, a, e in zip(("loss", *NAMES), actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def assert_within_eager(tensors, scale=1e-5, weights=None, ref_dtype=None, **options):
    """Bound loss and gradients by the errors of the eager reference in the same dtype against float64."""
    backend = options.pop("backend", "torch")
    wide = [x.double() for x in tensors]
    eager_tensors = [x.to(ref_dtype or x.dtype) for x in tensors]
    actual = run(info_nce, tensors, weights, backend=backend, **options)
    double_weights = None if weights is None else weights.double()
    expected = run(info_nce_ref, wide, double_weights, **options)
    eager = run(info_nce_ref, eager_tensors, weights, **options)
    for name, a, e, p in zip(("loss", *NAMES), actual, expected, eager, strict=True):
        factor = ladder.FORWARD_FACTOR if name == "loss" else ladder.GRADIENT_FACTOR
        atol = scale * max(float(e.abs().max()), 1e-3) if e.numel() else scale
        if e.numel():
            ladder.assert_close_to_float64(a, e, p.to(a.dtype), atol=atol, factor=factor, name=name)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows, blocks of a few: what a batch of 32,768 looks like, in small."""
    monkeypatch.setattr(info_nce_torch, "_CHUNK_ROWS", (4, 16))
    monkeypatch.setattr(info_nce_torch, "_BLOCK_BYTES", 1 << 9)


@pytest.mark.usefixtures("small_chunks", "poison")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("b, m, k", [(1, 1, 0), (1, 4, 2), (7, 7, 0), (20, 20, 3), (20, 33, 1)])
def test_options_equal_the_reference(b, m, k, reduction):
    """Every combination of symmetric, ids, margin and normalize, in float64."""
    tensors = inputs(b, m, 8, k, temperature=0.3)
    weights = torch.linspace(-1, 2, b, dtype=torch.float64) if reduction == "none" else None
    for symmetric, ids, margin, normalize in itertools.product(
        (False, True), (None, integer_ids(m)), (None, 0.05, -0.1), (True, False)
    ):
        options = dict(symmetric=symmetric, ids=ids, margin=margin, normalize=normalize, reduction=reduction)
        assert_exact(
            run(info_nce, tensors, weights, **options), run(info_nce_ref, tensors, weights, **options)
        )


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("b, m, k", [(1, 1, 0), (1, 4, 2), (7, 7, 0), (20, 33, 1)])
def test_dense_form_equals_the_reference(b, m, k, reduction):
    tensors = inputs(b, m, 8, k, temperature=0.3)
    weights = torch.linspace(-1, 2, b, dtype=torch.float64) if reduction == "none" else None
    for symmetric, ids, margin in itertools.product(
        (False, True), (None, integer_ids(m), torch.zeros(m, dtype=torch.long)), (None, 0.05, -0.1)
    ):
        options = dict(symmetric=symmetric, ids=ids, margin=margin, reduction=reduction)
        actual = run(info_nce, tensors, weights, backend="dense", **options)
        assert all(x.isfinite().all() for x in actual)
        assert_exact(actual, run(info_nce, tensors, weights, backend="torch", **options))


def test_dense_form_keeps_its_precision():
    """As the sweeps: where the positive wins, in half precision, and at logits of ten thousand."""
    for dtype in (torch.float32, torch.bfloat16):
        assert_within_eager(inputs(64, 64, 64, 2, dtype), symmetric=True, backend="dense")
    tensors = inputs(40, 40, 64, 2, torch.float32, 1.0)
    tensors[0] *= 1e4 / (tensors[0] @ tensors[1].T).abs().max()
    assert_within_eager(tensors, normalize=False, symmetric=True, backend="dense")
    query = torch.eye(16) + 0.01 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    tensors = [query, torch.eye(16), query.new_empty(16, 0, 16), torch.tensor(0.05)]
    actual, expected = (
        run(info_nce, tensors, backend="dense"),
        run(info_nce_ref, [x.double() for x in tensors]),
    )
    for a, e in zip(actual[:3], expected, strict=False):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))


def test_dense_form_asks_for_fewer_operations():
    """Below 2^25 logits a GPU waits for the host."""
    query, key = (torch.randn(64, 32, requires_grad=True) for _ in range(2))

    def count(loss_of) -> int:
        return operations(lambda: loss_of(query, key).backward()).total()

    def eager(query, key):
        scores = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / 0.05
        return F.cross_entropy(scores, torch.arange(len(query)))

    dense, swept = (count(partial(info_nce, backend=backend)) for backend in ("dense", "torch"))
    assert dense <= 1.4 * count(eager) < 0.7 * swept


@pytest.mark.parametrize("backend", ["triton", "torch", "dense"])
def test_info_nce_does_not_wait(backend, monkeypatch):
    """On tensors of the meta device, which have no values that could be read off it."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    ids = torch.zeros(9, dtype=torch.long, device="meta")

    def step() -> None:
        shapes = (8, 300), (9, 300), (8, 3, 300)
        leaves = [torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in shapes]
        info_nce(*leaves, ids=ids, margin=0.1, symmetric=True, backend=backend).backward()

    with replaced_launches("sm90", lambda *args, **kwargs: None):
        assert operations(step).total() > 0


class OnGPU(torch.Tensor):
    """A CPU's tensor that says it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    "dtype, big, form",
    [
        (torch.bfloat16, False, "dense"),
        (torch.float32, False, "dense"),
        (torch.bfloat16, True, "triton"),
        (torch.float32, True, "torch"),
        (torch.float64, True, "torch"),
    ],
)
def test_form_on_a_gpu(dtype, big, form, monkeypatch):
    """Regression: fp32 went through kernels that multiply it without the matrix unit."""
    monkeypatch.setattr(module, "_DENSE_LOGITS", 16 if big else 1 << 25)
    query = torch.zeros(8, 4, dtype=dtype).as_subclass(OnGPU)
    chosen = module._resolve("auto", query)
    assert chosen.backend == ("triton" if dtype == torch.bfloat16 else "torch")
    assert (64 < chosen.dense_below) == (form == "dense")
    forced = module._resolve("torch", query)
    assert forced.backend == "torch" and not forced.dense_below


@pytest.mark.parametrize("margin", [None, 0.02])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_in_batch_negatives(margin, reduction):
    tensors = inputs(9, 9, 8, 4)
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64) if reduction == "none" else None
    options = dict(in_batch_negatives=False, margin=margin, reduction=reduction)
    assert_exact(run(info_nce, tensors, weights, **options), run(info_nce_ref, tensors, weights, **options))


SHAPES = [
    (1, 8, 0),
    (2, 1024, 7),
    (7, 64, 1),
    (64, 576, 7),
    (64, 256, 0),
    (1000, 8, 7),
    (1000, 256, 1),
    (1000, 576, 0),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.005], ids=lambda t: f"t{t}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-D{}-K{}".format(*s))
def test_float32_within_eager(shape, temperature):
    b, d, k = shape
    tensors = inputs(b, b, d, k, torch.float32, temperature)
    for symmetric in (False, True):
        assert_within_eager(tensors, symmetric=symmetric)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_within_eager(dtype):
    """Computed in float32 on a CPU, so far better than eager; gradients come back in the inputs' dtype."""
    tensors = inputs(64, 64, 64, 2, dtype, 0.05)
    assert_within_eager(tensors, symmetric=True)
    assert [g.dtype for g in run(info_nce, tensors)[1:4]] == [dtype] * 3


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("symmetric", [False, True], ids=["one-way", "symmetric"])
def test_logits_of_ten_thousand(symmetric):
    tensors = inputs(40, 40, 64, 2, torch.float32, 1.0)
    tensors[0] *= 1e4 / (tensors[0] @ tensors[1].T).abs().max()
    assert_within_eager(tensors, normalize=False, symmetric=symmetric)


def test_gradient_keeps_its_precision_when_the_positive_wins():
    """p(positive) - 1 loses all digits near 0; a sigmoid of the logits' difference does not."""
    b, d = 16, 16
    query = torch.eye(b, d) + 0.01 * torch.randn(b, d, generator=torch.Generator().manual_seed(0))
    tensors = [query, torch.eye(b, d), query.new_empty(b, 0, d), torch.tensor(0.05)]
    actual = run(info_nce, tensors)
    expected = run(info_nce_ref, [x.double() for x in tensors])
    assert expected[0] < 1e-6
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            a.double(), e, rtol=1e-4, atol=1e-4 * float(e.abs().max()) if e.numel() else 0
        )


def opposite(b, d, dtype=torch.float32, device="cpu"):
    """All scores close to -1: whatever stands in for a maximum, be it zero or 1 / temperature, is far off."""
    generator = torch.Generator().manual_seed(1)
    key = F.normalize(1 + 0.05 * torch.randn(b, d, generator=generator), dim=-1)
    query = -F.normalize(1 + 0.05 * torch.randn(b, d, generator=generator), dim=-1)
    tensors = (query, key, query.new_empty(b, 0, d))
    return [*(x.to(dtype).to(device) for x in tensors), torch.tensor(0.005, device=device)]


@pytest.mark.usefixtures("small_chunks")
def test_fixed_maximum_would_underflow():
    """Regression: a fixed maximum of 1 / temperature underflows every term below temperature 0.0115."""
    tensors = opposite(37, 32)
    for symmetric in (False, True):
        assert_within_eager(tensors, symmetric=symmetric)
    assert 1 < info_nce(*tensors[:3], temperature=0.005) < 10


def test_temperature_without_gradient_and_as_float():
    query, key, hard, _ = inputs(9, 9, 8, 1)
    expected = info_nce_ref(query, key, hard, temperature=0.07)
    torch.testing.assert_close(info_nce(query, key, hard, temperature=0.07), expected)
    torch.testing.assert_close(info_nce(query, key, hard, temperature=torch.tensor([0.07])), expected)


def test_gradient_of_one_input_alone():
    query, key, hard, temperature = inputs(9, 12, 8, 2)
    for i, symmetric in itertools.product(range(4), (False, True)):
        gradients = []
        for loss_of in (info_nce, info_nce_ref):
            tensors = [query.clone(), key.clone(), hard.clone(), temperature.clone()]
            tensors[i].requires_grad_()
            loss_of(*tensors[:3], temperature=tensors[3], symmetric=symmetric).backward()
            gradients.append(tensors[i].grad)
        torch.testing.assert_close(*gradients)


def test_zero_vector_and_no_negatives():
    tensors = inputs(6, 6, 8, 0)
    tensors[0][2] = 0
    assert_exact(run(info_nce, tensors), run(info_nce_ref, tensors))
    for symmetric in (False, True):
        found = run(info_nce, tensors, ids=torch.zeros(6, dtype=torch.long), symmetric=symmetric)
        assert not any(bool(x.any()) for x in found)


def test_inputs_are_not_written_to():
    tensors = inputs(20, 20, 8, 2)
    before = [x.clone() for x in tensors]
    run(info_nce, tensors, normalize=False, symmetric=True, ids=integer_ids(20))
    run(info_nce, tensors, normalize=False, margin=0.1)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_never_holds_all_logits(monkeypatch):
    """The largest tensor of a sweep is one chunk of rows."""
    monkeypatch.setattr(info_nce_torch, "_CHUNK_BYTES", 1)
    largest = 0

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    query, key, hard, temperature = inputs(3000, 3000, 8, 1, torch.float32)
    negatives = info_nce_torch.Negatives(integer_ids(3000), integer_ids(3000), 0, torch.zeros(3000))
    with Record():
        info_nce_torch.sum_and_gradients(query, key, hard, temperature, None, None, 0, None)
        lse, col_lse = info_nce_torch.sweep_lse(query, key, temperature, negatives, True)
        info_nce_torch.sweep_gradients(query, key, temperature, negatives, lse, lse, col_lse)
    assert largest <= info_nce_torch._CHUNK_ROWS[0] * 3000


def test_opcheck():
    tensors = [x.requires_grad_() for x in inputs(5, 6, 8, 2, torch.float32)]
    ids = integer_ids(6)
    torch.library.opcheck(_info_nce_sum, (*tensors, ids[:5], ids, 0, 0.1))
    torch.library.opcheck(_info_nce_rows, (*tensors, None, None, 1, None, False, "torch"))
    torch.library.opcheck(_info_nce_rows, (*tensors, ids[:5], ids, 0, 0.1, True, "torch"))


def test_compiles_without_graph_break():
    tensors = inputs(6, 6, 8, 1, torch.float32)
    compiled = torch.compile(info_nce, backend="aot_eager", fullgraph=True)
    assert_exact(run(compiled, tensors), run(info_nce, tensors), rtol=1e-5, atol=1e-6)


def test_autocast_does_not_lower_the_precision():
    """Under autocast the products of the sweep would run in bf16, and the logits keep three digits."""
    tensors = inputs(20, 20, 16, 1, torch.float32)
    expected = [run(info_nce, tensors, symmetric=symmetric) for symmetric in (False, True)]
    expected.append(run(info_nce, tensors, backend="dense", symmetric=True))
    expected.append(run(prefixes, tensors, dims=[8, 16], factors=[1.0, 1.0]))
    with torch.autocast("cpu", torch.bfloat16):
        actual = [run(info_nce, tensors, symmetric=symmetric) for symmetric in (False, True)]
        actual.append(run(info_nce, tensors, backend="dense", symmetric=True))
        actual.append(run(prefixes, tensors, dims=[8, 16], factors=[1.0, 1.0]))
    for a, e in zip(actual, expected, strict=True):
        assert_exact(a, e, rtol=0, atol=0)


def test_module_learns_its_temperature():
    query, key, hard, _ = inputs(9, 9, 8, 1, torch.float32)
    module = InfoNCE(0.07, learn_temperature=True, symmetric=True)
    module(query, key, hard).backward()
    temperature = torch.tensor(0.07, requires_grad=True)
    info_nce_ref(query, key, hard, temperature=temperature, symmetric=True).backward()
    assert module.log_temperature.grad is not None and temperature.grad is not None
    torch.testing.assert_close(module.log_temperature.grad, 0.07 * temperature.grad)
    assert not InfoNCE(0.07).log_temperature.requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(key=torch.zeros(2, 4)), ValueError, r"\(3, 4\) and \(2, 4\)"),
        (
            dict(hard_negatives=torch.zeros(2, 1, 4)),
            ValueError,
            r"hard_negatives \(3, K, 4\), got \(2, 1, 4\)",
        ),
        (dict(key=torch.zeros(3, 4).half()), TypeError, "float16"),
        (dict(ids=torch.zeros(2, dtype=torch.long)), ValueError, r"integer ids \(3,\)"),
        (dict(ids=torch.zeros(3)), ValueError, "float32"),
        (dict(temperature=0.0), ValueError, "temperature > 0"),
        (dict(temperature=torch.ones(2)), ValueError, "one temperature"),
        (dict(reduction="max"), ValueError, "'max'"),
        (dict(exchange="star"), ValueError, "'star'"),
        (dict(in_batch_negatives=False), ValueError, "needs hard_negatives"),
        (dict(in_batch_negatives=False, symmetric=True), ValueError, "symmetric"),
        (dict(backend="cuda"), ValueError, "backend"),
    ],
)
def test_rejects(change, error, message):
    arguments = dict(query=torch.zeros(3, 4), key=torch.zeros(3, 4)) | change
    with pytest.raises(error, match=message):
        info_nce(arguments.pop("query"), arguments.pop("key"), **arguments)


LOSSES = pytest.mark.parametrize(
    "loss", [info_nce, partial(info_nce_prefixes, dims=[4, 8])], ids=["whole", "prefixes"]
)


@LOSSES
def test_a_second_derivative_is_refused(loss):
    """Regression: it was that of normalising the inputs alone, without a word."""
    q, k = torch.randn(2, 5, 8).requires_grad_()
    [first] = torch.autograd.grad(loss(q, k), q, create_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss(q, k), q)[0])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.square().sum().backward()


@LOSSES
def test_a_checkpoint_around_the_loss(loss):
    """Regression: what is saved was read twice, which a checkpoint forbids."""
    q, k, _, _ = inputs(6, 9, 8, 1)
    plain, within = ([x.clone().requires_grad_() for x in (q, k)] for _ in range(2))
    loss(*plain).backward()
    checkpoint(loss, *within, use_reentrant=False).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, within, strict=True))


def test_ids_may_lie_apart(monkeypatch):
    """A kernel is given their address and no stride."""
    seen, real = [], module._one_rank

    def watched(q, k, hard, temperature, row_ids, col_ids, *rest):
        seen.append((row_ids.is_contiguous(), col_ids.is_contiguous()))
        return real(q, k, hard, temperature, row_ids, col_ids, *rest)

    monkeypatch.setattr(module, "_one_rank", watched)
    info_nce(torch.randn(3, 4), torch.randn(5, 4), ids=torch.arange(10).view(5, 2)[:, 0])
    assert seen == [(True, True)]


def test_triton_without_keys_or_queries():
    """Regression: a rank of a ring that had none divided by zero. No kernel is launched."""
    from uncausal.kernels.gpu import info_nce_triton

    negatives = info_nce_torch.Negatives(None, None, 0, None)
    for queries, keys in ((4, 0), (0, 4), (0, 0)):
        q, k, one = torch.randn(queries, 8), torch.randn(keys, 8), torch.ones(queries)
        lse, other = info_nce_triton.sweep_lse(q, k, torch.tensor(1.0), negatives, False)
        assert lse.tolist() == [-math.inf] * queries and other is None
        grads = info_nce_triton.sweep_gradients(q, k, torch.tensor(1.0), negatives, one, lse, None)
        assert [g.tolist() for g in grads] == [[[0.0] * 8] * queries, [[0.0] * 8] * keys, [0.0] * queries]


# ---- prefixes


def prefixes_ref(query, key, hard_negatives, *, temperature, dims, factors, ids=None):
    """One reference loss per prefix; info_nce_prefixes takes no hard negatives, so they get no gradient."""
    terms = [
        w * info_nce_ref(query[:, :d], key[:, :d], temperature=temperature, ids=ids)
        for d, w in zip(dims, factors, strict=True)
    ]
    return torch.stack(terms).sum() + 0 * hard_negatives.sum()


def prefixes(query, key, hard_negatives, *, temperature, dims, factors, ids=None):
    loss = info_nce_prefixes(query, key, dims, weights=factors, temperature=temperature, ids=ids)
    return loss + 0 * hard_negatives.sum()


@pytest.mark.usefixtures("small_chunks", "poison")
@pytest.mark.parametrize("dims", [[16], [3, 8, 12], [12, 16, 1]], ids=str)
@pytest.mark.parametrize("b, m", [(1, 1), (1, 4), (20, 20), (20, 33)])
def test_prefixes_equal_the_reference(b, m, dims):
    tensors = inputs(b, m, 16, 1, temperature=0.2)
    factors = [1.0, 0.3, 2.0][: len(dims)]
    for ids in (None, integer_ids(m), torch.zeros(m, dtype=torch.long)):
        options = dict(dims=dims, factors=factors, ids=ids)
        assert_exact(run(prefixes, tensors, **options), run(prefixes_ref, tensors, **options))


def test_prefixes_opcheck_and_reject():
    query, key, _, temperature = (x.requires_grad_() for x in inputs(5, 6, 8, 0, torch.float32))
    ids = integer_ids(6)
    torch.library.opcheck(_info_nce_prefixes, (query, key, temperature, ids[:5], ids, [2, 8], [1.0, 0.5]))
    with pytest.raises(ValueError, match="weight each"):
        info_nce_prefixes(query, key, [2, 4], weights=[1.0])
    with pytest.raises(ValueError, match="from 1 to 8"):
        info_nce_prefixes(query, key, [2, 9])


# ---- ranks


def _rank_cases():
    for exchange, symmetric, reduction in itertools.product(
        ("all_gather", "ring"), (False, True), ("mean", "sum", "none")
    ):
        for with_ids, margin, extra in ((False, None, 0), (True, 0.05, 0), (True, None, 2)):
            yield exchange, symmetric, reduction, with_ids, margin, extra


def _check_rank(rank: int, sizes: list[int]) -> None:
    """Compare this rank's loss and gradients with a single process's on the concatenated batch."""
    total, start = sum(sizes), sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    for exchange, symmetric, reduction, with_ids, margin, extra in _rank_cases():
        world = len(sizes)
        query, key, hard, temperature = inputs(total, total + extra * world, 8, 2, temperature=0.2)
        ids = integer_ids(len(key)) if with_ids else None
        weights = torch.linspace(-1, 2, total, dtype=torch.float64) if reduction == "none" else None
        options = dict(symmetric=symmetric, margin=margin, reduction=reduction)
        expected = run(info_nce_ref, [query, key, hard, temperature], weights, ids=ids, **options)

        # this rank's keys: the positives of its queries, then its share of the extra ones
        extras = slice(total + extra * rank, total + extra * (rank + 1))

        def local(x, mine=mine, extras=extras):
            return torch.cat([x[mine], x[extras]])

        tensors = [query[mine], local(key), hard[mine], temperature]
        local_weights = None if weights is None else weights[mine]
        local_ids = None if ids is None else local(ids)
        options |= dict(group=dist.group.WORLD, exchange=exchange)
        actual = run(info_nce, tensors, local_weights, ids=local_ids, **options)
        dist.all_reduce(actual[4])  # each rank has its share of the temperature's gradient
        loss = expected[0][mine] if reduction == "none" else expected[0]
        wanted = [loss, expected[1][mine], local(expected[2]), expected[3][mine], expected[4]]
        assert_exact(actual, wanted)


@pytest.mark.parametrize("sizes", [(3, 5), (2, 5, 0, 4)], ids=lambda s: f"ranks{len(s)}")
def test_ranks_equal_one_process(sizes, tmp_path):
    """Regression: negatives gathered in the wrong order, gradients scaled by the number of ranks; and a group
    that was held beyond its destruction, whose threads aborted a process at exit now and then."""
    arguments = [sys.executable, __file__, str(tmp_path / "store"), *map(str, sizes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(len(sizes)):
            process = subprocess.Popen(
                [*arguments, str(rank)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)  # of a rank whose peer failed; does nothing to one that has ended
            processes.append(process)
        for process in processes:
            output = process.communicate(timeout=600)[0]  # a machine at full load is no failure
            assert process.returncode == 0, output


def _check_gather(rank: int, sizes: list[int]) -> None:
    """Regression: the ranks' gradients of a key were added up in its own 8 bits."""
    rows = torch.zeros(sizes[rank], 4, dtype=torch.bfloat16, requires_grad=True)
    gathered = info_nce_ranks.gather_rows(rows, sizes, dist.group.WORLD)
    share = torch.full_like(gathered, 256.0 if rank == 0 else 1.0)
    (grad,) = torch.autograd.grad(gathered, rows, share)
    expected = torch.tensor(256.0 + len(sizes) - 1).bfloat16()
    assert grad.dtype == torch.bfloat16 and (grad == expected).all(), (grad, expected)


def _check_exchanges() -> None:
    """Regression: the ranks told each other their numbers of rows twice a loss, symmetric three times."""
    told = []
    gather = dist.all_gather

    def counted(blocks, mine, **options):
        told.append(not mine.is_floating_point())
        return gather(blocks, mine, **options)

    query, key = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    with mock.patch.object(dist, "all_gather", counted):
        info_nce(query, key, symmetric=True, group=dist.group.WORLD).backward()
    assert sum(told) == 1, told


def _check_overlap(world: int) -> None:
    """The ring works on one block while the next is on its way; gradients travel beside the next sweep."""
    events = []
    exchange, sweeps = dist.batch_isend_irecv, module._sweeps("torch")

    def noted(event, function):
        return lambda *arguments: (events.append(event), function(*arguments))[1]

    def on_its_way(operations):
        events.append("send")
        first, *others = exchange(operations)
        return [SimpleNamespace(wait=noted("wait", first.wait)), *others]

    query, key = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    noted_sweeps = tuple(noted("sweep", sweep) for sweep in sweeps)
    with (
        mock.patch.object(dist, "batch_isend_irecv", on_its_way),
        mock.patch.object(module, "_sweeps", lambda backend: noted_sweeps),
    ):
        loss = info_nce(query, key, group=dist.group.WORLD, exchange="ring")
        assert events == ["send", "sweep", "wait"] * (world - 1) + ["sweep"], events
        events.clear()
        loss.backward()
    keys, gradient = ["send", "sweep"], ["send", "wait"]
    later = [*keys, "wait", *gradient] * (world - 2)  # the gradient of the sweep before comes in
    assert events == [*keys, *gradient, *later, "sweep", "wait", "send", "wait"], events


def _check_second_derivatives() -> None:
    """Regression: that of gathering keys, or of the ring, was taken for 0."""
    for options in ({"exchange": "ring"}, {"exchange": "all_gather", "backend": "dense"}):
        query, key = torch.randn(2, 4, 8).requires_grad_()
        loss = info_nce(query, key, group=dist.group.WORLD, **options)
        [first] = torch.autograd.grad(loss, key, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            first.square().sum().backward()


def _check_checkpoint() -> None:
    """Regression: the ring read what is saved twice, which a checkpoint forbids."""
    tensors = [x.requires_grad_() for x in torch.randn(2, 4, 8)]
    loss = partial(info_nce, group=dist.group.WORLD, exchange="ring")
    plain = torch.autograd.grad(loss(*tensors), tensors)
    within = torch.autograd.grad(checkpoint(loss, *tensors, use_reentrant=False), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))


def _main(store: str, *numbers: str) -> None:
    *sizes, rank = map(int, numbers)
    dist.init_process_group("gloo", store=dist.FileStore(store, len(sizes)), rank=rank, world_size=len(sizes))
    try:
        _check_rank(rank, sizes)
        _check_gather(rank, sizes)
        _check_exchanges()
        _check_overlap(len(sizes))
        _check_second_derivatives()
        _check_checkpoint()
        dist.barrier()  # nobody leaves while another still reads
    finally:
        dist.destroy_process_group()
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in names if "gloo" in name], f"threads outlive their group: {names}"


# ---- Triton


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 and two processors, so that small batches have several blocks and splits."""
    from uncausal.kernels.gpu import info_nce_triton

    def config(kernel, d, itemsize, arch):
        block_d = max(16, 1 << (d - 1).bit_length()) if kernel == "grad" else 32
        return dict(BLOCK_D=block_d, BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2)

    monkeypatch.setattr(info_nce_triton, "info_nce_config", config)
    monkeypatch.setattr(info_nce_triton, "processors", lambda device: 2)
    monkeypatch.setattr(info_nce_triton, "_CHUNK_BYTES", 4096)


TRITON_CASES = [
    pytest.param(1, 1, 8, 1, {}, id="B1-D8-K1"),
    pytest.param(7, 9, 24, 0, {"symmetric": True}, id="B7-M9-D24-symmetric"),
    pytest.param(40, 40, 64, 2, {"symmetric": True, "ids": True, "margin": 0.05}, id="B40-D64-K2-all"),
    pytest.param(33, 50, 64, 1, {"ids": True, "margin": 0.05}, id="B33-M50-D64-K1-ids-margin"),
    pytest.param(40, 40, 256, 0, {"reduction": "none"}, id="B40-D256-none"),
    pytest.param(33, 40, 300, 1, {"ids": True, "margin": 0.05, "symmetric": True}, id="B33-M40-D300-K1-all"),
    pytest.param(35, 35, 272, 0, {}, id="B35-D272"),
]


def check_triton(b, m, d, k, options, dtype, temperature=0.05, device="cpu"):
    options = dict(options)
    if options.get("ids"):
        options["ids"] = integer_ids(m).to(device)
    weights = torch.linspace(-1, 2, b, device=device) if options.get("reduction") == "none" else None
    tensors = inputs(b, m, d, k, dtype, temperature, device=device)
    assert_within_eager(tensors, weights=weights, backend="triton", scale=1e-4, **options)


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles", "poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("b, m, d, k, options", TRITON_CASES)
def test_triton_within_eager(b, m, d, k, options, dtype):
    check_triton(b, m, d, k, options, dtype)


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("d", [32, 288], ids=["D32", "D288"])
def test_triton_padding_never_wins_the_maximum(d):
    """Regression: padded columns score 0, far above scores of -200, if the mask comes after the maximum."""
    for symmetric in (False, True):
        assert_within_eager(opposite(37, d), scale=1e-4, backend="triton", symmetric=symmetric)


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("b", [16, 17, 31, 48, 49], ids=lambda b: f"B{b}")
def test_triton_statistics_of_every_tile(b):
    """Regression: a log-sum-exp without its tile's offset is right for the first tile alone."""
    tensors = inputs(b, b, 16, 0, torch.float32)
    actual = run(info_nce, tensors, torch.ones(b), reduction="none", backend="triton")
    expected = run(info_nce, tensors, torch.ones(b), reduction="none", backend="torch")
    assert_exact(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles")
def test_triton_logits_of_ten_thousand():
    """Backward computes the logits again, by other tiles: logits of 1e4 are sure to 1e4 eps, no further."""
    tensors = inputs(40, 40, 64, 2, torch.float32, 1.0)
    tensors[0] *= 1e4 / (tensors[0] @ tensors[1].T).abs().max()
    scale = 1e4 * torch.finfo(torch.float32).eps
    assert_within_eager(tensors, scale, normalize=False, symmetric=True, backend="triton")


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles")
def test_triton_half_precision_weights_do_not_underflow():
    """A mean over a large batch has weights below fp16's smallest number; they are scaled before the cast."""
    tensors = inputs(40, 40, 32, 0, torch.float16, 1.0)
    tiny = torch.full((40,), 1e-6)
    actual = run(info_nce, tensors, tiny, reduction="none", backend="triton")[4]
    expected = run(info_nce_ref, [x.double() for x in tensors], tiny.double(), reduction="none")[4]
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=0)


@pytest.mark.interpret
@pytest.mark.usefixtures("small_tiles")
def test_triton_is_deterministic():
    tensors = inputs(50, 50, 32, 0, torch.float32)
    first, second = (run(info_nce, tensors, backend="triton", symmetric=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_interpreted():
    ladder.interpret(__file__)


SANITIZED = [TRITON_CASES[2], TRITON_CASES[5]]


@pytest.mark.sanitize
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
@pytest.mark.parametrize("b, m, d, k, options", SANITIZED)
def test_triton_on_device(b, m, d, k, options, dtype):
    check_triton(b, m, d, k, options, dtype, device="cuda")


def test_sanitised():
    """bf16, bounds and races, which the interpreter cannot judge; the larger case runs in `make sanitize`."""
    ladder.sanitize(__file__, select="D64")


def build(kernel, dtype, d, arch, precision="ieee"):
    """Compile a kernel with every option on, in the configuration that `launch.py` gives it."""
    from uncausal.kernels.gpu import info_nce_triton

    function = getattr(info_nce_triton, f"_info_nce_{kernel}_kernel")
    config = launch.info_nce_config(kernel, d, 4 if dtype == "fp32" else 2, arch)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    flags = [name for name in function.arg_names if name.startswith("HAS_")]
    constants = dict(D=d, PRECISION=precision, **config, **dict.fromkeys(flags, True))
    in_dtype = ["x_ptr", "y_ptr"] + (["out_ptr"] if kernel == "weight" else [])
    signature = {}
    for name in function.arg_names:
        if name.endswith("_ids_ptr"):
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype if name in in_dtype else 'fp32'}"
        elif name not in constants:
            signature[name] = "i32"
    return ladder.compile_for(function, signature, constants, arch, **options)


KERNELS = [("lse", 1024), ("weight", 1024), ("grad", 64), ("grad", 128), ("grad", 256)]


@pytest.mark.parametrize("arch", launch.ARCHS)
def test_compiles_without_spills(arch):
    for kernel, d in KERNELS:
        assert build(kernel, "bf16", d, arch).problems() == [], f"{kernel} D{d}"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("arch", launch.ARCHS)
def test_compiles_without_spills_in_fp32(arch, precision):
    if precision == "tf32" and arch.startswith("gfx"):
        pytest.skip("no TF32 on AMD")
    for kernel, d in KERNELS:
        problems = build(kernel, "fp32", d, arch, precision).problems(matrix_unit=False)
        assert problems == [], f"{kernel} D{d}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-D{}-K{}".format(*s))
def test_triton_on_gpu(shape, dtype):
    b, d, k = shape
    for temperature, symmetric in itertools.product((1.0, 0.05, 0.005), (False, True)):
        check_triton(b, b, d, k, {"symmetric": symmetric}, dtype, temperature, device="cuda")


if __name__ == "__main__":
    _main(*sys.argv[1:])
