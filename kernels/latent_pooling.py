"""Latent attention pooling (NV-Embed, arXiv 2405.17428): tokens attend to trained latents, an MLP, the mean.

Released form, of a token x and the latents L:
    x1 = softmax(Wq LN(x) K^T / sqrt(D)) V Wo + x,   K, V = Wkv LN(L)
    y  = mean over the sequence of  W2 act(W1 LN(x1) + b1) + b2 + x1
Two rewrites leave y as it is and take two thirds of the arithmetic away:
    fold   K and V depend on the parameters alone: scores = LN(x) score^T and attention = P value^T
           with one (H*R, d) and one (d, H*R) matrix.
    pool   the mean is linear: W2 runs on sequences, not on tokens.
Without norms and residuals (the article's plain form) W1 folds into the values too: one kernel.
Memory: no (T, F) activation is stored; backward computes it again, a slab of tokens at a time.

Layout legend: B sequences, T packed tokens, d hidden size, H heads, R latents, D head dimension, F rows of W1
(with GEGLU the value half, then the gate half). Weights are (out, in), as in nn.Linear.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncausal.kernels.cpu import latent_pooling_torch as plain
from uncausal.kernels.cpu.latent_pooling_torch import accumulator
from uncausal.kernels.latent_pooling_ops import (
    NORM_EPS,
    latent_mlp_pool,
    latent_plain_pool,
    latent_softmax,
    norm_of,
)
from uncausal.kernels.launch import autocast_dtype, resolve_backend
from uncausal.kernels.packing import PackedLayout


class FoldedLatents(NamedTuple):
    """What `latent_attention_pool` computes with; `LatentAttentionPooling.fold` makes one."""

    score: Tensor | None  # (H*R, d); None where attention is not folded
    value: Tensor | None  # (d, H*R); in the plain form (F, H*R), with W1 folded in
    up: Tensor | None  # (F, d); None in the plain form
    up_bias: Tensor  # (F,)
    down: Tensor  # (d, F), gated (d, F / 2)
    down_bias: Tensor  # (d,)
    norms: tuple[Tensor, Tensor, Tensor, Tensor] | None  # gain, shift (d,) of attention's input, of the MLP's
    num_heads: int
    gated: bool
    residual: bool
    final_activation: bool


def _resolve(backend: str, tensor: Tensor) -> str:
    """Choose the backend. Ours pays in half precision; in fp32 and fp64 the library's products are faster."""
    if backend == "auto" and tensor.dtype not in (torch.float16, torch.bfloat16):
        return "torch"
    if backend == "triton" and tensor.dtype == torch.float64:
        raise ValueError("backend='triton' has no float64, use 'torch'")
    return resolve_backend(backend, tensor)


