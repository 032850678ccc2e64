"""The latent attention layer against its equations in float64: every form, folded or not, on both
backends."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from uncausal.bench import ladder
from uncausal.bench.bench_latent_pooling import flops
from uncausal.bench.launches.host import operations
from uncausal.bench.launches.recorded import replaced_launches
from uncausal.kernels import latent_pooling_ops
from uncausal.kernels.cpu import latent_pooling_torch
from uncausal.kernels.cpu.latent_pooling_torch import latent_attention_pool_ref
from uncausal.kernels.latent_pooling import LatentAttentionPooling, kept_folds, latent_attention_pool
from uncausal.kernels.launch import Tile

RELEASED = {}
PLAIN = {"activation": "gelu", "pre_norm": False, "residual": False}
ARTICLE = {**PLAIN, "project": False, "softmax_scale": 1.0, "num_heads": 1}
FORMS = {
    "released": RELEASED,
    "plain": PLAIN,
    "article": ARTICLE,
    "final-gelu": {"final_activation": True},
    "plain-geglu": {**PLAIN, "activation": "geglu"},
    "no-residual": {"residual": False},
    "no-norm": {"pre_norm": False, "activation": "gelu"},
}
LENGTHS = [1, 31, 300, 2, 67]  # longer than a slab, and of length one


def make_layer(d=64, latents=16, heads=4, dtype=torch.float64, seed=0, **options):
    """A layer whose gains and shifts are away from one and zero, so that none can be left out unseen."""
    torch.manual_seed(seed)
    options = {"num_latents": latents, "num_heads": heads, "head_dim": None, "mlp_ratio": 2, **options}
    layer = LatentAttentionPooling(d, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return layer.to(dtype)


def make_tokens(lengths, d, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(sum(lengths) + d)
    hidden = torch.randn(sum(lengths), d, generator=generator, dtype=torch.float64).to(device, dtype)
    weights = torch.rand(sum(lengths), generator=generator).to(device) + 0.1
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return hidden, cu_seqlens, weights


def reference(layer, hidden, cu_seqlens, weights=None, dtype=torch.float64, upstream=None):
    """Output and gradients (hidden states first) of the equations in some dtype."""
    state = {n: p.detach().to(dtype).requires_grad_() for n, p in layer.named_parameters()}
    x = hidden.detach().to(dtype).requires_grad_()
    out = latent_attention_pool_ref(
        state,
        x,
        cu_seqlens,
        weights,
        num_heads=layer.num_heads,
        activation="geglu" if layer.gated else "gelu",
        pre_norm=layer.pre_norm,
        residual=layer.residual,
        final_activation=layer.final_activation,
        softmax_scale=layer.softmax_scale,
    )
    upstream = make_upstream(out) if upstream is None else upstream
    return out.detach(), torch.autograd.grad(out, [x, *state.values()], upstream.to(out))


def make_upstream(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def evaluate(layer, hidden, cu_seqlens, weights=None):
    """Output and gradients (hidden states first) of the layer."""
    x = hidden.detach().requires_grad_()
    out = layer(x, cu_seqlens, token_weights=weights)
    return out.detach(), torch.autograd.grad(out, [x, *layer.parameters()], make_upstream(out).to(out))


def check_ladder(layer, lengths, dtype, device="cpu", weights=True):
    hidden, cu_seqlens, token_weights = make_tokens(lengths, layer.hidden_size, dtype, device)
    token_weights = token_weights if weights else None
    want, want_grads = reference(layer, hidden, cu_seqlens, token_weights)
    eager, eager_grads = reference(layer, hidden, cu_seqlens, token_weights, dtype)
    out, grads = evaluate(layer, hidden, cu_seqlens, token_weights)
    ladder.assert_close_to_float64(out, want, eager)
    names = ["hidden_states", *dict(layer.named_parameters())]
    for name, got, expected, plain in zip(names, grads, want_grads, eager_grads, strict=True):
        bound = 1e-5 * max(1.0, float(expected.abs().max()))
        ladder.assert_close_to_float64(
            got, expected, plain, atol=bound, factor=ladder.GRADIENT_FACTOR, name=name
        )


@pytest.mark.parametrize("form", FORMS)
def test_forms_in_float64(form):
    layer = make_layer(**FORMS[form])
    plans = ["attention", "none"] if layer.project else ["attention"]
    plans += ["mlp"] if form in ("plain", "article", "plain-geglu") else []
    hidden, cu_seqlens, weights = make_tokens(LENGTHS, 64)
    want, want_grads = reference(layer, hidden, cu_seqlens, weights)
    for plan in plans:
        layer.cheapest_fold = lambda tokens=None, plan=plan: plan
        out, grads = evaluate(layer, hidden, cu_seqlens, weights)
        torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grads, want_grads, rtol=1e-10, atol=1e-11)


def rounded_layer(dtype, *args, **options):
    """A layer of fp32 parameters that a lower precision represents: eager runs on those."""
    layer = make_layer(*args, dtype=torch.float32, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(dtype))
    return layer


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "d, heads, latents, head_dim",
    [(64, 1, 16, 64), (64, 8, 64, 16), (576, 8, 64, 64), (1024, 1, 512, 64), (1024, 8, 16, 128)],
    ids=lambda n: str(n),
)
def test_layer_released(d, heads, latents, head_dim, dtype):
    check_ladder(rounded_layer(dtype, d, latents, heads, head_dim=head_dim), [1, 40, 130, 1, 61], dtype)


def test_layer_wide_forward():
    layer = make_layer(4096, 512, 8, torch.float32, head_dim=64, mlp_ratio=1).eval()
    hidden, cu_seqlens, weights = make_tokens([1, 37], 4096, torch.float32)
    with torch.no_grad():
        out = layer(hidden, cu_seqlens, token_weights=weights)
        state = {n: p.double() for n, p in layer.named_parameters()}
        want = latent_attention_pool_ref(state, hidden.double(), cu_seqlens, weights, num_heads=8)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_released_state_dict():
    """The released layer's names, shapes and number of parameters, and its outputs from such a dictionary."""
    with torch.device("meta"):
        released = LatentAttentionPooling(4096)
    assert sum(p.numel() for p in released.parameters()) == 740_356_096
    d, inner = 4096, 8 * 4096
    assert {name: tuple(p.shape) for name, p in released.state_dict().items()} == {
        "latents": (512, d),
        "cross_attend_blocks.0.norm.weight": (d,),
        "cross_attend_blocks.0.norm.bias": (d,),
        "cross_attend_blocks.0.norm_context.weight": (d,),
        "cross_attend_blocks.0.norm_context.bias": (d,),
        "cross_attend_blocks.0.fn.to_q.weight": (inner, d),
        "cross_attend_blocks.0.fn.to_kv.weight": (2 * inner, d),
        "cross_attend_blocks.0.fn.to_out.weight": (d, inner),
        "cross_attend_blocks.1.norm.weight": (d,),
        "cross_attend_blocks.1.norm.bias": (d,),
        "cross_attend_blocks.1.fn.net.0.weight": (8 * d, d),
        "cross_attend_blocks.1.fn.net.0.bias": (8 * d,),
        "cross_attend_blocks.1.fn.net.2.weight": (d, 4 * d),
        "cross_attend_blocks.1.fn.net.2.bias": (d,),
    }
    state = {n: p.float() for n, p in make_layer(64, 32, 8, seed=3).state_dict().items()}
    layer = LatentAttentionPooling(64, 32, 8, mlp_ratio=2).eval()
    layer.load_state_dict(state)
    hidden, cu_seqlens, _ = make_tokens(LENGTHS, 64, torch.float32)
    with torch.no_grad():
        out = layer(hidden, cu_seqlens)
        want = latent_attention_pool_ref(state, hidden, cu_seqlens)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


