"""Latent attention pooling in torch operations: the CPU path, a slab of tokens at a time, and the reference.

Layout legend: B sequences, T packed tokens, d hidden size, H heads, R latents, D head dimension, F
up-projection (with GEGLU the value half, then the gate half). Weights are (out, in), as in nn.Linear.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

SLAB_ROWS = 256  # tokens taken at a time on a CPU: their F pre-activations stay near the cache
SLAB_ROWS_GPU = 4096

Norm = tuple[Tensor, Tensor, float] | None  # gain (d,), shift (d,), eps


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over this one: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def sequence_ids(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Give each packed token its sequence, (T,) int64."""
    return torch.searchsorted(cu_seqlens, torch.arange(tokens, device=cu_seqlens.device), right=True) - 1


def slabs(x: Tensor, size: int | None = None) -> Iterator[slice]:
    """Rows of x, so many at a time; by default as many as suit its device."""
    size, rows = size or (SLAB_ROWS if x.device.type == "cpu" else SLAB_ROWS_GPU), x.shape[0]
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def normalise(x: Tensor, norm: Norm) -> Tensor:
    return x if norm is None else F.layer_norm(x, x.shape[1:], *norm)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T (rows, out), on a CPU with the same bits for a row among few as among many.

    In fp32 it is oneDNN's, which for few rows and a wide weight reaches 1.5 times the speed of the BLAS
    behind `F.linear` on AMD (bench/NOTES.md). That BLAS has other routines for few rows, oneDNN for one.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight)
    if x.shape[0] == 1:
        return product(x.expand(2, -1), weight)[:1]
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias (rows, out), in the accumulation dtype."""
    out = product(x, weight).to(accumulator(x.dtype))
    return out if bias is None else out.add_(bias)


class LinearGradients:
    """Gradients of LN(x) weight^T gathered slab by slab: `x` is written, `weight`, `gain` and `shift` are
    summed."""

    def __init__(self, x: Tensor, norm: Norm, weight: Tensor) -> None:
        wide = accumulator(x.dtype)
        self.x, self.weight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        self.gain, self.shift = (x.new_zeros(x.shape[1] if norm else 0, dtype=wide) for _ in range(2))
        self._input, self._norm, self._weight = x, norm, weight

    def add(self, rows: slice, normed: Tensor, dz: Tensor) -> None:
        """Take in the gradient dz (rows, out) of a slab, of which `normed` was the input."""
        dz = dz.to(normed.dtype)
        if self.weight.dtype == dz.dtype:
            self.weight.addmm_(dz.T, normed)
        else:
            self.weight += dz.T @ normed
        if self._norm is None:
            self.x[rows] = product(dz, self._weight.T)
            return
        x, (gain, shift, eps) = self._input[rows], self._norm
        _, mean, rstd = torch.native_layer_norm(x, x.shape[1:], None, None, eps)
        back = torch.ops.aten.native_layer_norm_backward
        dx, dgain, dshift = back(
            product(dz, self._weight.T), x, x.shape[1:], mean, rstd, gain, shift, [True] * 3
        )
        self.x[rows] = dx
        self.gain += dgain
        self.shift += dshift


def softmax(x: Tensor, norm: Norm, score: Tensor, num_heads: int) -> Tensor:
    """Probabilities (T, H*R) of each token over the latents of each head."""
    probs = x.new_empty(x.shape[0], score.shape[0])
    for rows in slabs(x):
        scores = wide_linear(normalise(x[rows], norm), score).unflatten(1, (num_heads, -1))
        probs[rows] = scores.softmax(-1).flatten(1)
    return probs


def softmax_backward(
    dprobs: Tensor,
    probs: Tensor,
    x: Tensor,
    norm: Norm,
    score: Tensor,
    num_heads: int,
) -> LinearGradients:
    """Gradients of `softmax` for x, the norm and score."""
    grads = LinearGradients(x, norm, score)
    for rows in slabs(x):
        p = probs[rows].to(accumulator(x.dtype)).unflatten(1, (num_heads, -1))
        dp = dprobs[rows].unflatten(1, (num_heads, -1)) * p
        dscores = dp.sub_(p * dp.sum(-1, keepdim=True)).flatten(1)
        grads.add(rows, normalise(x[rows], norm), dscores)
    return grads


def activate(z: Tensor, gated: bool) -> Tensor:
    """GEGLU of (rows, F) as value * gelu(gate), or GeLU."""
    if not gated:
        return F.gelu(z)
    value, gate = z.chunk(2, dim=1)
    return F.gelu(gate.contiguous()).mul_(
        value
    )  # oneDNN's, which a single row, contiguous as it is, gets too


def activate_backward(dout: Tensor, z: Tensor, gated: bool) -> Tensor:
    """Gradient of `activate` for z, which it overwrites."""
    if not gated:
        return torch.ops.aten.gelu_backward(dout, z)
    value, gate = z.chunk(2, dim=1)
    dgate = torch.ops.aten.gelu_backward(dout * value, gate)
    torch.mul(F.gelu(gate), dout, out=value)
    gate.copy_(dgate)
    return z


def mlp_pool(
    x: Tensor,
    norm: Norm,
    up: Tensor,
    up_bias: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    gated: bool,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """Sum weights * act(LN(x) up^T + up_bias) over each sequence, and with residual weights * x."""
    ids, batch = sequence_ids(cu_seqlens, x.shape[0]), cu_seqlens.shape[0] - 1
    inner = weights.new_zeros(batch, up.shape[0] // 2 if gated else up.shape[0])
    outer = weights.new_zeros((batch, x.shape[1]) if residual else (0,))
    for rows in slabs(x):
        z = wide_linear(normalise(x[rows], norm), up, up_bias)
        inner.index_add_(0, ids[rows], activate(z, gated).mul_(weights[rows, None]))
        if residual:
            outer.index_add_(0, ids[rows], x[rows] * weights[rows, None])
    return inner, outer


def mlp_pool_backward(
    dinner: Tensor,
    douter: Tensor,
    x: Tensor,
    norm: Norm,
    up: Tensor,
    up_bias: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    gated: bool,
) -> tuple[LinearGradients, Tensor]:
    """Gradients of `mlp_pool` for x, the norm and up, and for up_bias; the pre-activation is computed
    again."""
    ids = sequence_ids(cu_seqlens, x.shape[0])
    grads, dbias = LinearGradients(x, norm, up), torch.zeros_like(up_bias)
    for rows in slabs(x):
        normed = normalise(x[rows], norm)
        dout = dinner[ids[rows]].mul_(weights[rows, None])
        dz = activate_backward(dout, wide_linear(normed, up, up_bias), gated)
        dbias += dz.sum(0)
        grads.add(rows, normed, dz)
        if douter.numel():
            grads.x[rows] += douter[ids[rows]].mul_(weights[rows, None]).to(x.dtype)
    return grads, dbias


def plain_pool(
    x: Tensor,
    score: Tensor,
    value: Tensor,
    up_bias: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    gated: bool,
) -> Tensor:
    """Sum weights * act(softmax(x score^T) value^T + up_bias) over each sequence."""
    ids = sequence_ids(cu_seqlens, x.shape[0])
    inner = weights.new_zeros(cu_seqlens.shape[0] - 1, value.shape[0] // 2 if gated else value.shape[0])
    for rows in slabs(x):
        z = wide_linear(softmax(x[rows], None, score, num_heads), value, up_bias)
        inner.index_add_(0, ids[rows], activate(z, gated).mul_(weights[rows, None]))
    return inner


def latent_attention_pool_ref(
    state: Mapping[str, Tensor],
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None = None,
    *,
    num_heads: int = 8,
    activation: str = "geglu",
    pre_norm: bool = True,
    residual: bool = True,
    final_activation: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Compute the layer as its equations stand: keys and values projected, every token through both linear
    layers.

    Args:
        state: parameters under NV-Embed's names; without `to_q` the latents are keys and values themselves.
        hidden_states: (T, d).
        cu_seqlens: (B + 1,) integer.
        token_weights: (T,) weights of the mean; None for equal ones.
        num_heads, activation, pre_norm, residual, final_activation, softmax_scale: as in
            `LatentAttentionPooling`.

    Returns:
        (B, d) in the dtype of `hidden_states`.
    """
    first, second = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    x, context = hidden_states, state["latents"]
    if pre_norm:
        x = F.layer_norm(x, x.shape[1:], state[first + "norm.weight"], state[first + "norm.bias"])
        names = (first + "norm_context.weight", first + "norm_context.bias")
        context = F.layer_norm(context, context.shape[1:], state[names[0]], state[names[1]])
    query, key, value = x, context, context
    if first + "fn.to_q.weight" in state:
        query = x @ state[first + "fn.to_q.weight"].T
        key, value = (context @ state[first + "fn.to_kv.weight"].T).chunk(2, dim=1)
    query, key, value = (t.unflatten(1, (num_heads, -1)).transpose(0, 1) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = ((query @ key.mT * scale).softmax(-1) @ value).transpose(0, 1).flatten(1)
    if first + "fn.to_out.weight" in state:
        out = out @ state[first + "fn.to_out.weight"].T
    x = out + hidden_states if residual else out

    inner = x
    if pre_norm:
        inner = F.layer_norm(x, x.shape[1:], state[second + "norm.weight"], state[second + "norm.bias"])
    inner = F.linear(inner, state[second + "fn.net.0.weight"], state[second + "fn.net.0.bias"])
    if activation == "geglu":
        content, gate = inner.chunk(2, dim=1)
        inner = content * F.gelu(gate)
    else:
        inner = F.gelu(inner)
    out = F.linear(inner, state[second + "fn.net.2.weight"], state[second + "fn.net.2.bias"])
    out = F.gelu(out) if final_activation else out
    x = out + x if residual else out

    weights = torch.ones_like(x[:, 0]) if token_weights is None else token_weights.to(x)
    spans = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    return torch.stack([weights[i:j] @ x[i:j] / weights[i:j].sum() for i, j in spans])