def latent_attention_pool(
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    parameters: FoldedLatents,
    *,
    token_weights: Tensor | None = None,
    validate: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pool packed token states into one vector a sequence with a folded latent attention layer.

    Args:
        hidden_states: (T, d) floating; products run in this dtype and are accumulated in fp32 (fp64 for
            fp64).
        cu_seqlens: (B + 1,) integer, cumulative lengths from 0 to T, on the device of `hidden_states`.
        parameters: from `LatentAttentionPooling.fold`; gradients reach the layer through it.
        token_weights: (T,) weights >= 0 of the mean, 0 leaves a token out; None for equal ones. Not
            differentiated.
        validate: check the values in `cu_seqlens` and `token_weights`; None does so on a CPU alone, since the
            host waits for a GPU's. Unchecked, a sequence without a token gives NaN.
        backend: "auto" (Triton for half precision on a GPU, else torch), "triton" or "torch".

    Returns:
        (B, d) in the dtype of `hidden_states`, not normalised.

    Raises:
        ValueError: for shapes, and where they are checked lengths, that do not fit, or a sequence without a
            token to pool.

    Source: NV-Embed (arXiv 2405.17428), section 3.2.
    """
    cu_seqlens = cu_seqlens.contiguous()  # kernels know no stride of it
    weights, void = _mean_weights(hidden_states, cu_seqlens, token_weights, validate)
    backend = _resolve(backend, hidden_states)
    p = _cast(parameters, hidden_states.dtype)
    if p.score is None or p.value is None:
        raise ValueError("parameters are not folded: LatentAttentionPooling.fold(tokens=None) folds always")
    if p.score.shape[1] != hidden_states.shape[1]:
        raise ValueError(f"hidden_states must be (T, {p.score.shape[1]}), got {tuple(hidden_states.shape)}")
    with torch.autocast(hidden_states.device.type, enabled=False):
        if p.up is None:
            x = hidden_states.contiguous()
            args = (p.score, p.value, p.up_bias, weights, cu_seqlens, p.num_heads, p.gated, backend)
            return _blank(_down(latent_plain_pool(x, *args), p).to(hidden_states.dtype), void)
        gain, shift = p.norms[:2] if p.norms else (None, None)
        probs = latent_softmax(hidden_states.contiguous(), gain, shift, p.score, p.num_heads, backend)
        # A library product with its addition beats a kernel of ours: nothing around it is left to fuse.
        x = _linear(probs, p.value, hidden_states if p.residual else None)
        return _blank(_mlp_mean(x, cu_seqlens, p, weights, backend), void)


def _blank(out: Tensor, void: Tensor | None) -> Tensor:
    """NaN for a sequence without a token, where nothing has refused it: its sum is a bias, and plausible."""
    return out if void is None else out.masked_fill(void[:, None], torch.nan)


def _mlp_mean(x: Tensor, cu_seqlens: Tensor, p: FoldedLatents, weights: Tensor, backend: str) -> Tensor:
    """Mean over each sequence of the MLP (and residual) of x (T, d), what attention left."""
    assert p.up is not None
    gain, shift = p.norms[2:] if p.norms else (None, None)
    if p.final_activation:  # not linear: every token goes through W2
        z = F.linear(plain.normalise(x, norm_of(gain, shift)), p.up, p.up_bias.to(x.dtype))
        inner = z[:, : z.shape[1] // 2] * F.gelu(z[:, z.shape[1] // 2 :]) if p.gated else F.gelu(z)
        out = F.gelu(F.linear(inner, p.down.to(x.dtype), p.down_bias.to(x.dtype)))
        out = (out + x if p.residual else out) * weights[:, None]
        lengths, trusted = cu_seqlens.diff().long(), x.device.type != "cpu"  # to check them waits for a GPU
        return torch.segment_reduce(out, "sum", lengths=lengths, axis=0, unsafe=trusted).to(x.dtype)
    args = (p.up, p.up_bias, weights, cu_seqlens, p.gated, p.residual, backend)
    inner, outer = latent_mlp_pool(x, gain, shift, *args)
    out = _down(inner, p)
    return (out + outer if p.residual else out).to(x.dtype)


def _down(inner: Tensor, p: FoldedLatents) -> Tensor:
    return _linear(inner.to(p.down.dtype), p.down, p.down_bias)


def _linear(x: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
    """x weight^T + added, which is (out,) or (rows, out); in inference on a CPU as `plain.product`."""
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.device.type != "cpu" or trains or torch.compiler.is_compiling():
        return x @ weight.T if added is None else torch.addmm(added, x, weight.T)
    out = plain.product(x, weight)
    return out if added is None else out + added


def _cast(p: FoldedLatents, dtype: torch.dtype) -> FoldedLatents:
    """What multiplies tokens in the tokens' dtype, the bias added to sums in the accumulation dtype."""
    return p._replace(
        score=None if p.score is None else p.score.to(dtype),
        value=None if p.value is None else p.value.to(dtype),
        up=None if p.up is None else p.up.to(dtype),
        up_bias=p.up_bias.to(accumulator(dtype)),
        norms=None if p.norms is None else tuple(t.to(dtype) for t in p.norms),
    )


def _mean_weights(
    hidden_states: Tensor, cu_seqlens: Tensor, token_weights: Tensor | None, validate: bool | None
) -> tuple[Tensor, Tensor | None]:
    """Weights (T,) that sum to one over each sequence, in the accumulation dtype; which have none, (B,).

    None where that was checked.
    """
    tokens = hidden_states.shape[0]
    if hidden_states.dim() != 2 or cu_seqlens.dim() != 1 or cu_seqlens.device != hidden_states.device:
        shapes = f"{tuple(hidden_states.shape)} and {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ValueError(f"expected (T, d) and (B + 1,) on {hidden_states.device}, got {shapes}")
    if token_weights is not None and (token_weights.shape != (tokens,) or token_weights.requires_grad):
        raise ValueError(
            f"token_weights must be ({tokens},) without gradient, got {tuple(token_weights.shape)}"
        )
    ids = plain.sequence_ids(cu_seqlens, tokens).clamp(0, cu_seqlens.shape[0] - 2)
    lengths = cu_seqlens.diff().long()
    dtype = accumulator(hidden_states.dtype)
    if token_weights is None:
        weights, total = torch.ones_like(ids, dtype=dtype), lengths.to(dtype)
    else:
        weights = token_weights.to(hidden_states.device, dtype)
        total = weights.new_zeros(len(lengths)).index_add(0, ids, weights)
    validate = hidden_states.device.type == "cpu" if validate is None else validate
    if validate and not torch.compiler.is_compiling():
        _check_sequences(cu_seqlens, tokens, weights, total)
        return weights / total[ids], None
    return weights / total[ids], total <= 0


def _check_sequences(cu_seqlens: Tensor, tokens: int, weights: Tensor, total: Tensor) -> None:
    spans = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
    if bool(spans & (weights >= 0).all() & (total > 0).all()):
        return
    if not bool(spans):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, got {cu_seqlens.tolist()}")
    if not bool((weights >= 0).all()):
        raise ValueError("token_weights must not be negative")
    raise ValueError(f"sequence {int((total <= 0).nonzero()[0])} has no token to pool")


class LatentAttentionPooling(nn.Module):
    """NV-Embed's pooling layer, parameters under NV-Embed's names; the released form by default.

    Every call folds whenever that costs less arithmetic for the tokens at hand. A frozen layer folds once and
    keeps the result: `freeze()` and `eval()` freeze, `train()` and a call that records gradients for the
    parameters thaw. What writes into a frozen layer's parameters is noticed (`load_state_dict`, `.to()`,
    `copy_`), but for fused optimisers and writing through `parameter.data`: call `freeze()` again after them.
    A compiled call notices none of it.

    Args:
        hidden_size: d.
        num_latents: R, rows of the trained `latents`.
        num_heads: H; the article's form without projections has one.
        head_dim: D; None means hidden_size, as released.
        mlp_ratio: width of the MLP over hidden_size.
        activation: "geglu" (value * gelu(gate), released) or "gelu" (the article).
        pre_norm: LayerNorm before attention, on the latents, and before the MLP.
        residual: add the input of attention, and of the MLP, to its output.
        final_activation: a GeLU after the second linear layer; W2 then runs on every token.
        project: False uses the latents themselves as keys and values, as the article does.
        softmax_scale: None means 1 / sqrt(D); the article writes no scale (1.0).
        backend: "auto", "triton" or "torch".

    Source: NV-Embed (arXiv 2405.17428), section 3.2, and its released weights.
    """

    cross_attend_blocks: Any  # modules nested in dictionaries, which type checkers cannot follow

    def __init__(
        self,
        hidden_size: int,
        num_latents: int = 512,
        num_heads: int = 8,
        head_dim: int | None = None,
        mlp_ratio: int = 4,
        activation: str = "geglu",
        pre_norm: bool = True,
        residual: bool = True,
        final_activation: bool = False,
        *,
        project: bool = True,
        softmax_scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if activation not in ("geglu", "gelu"):
            raise ValueError(f"activation must be 'geglu' or 'gelu', got {activation!r}")
        if not project and (num_heads != 1 or head_dim not in (None, hidden_size)):
            raise ValueError(f"without projections there is one head of {hidden_size}, got {num_heads}")
        self.hidden_size, self.num_latents, self.num_heads = hidden_size, num_latents, num_heads
        self.head_dim = hidden_size if head_dim is None else head_dim
        self.gated, self.pre_norm, self.residual = activation == "geglu", pre_norm, residual
        self.final_activation, self.project, self.backend = final_activation, project, backend
        self.softmax_scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale

        self.latents = nn.Parameter(torch.randn(num_latents, hidden_size))
        inner, width = num_heads * self.head_dim, mlp_ratio * hidden_size
        attend, mlp = nn.ModuleDict(), nn.ModuleDict()
        if project:
            attend["fn"] = nn.ModuleDict(
                {
                    "to_q": nn.Linear(hidden_size, inner, bias=False),
                    "to_kv": nn.Linear(hidden_size, 2 * inner, bias=False),
                    "to_out": nn.Linear(inner, hidden_size, bias=False),
                }
            )
        up = nn.Linear(hidden_size, 2 * width if self.gated else width)
        # The released MLP is a Sequential whose second entry, the activation, has no parameters.
        mlp["fn"] = nn.ModuleDict({"net": nn.Sequential(up, nn.Identity(), nn.Linear(width, hidden_size))})
        if pre_norm:
            attend["norm"], attend["norm_context"] = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
            mlp["norm"] = nn.LayerNorm(hidden_size)
        self.cross_attend_blocks = nn.ModuleList([attend, mlp])
        self._frozen = False
        self._kept: tuple[tuple, FoldedLatents] | None = None  # state of the parameters, and their fold

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor:
        """Pool token states, packed (T, d) with `cu_seqlens` or padded (B, L, d), into (B, d).

        Args:
            hidden_states: floating; with half precision the products run in it, on parameters of any
                precision.
            cu_seqlens: (B + 1,) integer, for packed states.
            attention_mask: (B, L), nonzero where a token counts, for padded states; None for all.
            token_weights: (T,) or (B, L), weights of the mean.

        Returns:
            (B, d) in the dtype of `hidden_states`, not normalised.

        Raises:
            ValueError: for shapes that do not fit, and on a CPU for a sequence without a token to pool.
        """
        if hidden_states.dim() == 3:
            if attention_mask is None:
                attention_mask = torch.ones_like(hidden_states[..., 0], dtype=torch.bool)
            layout = PackedLayout.from_mask(attention_mask)
            cu_seqlens, hidden_states = layout.cu_seqlens, hidden_states.flatten(0, 1)[layout.indices]
            if token_weights is not None:
                token_weights = token_weights.flatten()[layout.indices]
        elif cu_seqlens is None:
            raise ValueError(f"packed states {tuple(hidden_states.shape)} need cu_seqlens")
        device_type = hidden_states.device.type
        if (dtype := autocast_dtype(device_type)) is not None:
            hidden_states = hidden_states.to(dtype)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if trains and self._frozen:
            self._frozen, self._kept = False, None
        with torch.autocast(device_type, enabled=False):
            if self._frozen:
                folded = self._kept_fold(hidden_states.dtype)
            else:
                folded = self.fold(hidden_states.dtype, hidden_states.shape[0])
        if folded.score is None:
            cu_seqlens = cu_seqlens.contiguous()
            weights, void = _mean_weights(hidden_states, cu_seqlens, token_weights, None)
            backend = _resolve(self.backend, hidden_states)
            with torch.autocast(device_type, enabled=False):
                out = _mlp_mean(self._attend(hidden_states), cu_seqlens, folded, weights, backend)
                return _blank(out, void)
        options = {"token_weights": token_weights, "backend": self.backend}
        return latent_attention_pool(hidden_states, cu_seqlens, folded, **options)

    def fold(self, dtype: torch.dtype | None = None, tokens: int | None = None) -> FoldedLatents:
        """Fold the parameters, in fp32 or wider and differentiably, as far as it pays.

        Args:
            dtype: of the tokens, and of the matrices that multiply them; None for the parameters' own.
            tokens: how many will be pooled with this fold; None for so many that folding is free.

        Returns:
            The folded layer; below the break-even without `score` and `value`.
        """
        wide = accumulator(self.latents.dtype)
        attend, mlp = self.cross_attend_blocks
        up, _, down = mlp["fn"]["net"]
        up_weight = up.weight
        score = value = None
        plan = self.cheapest_fold(tokens)
        if plan != "none":
            score, value = self._fold_attention(wide)
        if plan == "mlp":
            value, up_weight = up_weight.to(wide) @ value, None
        norms = None
        if self.pre_norm:
            norms = (attend["norm"].weight, attend["norm"].bias, mlp["norm"].weight, mlp["norm"].bias)
        folded = FoldedLatents(
            score=score,
            value=value,
            up=up_weight,
            up_bias=up.bias,
            down=down.weight,
            down_bias=down.bias,
            norms=norms,
            num_heads=self.num_heads,
            gated=self.gated,
            residual=self.residual,
            final_activation=self.final_activation,
        )
        return _cast(folded, dtype or self.latents.dtype)

    def cheapest_fold(self, tokens: int | None = None) -> str:
        """Choose by counted multiplications what to fold for so many tokens: "none", "attention" or also
        the "mlp".

        Keys and values are computed either way. Backward doubles every count alike, so the rule holds for
        a training step too: it says 512 tokens at d 512 and 1,024, and timed on a CPU both break even
        between 384 and 512 (`bench_latent_pooling.py --break-even`, bench/NOTES.md).
        """
        d, latents, inner = self.hidden_size, self.num_latents, self.num_heads * self.head_dim
        scores, width = self.num_heads * latents, self.cross_attend_blocks[1]["fn"]["net"][0].out_features
        # (once, per token); without projections attention needs no fold at all
        costs = {"attention": (2 * d * inner * latents if self.project else 0, 2 * d * scores + d * width)}
        if self.project:
            costs["none"] = (0, 2 * inner * (d + latents) + d * width)
        if not (self.pre_norm or self.residual or self.final_activation):
            once = costs["attention"][0] + width * d * scores
            costs["mlp"] = (once, d * scores + scores * width)
        totals = [each if tokens is None else once + tokens * each for once, each in costs.values()]
        return list(costs)[totals.index(min(totals))]  # dynamo knows no min(key=)

    def _context(self, dtype: torch.dtype) -> Tensor:
        latents = self.latents.to(dtype)
        if not self.pre_norm:
            return latents
        norm = self.cross_attend_blocks[0]["norm_context"]
        return F.layer_norm(latents, latents.shape[1:], norm.weight.to(dtype), norm.bias.to(dtype), NORM_EPS)

    def _fold_attention(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Matrices (H*R, d) and (d, H*R) that give scores and attention's output."""
        context = self._context(dtype)
        if not self.project:
            return context * self.softmax_scale, context.T
        fn, heads = self.cross_attend_blocks[0]["fn"], self.num_heads
        key, value = F.linear(context, fn["to_kv"].weight.to(dtype)).chunk(2, dim=1)
        key, value = (t.unflatten(1, (heads, -1)).transpose(0, 1) for t in (key, value))  # (H, R, D)
        query = fn["to_q"].weight.to(dtype).unflatten(0, (heads, -1))  # (H, D, d)
        out = fn["to_out"].weight.to(dtype).unflatten(1, (heads, -1)).transpose(0, 1)  # (H, d, D)
        score = torch.baddbmm(key.new_zeros(()), key, query, beta=0, alpha=self.softmax_scale)  # (H, R, d)
        return score.flatten(0, 1), torch.bmm(out, value.mT).transpose(0, 1).flatten(1)

    def _attend(self, x: Tensor) -> Tensor:
        """Attention without folding: cheaper for a training step on few tokens."""
        attend, dtype = self.cross_attend_blocks[0], x.dtype
        fn, inner = attend["fn"], x
        if self.pre_norm:
            norm = attend["norm"]
            inner = F.layer_norm(x, x.shape[1:], norm.weight.to(dtype), norm.bias.to(dtype), NORM_EPS)
        query = F.linear(inner, fn["to_q"].weight.to(dtype))
        key, value = F.linear(self._context(dtype), fn["to_kv"].weight.to(dtype)).chunk(2, dim=1)
        query, key, value = (
            t.unflatten(1, (self.num_heads, -1)).transpose(0, 1) for t in (query, key, value)
        )
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], scale=self.softmax_scale)
        out = F.linear(out[0].transpose(0, 1).flatten(1), fn["to_out"].weight.to(dtype))
        return out + x if self.residual else out

    def freeze(self, dtype: torch.dtype | None = None) -> "LatentAttentionPooling":
        """Fold now, for inference, and keep the result until something thaws the layer; see the class.

        Args:
            dtype: of the tokens to come; None for the parameters' own. Other tokens fold again.

        Returns:
            The layer.
        """
        self._frozen, self._kept = True, None
        self._kept_fold(dtype or self.latents.dtype)
        return self

    def _kept_fold(self, dtype: torch.dtype) -> FoldedLatents:
        kept = self._kept
        if (
            torch.compiler.is_compiling()
        ):  # nothing is kept from within a graph, and versions are unknown there
            return kept[1] if kept is not None and kept[0][0] == dtype else self.fold(dtype)
        state = (dtype, *((id(p), p.data_ptr(), _version(p)) for p in self.parameters()))
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = state, self.fold(dtype)
        return kept[1]

    # A freed parameter's address can be given out again: what replaces storage drops the fold outright.

    def _apply(self, *args, **kwargs):
        self._kept = None
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        self._kept = None
        return super().load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True):
        self._frozen, self._kept = not mode, None
        return super().train(mode)


@contextmanager
def kept_folds(model: nn.Module) -> Iterator[None]:
    """Fold each latent attention layer of a model once for the calls in the block that record no gradient.

    For several calls between which no parameter changes, as in GradCache's first pass (arXiv 2101.06983).
    """
    found = [m for m in model.modules() if isinstance(m, LatentAttentionPooling) and not m._frozen]
    for layer in found:
        layer._frozen, layer._kept = True, None
    try:
        yield
    finally:
        for layer in found:
            layer._frozen, layer._kept = False, None


def _version(parameter: Tensor) -> int:
    return -1 if parameter.is_inference() else parameter._version