def test_folded_and_unfolded_agree():
    layer = make_layer(128, 64, 4, torch.float32)
    hidden, cu_seqlens, _ = make_tokens(LENGTHS, 128, torch.float32)
    results = {}
    for plan in ("none", "attention"):
        layer.cheapest_fold = lambda tokens=None, plan=plan: plan
        results[plan] = evaluate(layer, hidden, cu_seqlens)
    torch.testing.assert_close(results["none"][0], results["attention"][0], rtol=1e-5, atol=3e-6)
    for folded, unfolded in zip(results["attention"][1], results["none"][1], strict=True):
        scale = float(unfolded.abs().max())
        torch.testing.assert_close(folded, unfolded, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "change", ["sgd", "adam-fused", "load_state_dict", "assign", "half-and-back", "data-then-train"]
)
def test_fold_is_invalidated(change):
    layer, other = make_layer(dtype=torch.float32).eval(), make_layer(dtype=torch.float32, seed=1)
    hidden, cu_seqlens, _ = make_tokens(LENGTHS, 64, torch.float32)
    with torch.no_grad():
        before = layer(hidden, cu_seqlens)
    if change in ("sgd", "adam-fused"):
        sgd = change == "sgd"
        parameters = layer.parameters()
        optimizer = (
            torch.optim.SGD(parameters, 0.05) if sgd else torch.optim.Adam(parameters, 0.05, fused=True)
        )
        layer(hidden, cu_seqlens).square().sum().backward()
        optimizer.step()
    elif change in ("load_state_dict", "assign"):
        layer.load_state_dict(other.state_dict(), assign=change == "assign")
    elif change == "half-and-back":
        layer.to(torch.bfloat16).to(torch.float32)
    else:
        layer.cross_attend_blocks[0]["fn"]["to_out"].weight.data.mul_(2)
        layer.train().eval()
    with torch.no_grad():
        after = layer(hidden, cu_seqlens)
        want = latent_attention_pool_ref(layer.state_dict(), hidden, cu_seqlens, num_heads=4)
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3


