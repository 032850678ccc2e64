"""The ops of latent attention pooling: each has a torch and a Triton implementation, a gradient, its FLOPs.

Layout legend as in latent_pooling.py: T packed tokens, d hidden size, H heads, R latents, F rows of W1. A
gradient for an absent norm is empty.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from uncausal.kernels.cpu import latent_pooling_torch as plain
from uncausal.kernels.cpu.latent_pooling_torch import accumulator
from uncausal.kernels.launch import on_device

NORM_EPS = 1e-5


def _implementation(backend: str) -> Any:
    if backend == "torch":
        return plain
    from uncausal.kernels.gpu import latent_pooling_triton

    return latent_pooling_triton


def norm_of(gain: Tensor | None, shift: Tensor | None) -> plain.Norm:
    """Return what the implementations take for a LayerNorm, None for none."""
    return None if gain is None or shift is None else (gain, shift, NORM_EPS)


@torch.library.custom_op("uncausal::latent_softmax", mutates_args=())
def latent_softmax(
    x: Tensor, gain: Tensor | None, shift: Tensor | None, score: Tensor, num_heads: int, backend: str
) -> Tensor:
    """Probabilities (T, H*R) of each token over each head's latents."""
    with on_device(x):
        return _implementation(backend).softmax(x, norm_of(gain, shift), score, num_heads)


@latent_softmax.register_fake
def _(x, gain, shift, score, num_heads, backend):
    return x.new_empty(x.shape[0], score.shape[0])


