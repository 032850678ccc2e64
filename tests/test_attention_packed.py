"""flash-attn's other doors to attention: packed projections, ALiBi slopes, values of another width."""

import pytest
import torch
import torch.nn.functional as F

from uncausal.kernels.attention import flash_attn_func, flash_attn_varlen_func
from uncausal.kernels.attention_packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

OPTIONS = (0.0, 0.3, True, (4, -1), 2.0)  # dropout_p, softmax_scale, causal, window_size, softcap
CU = torch.tensor([0, 5, 6, 19], dtype=torch.int32)


def randn(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def same(one, other, leaf):
    """Outputs, log-sum-exps and the gradient of a leaf agree to the bit."""
    pairs = list(zip(one[:2], other[:2], strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    grads = [torch.autograd.grad(x[0].sin().sum() + x[1].sum(), leaf)[0] for x in (one, other)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("form", ["qkv", "kv"])
def test_dense_packed_forms(form):
    qkv, q = randn(2, 9, 3, 4, 8), randn(2, 7, 4, 8)
    rest = (*OPTIONS, None, False, True)  # no slopes, not deterministic, with probabilities
    if form == "qkv":
        got = flash_attn_qkvpacked_func(qkv, *rest)
        same(got, flash_attn_func(*qkv.unbind(2), *rest), qkv)
    else:
        kv = qkv[:, :, 1:, :2]
        got = flash_attn_kvpacked_func(q, kv, *rest)
        same(got, flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], *rest), qkv)


@pytest.mark.parametrize("form", ["qkv", "kv"])
def test_varlen_packed_forms(form):
    qkv, rest = randn(19, 3, 4, 8), (*OPTIONS, None, False, True)
    if form == "qkv":
        got = flash_attn_varlen_qkvpacked_func(qkv, CU, 13, *rest)
        same(got, flash_attn_varlen_func(*qkv.unbind(1), CU, CU, 13, 13, *rest), qkv)
    else:
        q, kv, cu = randn(7, 4, 8), qkv[:, 1:, :2], torch.tensor([0, 1, 3, 7], dtype=torch.int32)
        got = flash_attn_varlen_kvpacked_func(q, kv, cu, CU, 4, 13, *rest)
        same(got, flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], cu, CU, 4, 13, *rest), qkv)


def test_packed_forms_name_what_they_got():
    with pytest.raises(
        ValueError, match=r"qkv must be \(\.\.\., 3, heads, D\) of 5 axes, got \(2, 9, 2, 4, 8\)"
    ):
        flash_attn_qkvpacked_func(torch.ones(2, 9, 2, 4, 8))
    with pytest.raises(ValueError, match=r"kv must be \(\.\.\., 2, heads, D\) of 4 axes"):
        flash_attn_varlen_kvpacked_func(torch.ones(9, 4, 8), torch.ones(9, 8, 2), CU, CU)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_alibi_slopes(causal, per_sequence):
    """Against torch's attention with the bias written out; two more keys than queries shift the diagonal."""
    q, k, v = randn(2, 7, 4, 8), randn(2, 9, 2, 8), randn(2, 9, 2, 8)
    slopes = 2.0 ** -torch.arange(1, 5)
    slopes = torch.stack([slopes, 3 * slopes]) if per_sequence else slopes
    place = torch.arange(7)[:, None] + 2 - torch.arange(9)
    bias = -slopes.double().expand(2, 4)[:, :, None, None] * place.abs()
    if causal:
        bias = bias.masked_fill(place < 0, -torch.inf)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads, attn_mask=bias, enable_gqa=True).transpose(1, 2)
    got = flash_attn_func(q, k, v, causal=causal, alibi_slopes=slopes)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (got, want))
    torch.testing.assert_close(*grads)
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("uncausal.kernels.attention.resolve_backend", lambda backend, tensor: backend)
            flash_attn_func(q, k, v, alibi_slopes=slopes, backend="triton")


@pytest.mark.parametrize("width", [4, 8, 20])
def test_values_of_another_width(width):
    """Regression: multi-head latent attention has keys of 192 and values of 128 dimensions."""
    q, k, v = randn(19, 4, 8), randn(19, 2, 8), randn(19, 2, width)
    out, lse, _ = flash_attn_varlen_func(q, k, v, CU, CU, return_attn_probs=True)
    want = []
    for a, b in zip(CU[:-1], CU[1:], strict=True):
        heads = [x[a:b].transpose(0, 1) for x in (q, k, v)]
        want.append(F.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(0, 1))
    torch.testing.assert_close(out, torch.cat(want))
    grads = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, torch.cat(want)))
    torch.testing.assert_close(*grads)
    scores = (q[:5, 0] @ k[:5, 0].T) / 8**0.5
    torch.testing.assert_close(lse[0, :5], scores.logsumexp(1))
    dense = flash_attn_func(*(x.unflatten(0, (1, -1)) for x in (q, k, v)))
    assert dense.shape == (1, 19, 4, width)