def test_a_frozen_layer_folds_once(monkeypatch):
    """A fold made in inference mode serves a layer whose input wants a gradient, too."""
    layer, folds = make_layer().eval(), []
    fold = LatentAttentionPooling.fold
    monkeypatch.setattr(LatentAttentionPooling, "fold", lambda *args: (folds.append(0), fold(*args))[1])
    hidden, cu_seqlens, _ = make_tokens([5, 3], 64)
    with torch.inference_mode():
        layer(hidden, cu_seqlens)
        layer(hidden, cu_seqlens)
    layer.requires_grad_(False)
    hidden.requires_grad_()
    layer(hidden, cu_seqlens).sum().backward()
    assert len(folds) == 1
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("fused", [False, True])
def test_folds_are_kept_in_a_block_alone(monkeypatch, fused):
    """Regression: GradCache's first pass folded for every mini-batch. Fused optimisers write unnoticed."""
    layer, folds = make_layer(latents=4), []
    fold = LatentAttentionPooling.fold
    monkeypatch.setattr(LatentAttentionPooling, "fold", lambda *args: (folds.append(0), fold(*args))[1])
    batches = [make_tokens(lengths, 64) for lengths in ([40, 20], [9, 30], [2])]
    optimizer = torch.optim.AdamW(layer.parameters(), 0.05, fused=fused)
    for _ in range(2):
        folds.clear()
        with torch.no_grad(), kept_folds(torch.nn.Sequential(layer)):
            first = [layer(hidden, cu_seqlens) for hidden, cu_seqlens, _ in batches]
        assert len(folds) == 1 and not layer._frozen
        second = [layer(hidden, cu_seqlens) for hidden, cu_seqlens, _ in batches]
        torch.testing.assert_close(first, [x.detach() for x in second])
        assert len(folds) == 4  # each of these needs a graph of its own
        sum(x.square().sum() for x in second).backward()
        with torch.no_grad():  # nothing of it may last
            layer(*batches[0][:2])
        optimizer.step()
    layer.eval()
    with kept_folds(layer):
        pass
    assert layer._frozen  # as it was