@torch.library.custom_op("uncausal::latent_softmax_backward", mutates_args=())
def _latent_softmax_backward(
    dprobs: Tensor,
    probs: Tensor,
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    score: Tensor,
    num_heads: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, gain, shift and score."""
    with on_device(x):
        grads = _implementation(backend).softmax_backward(
            dprobs, probs, x, norm_of(gain, shift), score, num_heads
        )
    return grads.x, grads.gain, grads.shift, grads.weight.to(score.dtype)


@_latent_softmax_backward.register_fake
def _(dprobs, probs, x, gain, shift, score, num_heads, backend):
    dgain = x.new_empty(0 if gain is None else x.shape[1], dtype=accumulator(x.dtype))
    return torch.empty_like(x), dgain, torch.empty_like(dgain), torch.empty_like(score)


def _softmax_context(ctx, inputs, output):
    x, gain, shift, score, ctx.num_heads, ctx.backend = inputs
    ctx.save_for_backward(output, x, gain, shift, score)


def _softmax_autograd(ctx, dprobs):
    saved = ctx.saved_tensors  # read once: a checkpoint unpacks once
    dx, dgain, dshift, dscore = _latent_softmax_backward(dprobs, *saved, ctx.num_heads, ctx.backend)
    return dx, *_norm_gradients(saved[2], dgain, dshift), dscore, None, None


def _norm_gradients(
    gain: Tensor | None, dgain: Tensor, dshift: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if gain is None else (dgain.to(gain.dtype), dshift.to(gain.dtype))


latent_softmax.register_autograd(_softmax_autograd, setup_context=_softmax_context)


@torch.library.custom_op("uncausal::latent_mlp_pool", mutates_args=())
def latent_mlp_pool(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    up: Tensor,
    up_bias: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    gated: bool,
    residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Weighted sums over each sequence of act(W1 LN(x) + b1), and with residual of x itself (else empty)."""
    with on_device(x):
        return _implementation(backend).mlp_pool(
            x, norm_of(gain, shift), up, up_bias, weights, cu_seqlens, gated, residual
        )


@latent_mlp_pool.register_fake
def _(x, gain, shift, up, up_bias, weights, cu_seqlens, gated, residual, backend):
    batch, width = cu_seqlens.shape[0] - 1, up.shape[0] // 2 if gated else up.shape[0]
    return weights.new_empty(batch, width), weights.new_empty((batch, x.shape[1]) if residual else (0,))


@torch.library.custom_op("uncausal::latent_mlp_pool_backward", mutates_args=())
def _latent_mlp_pool_backward(
    dinner: Tensor,
    douter: Tensor,
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    up: Tensor,
    up_bias: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    gated: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, gain, shift, up and up_bias."""
    rest = (norm_of(gain, shift), up, up_bias, weights, cu_seqlens, gated)
    with on_device(x):
        grads, dbias = _implementation(backend).mlp_pool_backward(dinner, douter, x, *rest)
    return grads.x, grads.gain, grads.shift, grads.weight.to(up.dtype), dbias


@_latent_mlp_pool_backward.register_fake
def _(dinner, douter, x, gain, shift, up, up_bias, weights, cu_seqlens, gated, backend):
    dgain = x.new_empty(0 if gain is None else x.shape[1], dtype=accumulator(x.dtype))
    dbias = torch.empty_like(up_bias)
    return torch.empty_like(x), dgain, torch.empty_like(dgain), torch.empty_like(up), dbias


def _mlp_pool_context(ctx, inputs, output):
    *tensors, ctx.gated, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _mlp_pool_autograd(ctx, dinner, douter):
    saved = ctx.saved_tensors
    grads = _latent_mlp_pool_backward(dinner, douter, *saved, ctx.gated, ctx.backend)
    dx, dgain, dshift, dup, dbias = grads
    return dx, *_norm_gradients(saved[1], dgain, dshift), dup, dbias, *(None,) * 5


latent_mlp_pool.register_autograd(_mlp_pool_autograd, setup_context=_mlp_pool_context)


@torch.library.custom_op("uncausal::latent_plain_pool", mutates_args=())
def latent_plain_pool(
    x: Tensor,
    score: Tensor,
    value: Tensor,
    up_bias: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    gated: bool,
    backend: str,
) -> Tensor:
    """Weighted sums per sequence of act(softmax(x score^T) value^T + b1)."""
    with on_device(x):
        return _implementation(backend).plain_pool(
            x, score, value, up_bias, weights, cu_seqlens, num_heads, gated
        )


@latent_plain_pool.register_fake
def _(x, score, value, up_bias, weights, cu_seqlens, num_heads, gated, backend):
    return weights.new_empty(cu_seqlens.shape[0] - 1, value.shape[0] // 2 if gated else value.shape[0])


def _plain_pool_context(ctx, inputs, output):
    *tensors, ctx.num_heads, ctx.gated, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _plain_pool_autograd(ctx, dinner):
    # The probabilities are R/d of the hidden states: recomputed as a whole, they turn this into the other
    # ops' backward.
    x, score, value, up_bias, weights, cu_seqlens = ctx.saved_tensors
    probs = latent_softmax(x, None, None, score, ctx.num_heads, ctx.backend)
    rest = (value, up_bias, weights, cu_seqlens, ctx.gated, ctx.backend)
    grads = _latent_mlp_pool_backward(dinner, dinner.new_empty(0), probs, None, None, *rest)
    dprobs, _, _, dvalue, dbias = grads
    grads = _latent_softmax_backward(dprobs, probs, x, None, None, score, ctx.num_heads, ctx.backend)
    dx, _, _, dscore = grads
    return dx, dscore, dvalue, dbias, *(None,) * 5


latent_plain_pool.register_autograd(_plain_pool_autograd, setup_context=_plain_pool_context)


# FlopCounterMode does not look into custom ops: tell it the products each one does.


@register_flop_formula(torch.ops.uncausal.latent_softmax)
def _(x, gain, shift, score, *args, out_shape=None, **kwargs) -> int:
    return 2 * x[0] * score[0] * score[1]


@register_flop_formula(torch.ops.uncausal.latent_softmax_backward)
def _(dprobs, probs, x, gain, shift, score, *args, out_shape=None, **kwargs) -> int:
    return 4 * x[0] * score[0] * score[1]


@register_flop_formula(torch.ops.uncausal.latent_mlp_pool)
def _(x, gain, shift, up, *args, out_shape=None, **kwargs) -> int:
    return 2 * x[0] * up[0] * up[1]


@register_flop_formula(torch.ops.uncausal.latent_mlp_pool_backward)
def _(dinner, douter, x, gain, shift, up, *args, out_shape=None, **kwargs) -> int:
    return 6 * x[0] * up[0] * up[1]


@register_flop_formula(torch.ops.uncausal.latent_plain_pool)
def _(x, score, value, *args, out_shape=None, **kwargs) -> int:
    return 2 * x[0] * (score[0] * score[1] + value[0] * value[1])