def test_what_thaws_a_layer():
    """Regression: a hook on every optimizer of the process had to tell when a fold was old."""
    layer = make_layer()
    hidden, cu_seqlens, _ = make_tokens([5, 3], 64)

    def notices_a_write():
        """Whether a call follows a parameter that was written behind torch's back."""
        with torch.no_grad():
            before = layer(hidden, cu_seqlens)
            layer.cross_attend_blocks[0]["fn"]["to_out"].weight.data.mul_(2)
            return not torch.equal(before, layer(hidden, cu_seqlens))

    assert notices_a_write()  # not frozen: folds each time
    layer.freeze()
    assert not notices_a_write()
    layer(hidden, cu_seqlens)  # records gradients: an optimizer may follow
    assert notices_a_write()
    layer.eval()
    assert not notices_a_write()
    layer.train()
    assert notices_a_write()


def test_fold_follows_the_arithmetic():
    layer = LatentAttentionPooling(64, num_latents=32, num_heads=2)
    assert [layer.cheapest_fold(n) for n in (1, 31, 33, None)] == ["none", "none", "attention", "attention"]
    layer = LatentAttentionPooling(64, num_latents=32, num_heads=1, **PLAIN)
    assert layer.cheapest_fold(1) == "none" and layer.cheapest_fold(None) == "mlp"
    with_many = LatentAttentionPooling(64, num_latents=512, num_heads=8, **PLAIN)
    assert with_many.cheapest_fold(None) == "attention"  # P (V W1) would cost more than (P V) W1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_packed(side):
    layer = make_layer()
    hidden, cu_seqlens, weights = make_tokens([3, 9, 1], 64)
    padded, mask = torch.full((3, 9, 64), torch.nan, dtype=torch.float64), torch.zeros(3, 9)
    padded_weights = torch.ones(3, 9)
    for row, (i, j) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        span = slice(0, j - i) if side == "right" else slice(9 - (j - i), 9)
        padded[row, span], mask[row, span], padded_weights[row, span] = hidden[i:j], 1, weights[i:j]
    packed = layer(hidden, cu_seqlens, token_weights=weights)
    torch.testing.assert_close(layer(padded, attention_mask=mask, token_weights=padded_weights), packed)


def test_masked_tokens_do_not_matter():
    layer = make_layer()
    hidden, cu_seqlens, weights = make_tokens([8, 5], 64)
    weights[:3] = 0
    out = layer(hidden, cu_seqlens, token_weights=weights)
    hidden[:3] = torch.randn(3, 64)
    torch.testing.assert_close(layer(hidden, cu_seqlens, token_weights=weights), out)


def test_errors():
    layer = make_layer()
    hidden, cu_seqlens, weights = make_tokens([8, 5], 64)
    weights[8:] = 0
    with pytest.raises(ValueError, match="sequence 1 has no token"):
        layer(hidden, cu_seqlens, token_weights=weights)
    with pytest.raises(ValueError, match="sequence 1 has no token"):
        layer(hidden, torch.tensor([0, 8, 8, 13]))
    with pytest.raises(ValueError, match="sequence 0 has no token"):
        layer(hidden[None], attention_mask=torch.zeros(1, 13))
    with pytest.raises(ValueError, match="rise from 0 to 13"):
        layer(hidden, torch.tensor([0, 8, 12]))
    with pytest.raises(ValueError, match="negative"):
        layer(hidden, cu_seqlens, token_weights=-weights)
    with pytest.raises(ValueError, match="token_weights must be"):
        layer(hidden, cu_seqlens, token_weights=weights[1:])
    with pytest.raises(ValueError, match="need cu_seqlens"):
        layer(hidden)
    with pytest.raises(ValueError, match="activation"):
        LatentAttentionPooling(64, activation="relu")
    with pytest.raises(ValueError, match="no float64"):
        LatentAttentionPooling(64, 16, 1, backend="triton").double()(hidden, cu_seqlens)
    with pytest.raises(ValueError, match="not folded"):
        latent_attention_pool(hidden, cu_seqlens, layer.fold(tokens=1))
    with pytest.raises(ValueError, match="one head"):
        LatentAttentionPooling(64, project=False)


def test_validation_can_be_asked_for_and_left_out():
    layer = make_layer()
    hidden, cu_seqlens, _ = make_tokens([8, 5], 64)
    folded, empty = layer.fold(), torch.tensor([0, 8, 8, 13])
    for validate in (None, True):  # on a CPU it costs nothing
        with pytest.raises(ValueError, match="sequence 1 has no token"):
            latent_attention_pool(hidden, empty, folded, validate=validate)
    out = latent_attention_pool(hidden, empty, folded, validate=False)
    torch.testing.assert_close(out[[0, 2]], layer(hidden, cu_seqlens))
    assert out[1].isnan().all()  # regression: it was a bias, the same for every empty text


def test_the_layer_does_not_wait_for_a_device(monkeypatch):
    """Regression: it checked every batch's lengths on the device. The meta device has no values to read."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    layer = LatentAttentionPooling(64, 16, 2, head_dim=32, backend="triton").to("meta")
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")

    def step() -> None:
        hidden = torch.empty(90, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        layer(hidden, cu_seqlens, token_weights=torch.empty(90, device="meta")).sum().backward()

    with replaced_launches("sm90", lambda *args, **kwargs: None):
        assert operations(step).total() > 0


def test_mixed_precision():
    """Half precision states on fp32 parameters, and autocast: the fold stays fp32, the gradients too."""
    layer = make_layer(dtype=torch.float32)
    hidden, cu_seqlens, _ = make_tokens(LENGTHS, 64, torch.float32)
    want = layer(hidden, cu_seqlens)
    out = layer(hidden.bfloat16(), cu_seqlens)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(hidden, cu_seqlens), out)
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def op_arguments(gated=True, heads=2):
    hidden, cu_seqlens, weights = make_tokens([1, 9, 30], 32, torch.float32)
    leaf = lambda *shape: torch.randn(*shape, requires_grad=True)  # noqa: E731
    hidden.requires_grad_()
    yield (
        latent_pooling_ops.latent_softmax,
        (hidden, leaf(32), leaf(32), leaf(heads * 16, 32), heads, "torch"),
    )
    yield latent_pooling_ops.latent_softmax, (hidden, None, None, leaf(heads * 16, 32), heads, "torch")
    mlp = (leaf(64, 32), leaf(64), weights, cu_seqlens)
    yield latent_pooling_ops.latent_mlp_pool, (hidden, leaf(32), leaf(32), *mlp, gated, True, "torch")
    yield latent_pooling_ops.latent_mlp_pool, (hidden, None, None, *mlp, not gated, False, "torch")
    plain = (leaf(heads * 16, 32), leaf(64, heads * 16), leaf(64), weights, cu_seqlens)
    yield latent_pooling_ops.latent_plain_pool, (hidden, *plain, heads, gated, "torch")


def test_opcheck():
    for op, arguments in op_arguments():
        torch.library.opcheck(op, arguments)


def test_a_checkpoint_around_the_layer():
    """Regression: what is saved was read twice, which a checkpoint forbids."""
    layer, (hidden, cu_seqlens, weights) = make_layer(), make_tokens([3, 5], 64)
    found = []
    for within in (False, True):
        x = hidden.clone().requires_grad_()
        run = partial(checkpoint, layer, use_reentrant=False) if within else layer
        out = run(x, cu_seqlens, token_weights=weights)
        found.append(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compile():
    layer = make_layer(dtype=torch.float32)
    hidden, cu_seqlens, weights = make_tokens(LENGTHS, 64, torch.float32)
    pool = lambda x: latent_attention_pool(x, cu_seqlens, layer.fold(), token_weights=weights)  # noqa: E731
    compiled = torch.compile(pool, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), pool(hidden))
    parameters = list(layer.parameters())
    want = torch.autograd.grad(pool(hidden).square().sum(), parameters)
    got = torch.autograd.grad(compiled(hidden).square().sum(), parameters)
    torch.testing.assert_close(got, want)


def test_flop_formulas(monkeypatch):
    """What the ops tell FlopCounterMode is what their torch implementation computes."""
    monkeypatch.setattr(latent_pooling_torch, "product", F.linear)  # FlopCounterMode does not know oneDNN's
    inside = {
        "uncausal::latent_softmax": lambda x, gain, shift, score, heads, _: latent_pooling_torch.softmax(
            x, latent_pooling_ops.norm_of(gain, shift), score, heads
        ),
        "uncausal::latent_mlp_pool": lambda x, gain, shift, *rest: latent_pooling_torch.mlp_pool(
            x, latent_pooling_ops.norm_of(gain, shift), *rest[:-1]
        ),
        "uncausal::latent_plain_pool": lambda *args: latent_pooling_torch.plain_pool(*args[:-1]),
    }
    with torch.no_grad():
        for op, arguments in op_arguments():
            with FlopCounterMode(display=False) as told:
                op(*arguments)
            with FlopCounterMode(display=False) as counted:
                inside[op._qualname](*arguments)
            assert told.get_total_flops() == counted.get_total_flops() > 0


def test_flops_of_the_released_layer():
    counts = flops(4096, 512, 8)
    assert counts["eager"] == pytest.approx(1007e6, rel=1e-3)
    assert counts["uncausal"] / counts["eager"] <= 0.36


def test_same_bits_every_time():
    layer = make_layer(dtype=torch.float32)
    hidden, cu_seqlens, _ = make_tokens(LENGTHS, 64, torch.float32)
    first, second = (evaluate(layer, hidden, cu_seqlens) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_gelu_is_exact():
    """The erf GeLU, not its tanh approximation: they differ by 5e-4 near 2."""
    z = torch.linspace(-4, 4, 101, dtype=torch.float64)[:, None].expand(-1, 2).contiguous()
    want = z[:, :1] * 0.5 * z[:, 1:] * (1 + torch.erf(z[:, 1:] / 2**0.5))
    torch.testing.assert_close(latent_pooling_torch.activate(z, True), want)
    torch.testing.assert_close(latent_pooling_torch.activate(z, False), F.gelu(z))


# Triton: the interpreter in fp32 and fp16, the sanitised run in bf16, and machine code for every architecture


SMALL_CASES = [
    (64, heads, latents, form, dtype)
    for heads, latents, dtype in [(1, 16, torch.float32), (8, 64, torch.float16)]
    for form in ["released", "plain", "article", "plain-geglu", "no-norm"]
]
LARGE_CASES = [
    (576, 8, 24, "released", torch.float16),
    (576, 8, 64, "plain", torch.float32),
    (1024, 1, 512, "released", torch.float32),
    (1024, 1, 512, "article", torch.float16),
]


@pytest.mark.interpret
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("d, heads, latents, form, dtype", SMALL_CASES + LARGE_CASES, ids=lambda n: str(n))
def test_triton(d, heads, latents, form, dtype):
    options = {"num_heads": heads, "head_dim": None if form == "article" else 32, **FORMS[form]}
    layer = rounded_layer(dtype, d, latents, mlp_ratio=1, backend="triton", **options)
    plan = "mlp" if not layer.pre_norm and not layer.residual else "attention"
    layer.cheapest_fold = lambda tokens=None: plan
    lengths = [1, 40, 70, 1, 1, 20] if d == 64 else [1, 40, 30]
    check_ladder(layer, lengths, dtype, weights=d != 64)


@pytest.mark.interpret
def test_triton_slabs(monkeypatch):
    """Backward in several slabs, tiles that end within a sequence, and a weight of zero."""
    from uncausal.kernels.gpu import latent_pooling_triton

    monkeypatch.setattr(latent_pooling_triton, "SLAB_ROWS", 48)
    layer = make_layer(64, 16, 4, torch.float32, backend="triton")
    layer.cheapest_fold = lambda tokens=None: "attention"
    check_ladder(layer, [130, 3, 60], torch.float32)


@pytest.mark.sanitize
@pytest.mark.parametrize("form", ["released", "plain"])
@pytest.mark.parametrize("d, latents", [(64, 16), (576, 64)], ids=["small", "large"])
def test_triton_sanitised(form, d, latents):
    """Several row and column tiles, and a tile with the end of one sequence and the start of another."""
    layer = rounded_layer(
        torch.bfloat16, d, latents, 2, backend="triton", mlp_ratio=2, head_dim=32, **FORMS[form]
    )
    plan = "mlp" if form == "plain" else "attention"
    layer.cheapest_fold = lambda tokens=None: plan
    check_ladder(layer.to("cuda"), [1, 100, 49], torch.bfloat16, "cuda")


def test_interpreted():
    ladder.interpret(__file__)


def test_sanitised():
    ladder.sanitize(__file__, select="small")


TYPES = {"T": "i32", "seq_ptr": "*i64", "begin_ptr": "*i64", "end_ptr": "*i64"}
WIDE = ("bias_ptr", "weights_ptr", "partial_ptr", "dinner_ptr", "out_ptr")


def compiled(kernel, arch, tile, **constexprs):
    """Machine code of a kernel at the released sizes: d=4096, 8 heads, 512 latents, bf16."""
    facts = {"D": 4096, "H": 8, "R": 512, "W": 16384, "GATED": True, "GROUP": 8, "BLOCK_R": 512}
    facts |= {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "PRECISION": "tf32",
        **constexprs,
    }
    facts = {name: value for name, value in facts.items() if name in kernel.arg_names}
    types = {
        name: TYPES.get(name, "*fp32" if name in WIDE else "*bf16")
        for name in kernel.arg_names
        if name not in facts
    }
    return ladder.compile_for(
        kernel, types, facts, arch, num_warps=tile.num_warps, num_stages=tile.num_stages
    )


@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm100", "sm120", "gfx942", "gfx950"])
@pytest.mark.parametrize("kernel", ["softmax", "mlp", "mlp-backward", "plain", "plain-gated"])
def test_compiles_without_spills(arch, kernel):
    from uncausal.kernels.gpu import latent_pooling_triton as triton_file

    config = triton_file.CONFIGS[arch]
    if kernel == "softmax":
        built = compiled(triton_file._softmax_kernel, arch, config["softmax"])
    elif kernel == "plain":  # one head: the most scores a token that one kernel takes
        built = compiled(triton_file._plain_pool_kernel, arch, config["plain"], H=1, GATED=False)
    elif kernel == "plain-gated":
        tile = config["plain"]._replace(block_n=max(16, config["plain"].block_n // 2))
        built = compiled(triton_file._plain_pool_kernel, arch, tile, H=8, R=64)
    else:
        function = triton_file._mlp_pool_kernel if kernel == "mlp" else triton_file._mlp_pool_bwd_kernel
        built = compiled(function, arch, config["mlp"])
    assert built.problems() == []


@pytest.mark.parametrize("arch", ["sm80", "gfx942"])
def test_small_kernels_compile_without_spills(arch):
    from uncausal.kernels.gpu import latent_pooling_triton as triton_file

    built = compiled(triton_file._softmax_bwd_kernel, arch, Tile(8, 0, 4, 2))
    assert built.problems(matrix_unit=False) == []
    built = compiled(triton_file._row_sum_kernel, arch, Tile(16, 128, 4, 2), WEIGHTED=True)
    assert built.problems(matrix_unit=False) == []
