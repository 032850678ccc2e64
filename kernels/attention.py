"""Bidirectional packed attention, O = dropout(softmax(mask(softcap(scale * Q K^T)))) V by sequence and head.

Memory is linear in the tokens: only O and one fp32 log-sum-exp per row are kept, scores live on chip and are
computed again in backward. Backward uses no atomics, so that two runs give the same bits.

Layout legend: B sequences, T packed tokens, H query heads, HK key heads, G = H / HK, D head dimension.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from uncausal.kernels.attention_dropout import dropout_keep, dropout_threshold
from uncausal.kernels.cpu import attention_cpu, attention_torch
from uncausal.kernels.cpu.attention_torch import Options, plan_batch
from uncausal.kernels.launch import autocast_dtype, on_device, resolve_backend, traced, unobserved
from uncausal.kernels.packing import PackedLayout, TileMaps

# What the ops take beside q, k, v and the gradients: the batch, then the fields of Options and the backend.
# A list of maps would cost autograd as much time as all else.
_MAPS = len(TileMaps._fields)
_BATCH = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seed, " + ", ".join(
    f"Tensor? {name}" for name in TileMaps._fields
)
_OPTIONS = "float scale, int left, int right, float softcap, float dropout_p, str backend"


def _triton():
    from uncausal.kernels.gpu import attention_triton  # Triton exists on Linux alone

    return attention_triton


def _offsets(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[tuple[int, ...], ...]:
    """The offsets as integers, which rise to where the tensors end."""
    cu_q, cu_k = tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist())
    for name, offsets, rows in (("cu_seqlens_q", cu_q, len(q)), ("cu_seqlens_k", cu_k, len(k))):
        falls = any(after < before for before, after in pairwise(offsets))
        if offsets[0] != 0 or offsets[-1] != rows or falls:
            raise ValueError(f"{name} must rise from 0 to {rows}, got {list(offsets)}")
    return cu_q, cu_k


def _torch_arguments(q, k, cu_seqlens_q, cu_seqlens_k, seed, options: Options, direct: bool):
    """The plan of the torch path; torch's own kernel takes sequences directly where options allow it."""
    heads = k.shape[1]
    direct = direct and q.device.type == "cpu" and options.plain
    cu_q, cu_k = _offsets(q, k, cu_seqlens_q, cu_seqlens_k)
    compiled = (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and attention_cpu.library() is not None
    )
    plan = plan_batch(cu_q, cu_k, heads, q.shape[1] // heads, direct, compiled, q.device)
    return plan, options._replace(seed=0 if seed is None else int(seed))


def _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, *rest):
    """Return out (T, H, D) and lse (H, T); rest are the maps, then scores' options and the backend."""
    maps, (*scores, backend) = TileMaps(*rest[:_MAPS]), rest[_MAPS:]
    options = Options(*scores, seed=0)
    if backend == "triton":
        with on_device(q):
            return _triton().attention_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, maps, options)
    arguments = _torch_arguments(q, k, cu_seqlens_q, cu_seqlens_k, seed, options, True)
    with torch.autocast(q.device.type, enabled=False):  # its products are fp32 whatever the model's are
        return attention_torch.attention_forward(q, k, v, *arguments)


_flash_attn_varlen = torch.library.custom_op(
    "uncausal::flash_attn_varlen",
    _forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_BATCH}, {_OPTIONS}) -> (Tensor, Tensor)",
)


@_flash_attn_varlen.register_fake
def _(q, k, v, *rest):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


def _backward(dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed, *rest):
    maps, (*scores, backend) = TileMaps(*rest[:_MAPS]), rest[_MAPS:]
    options = Options(*scores, seed=0)
    if backend == "triton":
        with on_device(q):
            return _triton().attention_backward(
                dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed, maps, options
            )
    arguments = _torch_arguments(q, k, cu_seqlens_q, cu_seqlens_k, seed, options, dlse is None)
    with torch.autocast(q.device.type, enabled=False):
        return attention_torch.attention_backward(dout, dlse, q, k, v, out, lse, *arguments)


_flash_attn_varlen_backward = torch.library.custom_op(
    "uncausal::flash_attn_varlen_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_BATCH}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@_flash_attn_varlen_backward.register_fake
def _(dout, dlse, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    """Keep the first inputs, which are tensors, as such, and the rest as they are."""
    tensors = 6 + _MAPS
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:tensors])
    ctx.rest = inputs[tensors:]
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse, backward: Callable = _flash_attn_varlen_backward):
    """Gradients of q, k and v, and None for the op's other inputs."""
    saved = ctx.saved_tensors
    grads = (None, None, None)
    if dout is not None or dlse is not None:
        dout = torch.zeros_like(saved[3]) if dout is None else dout
        grads = backward(dout, dlse, *saved, *ctx.rest)
    return *grads, *(None,) * (len(saved) + len(ctx.rest) - 5)


_flash_attn_varlen.register_autograd(_gradients, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The op as autograd sees it, without torch's dispatcher, where the host spends most of a call."""

    @staticmethod
    def forward(ctx, q, k, v, rest):
        output = _forward(q, k, v, *rest)
        _save(ctx, (q, k, v, *rest), output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        # where a graph of backward is asked for, the op says that it has none
        direct = not torch.is_grad_enabled() and unobserved(*(x for x in grads if x is not None))
        backward = _backward if direct else _flash_attn_varlen_backward
        return *_gradients(ctx, *grads, backward=backward)[:3], None


def _attend(q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, *rest) -> tuple[Tensor, Tensor]:
    if not unobserved(q, k, v):
        return _flash_attn_varlen(q, k, v, *rest)
    return _Direct.apply(q, k, v, rest) if needs_grad else _forward(q, k, v, *rest)  # pyright: ignore


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    layout: PackedLayout | tuple[PackedLayout, PackedLayout] | None = None,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
):
    """Attend within each sequence of a packed batch, in both directions unless a window says otherwise.

    Args:
        q: (T, H, D) packed queries, fp16, bf16 or fp32 (fp64 on the torch backend); autocast casts q, k, v.
        k: (Tk, HK, D) packed keys; H is a multiple of HK.
        v: (Tk, HK, DV) packed values; a width other than D is padded.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 offsets of the sequences, contiguous, from 0 to T and Tk;
            the torch path checks that. On a GPU what follows from them is kept while the tensor stays: where
            one is filled again without torch (collectives, own kernels, `.data`), pass
            `layout=PackedLayout.from_cu_seqlens(...)`.
        max_seqlen_q, max_seqlen_k: the greatest lengths, which choose tiles; nothing needs them.
        dropout_p: probability of dropping a score after softmax, rounded to a multiple of 2^-16.
        softmax_scale: above 0; D ** -0.5 when None.
        causal: the window (window_size[0], 0).
        window_size: (left, right) keys visible around the diagonal, -1 for all; where a sequence has other
            lengths of queries and keys, its last query faces its last key.
        softcap: cap of the scores, softcap * tanh(score / softcap); 0 or less for none.
        alibi_slopes: (H,) or (B, H); slope * distance to the query's place among the keys is taken from a
            score. On the torch path alone, whose memory is then quadratic in the longest sequence.
        block_table: not supported.
        deterministic: accepted for compatibility; backward is always deterministic.
        return_attn_probs: also return the log-sum-exp.
        layout: the batch's PackedLayout, or one for the queries and one for the keys: keeps the maps of the
            kernels.
        dropout_seed: (1,) int64 tensor or integer that replays a dropout mask; drawn from torch's generator
            when None.
        backend: "auto", "triton" or "torch"; "auto" leaves to torch what no kernel takes: fp64, more than 256
            dimensions (128 in fp32), alibi_slopes.

    Returns:
        out (T, H, DV); with return_attn_probs (out, lse, None), where lse (H, T) is differentiable, in
        natural units and -inf for a query without keys, whose output and gradients are zero.

    Raises:
        NotImplementedError: for an argument that flash-attn has and this function has not.
        ValueError: for shapes, dtypes or devices that don't fit.

    Source: Dao, FlashAttention-2 (2023), algorithms 1 and 2.
    """
    if block_table is not None:
        raise NotImplementedError("block_table is not supported")
    q, k, v = _autocast(q, k, v)
    _check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if layout is not None and not traced():  # a graph would be of this number of tokens alone
        of_queries, of_keys = (layout, layout) if isinstance(layout, PackedLayout) else layout
        _check_layout("queries", of_queries, q, cu_seqlens_q)
        _check_layout("keys", of_keys, k, cu_seqlens_k)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    left, right = (-1 if w is None or w < 0 else int(w) for w in window_size)
    right = 0 if causal else right
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not scale > 0:  # what is masked is -inf before it is scaled
        raise ValueError(f"softmax_scale must be above 0, got {softmax_scale}")
    softcap = max(float(softcap), 0.0)
    seed = _dropout_seed(dropout_p, dropout_seed, q.device)
    width = v.shape[2]
    if width != q.shape[2]:  # zeros change no score, and the columns they add to out are cut off
        q, k, v = (pad(x, (0, max(width, q.shape[2]) - x.shape[2])) for x in (q, k, v))
    if backend == "auto" and (alibi_slopes is not None or not _fits_a_tile(q)):
        backend = "torch"
    backend = resolve_backend(backend, q)
    if alibi_slopes is not None:
        if backend == "triton":
            raise NotImplementedError("alibi_slopes is not supported by backend='triton', use 'torch'")
        scores = Options(scale, left, right, softcap, float(dropout_p), seed=0)
        out, lse = _attention_with_alibi(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, alibi_slopes, scores)
        out = out[..., :width]
        return (out, lse, None) if return_attn_probs else out
    options = Options(scale, left, right, softcap, float(dropout_p), seed=0)
    maps = TileMaps()
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if backend == "triton":
        attention_triton = _triton()
        q, k, v = (attention_triton.addressable(x) for x in (q, k, v))
        layouts = _layouts(layout, (cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k))
        maps = attention_triton.tile_maps(*layouts, q, k, options, needs_grad)
    batch = cu_seqlens_q, cu_seqlens_k, seed, *maps
    out, lse = _attend(q, k, v, needs_grad, *batch, *options[:5], backend)
    out = out if width == out.shape[2] else out[..., :width]
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    *,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
):
    """Attend within each sequence of a dense batch; see `flash_attn_varlen_func` for the other arguments.

    Args:
        q: (B, L, H, D) queries.
        k, v: (B, Lk, HK, D) keys and (B, Lk, HK, DV) values.

    Returns:
        out (B, L, H, DV); with return_attn_probs (out, lse (B, H, L), None).
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q, k, v must be (B, L, H, D), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch = q.shape[0]
    if not k.shape[0] == v.shape[0] == batch or k.shape[1] != v.shape[1]:  # len() would fix a traced size
        raise ValueError(
            "q, k, v must be of one batch, and k and v of one length, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    layout_q, layout_k = (PackedLayout.recalled_shape(batch, x.shape[1], x) for x in (q, k))
    out, lse, _ = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        layout_q.cu_seqlens,
        layout_k.cu_seqlens,
        q.shape[1],
        k.shape[1],
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        True,
        layout=(layout_q, layout_k),
        dropout_seed=dropout_seed,
        backend=backend,
    )
    out = out.unflatten(0, q.shape[:2])
    return (out, lse.unflatten(1, q.shape[:2]).transpose(0, 1), None) if return_attn_probs else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does for torch's own attention: rotary embeddings leave q and k in fp32, v is bf16."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _fits_a_tile(q: Tensor) -> bool:
    """Whether a kernel has tiles for q (T, H, D)."""
    return q.dtype != torch.float64 and q.shape[2] * q.element_size() <= 512


def _attention_with_alibi(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seed, alibi_slopes, options: Options
) -> tuple[Tensor, Tensor]:
    """Attend by the reference, in at least fp32; autograd keeps the scores."""
    _offsets(q, k, cu_seqlens_q, cu_seqlens_k)
    wide_q, wide_k, wide_v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        out, lse = flash_attn_varlen_ref(
            wide_q,
            wide_k,
            wide_v,
            cu_seqlens_q,
            cu_seqlens_k,
            dropout_p=options.dropout_p,
            softmax_scale=options.scale,
            window_size=(options.left, options.right),
            softcap=options.softcap,
            dropout_seed=seed,
            alibi_slopes=alibi_slopes,
        )
    return out.to(q.dtype), lse


def _layouts(layout, queries: tuple, keys: tuple) -> tuple[PackedLayout, PackedLayout]:
    """The layouts of queries and keys; of either side the offsets, a tensor that tells T, and max_seqlen."""
    if layout is not None:
        return (layout, layout) if isinstance(layout, PackedLayout) else layout

    def recalled(cu_seqlens: Tensor, tokens: Tensor, longest: object) -> PackedLayout:
        # some callers keep the maximum in a tensor, which would have to be waited for
        longest = longest if isinstance(longest, int) else None
        return PackedLayout.recalled(cu_seqlens, tokens.shape[0], longest)

    layout_q = recalled(*queries)
    same = keys[0] is queries[0] and keys[1].shape[0] == queries[1].shape[0] and keys[2] is queries[2]
    return layout_q, layout_q if same else recalled(*keys)


def _dropout_seed(dropout_p: float, seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(-(2**62), 2**62, (1,), device=device)
    if isinstance(seed, Tensor):
        return seed.to(device, torch.int64).view(1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)  # which waits for no copy


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    if (
        q.dim() != 3
        or k.dim() != 3
        or v.dim() != 3
        or k.shape[:2] != v.shape[:2]
        or q.shape[2] != k.shape[2]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            "expected q (T, H, D), k (Tk, HK, D) and v (Tk, HK, DV) with H a multiple of HK, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"q, k, v must share a floating point dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu.dim() != 1 or cu.dtype != torch.int32 or cu.shape[0] == 0 or not cu.is_contiguous():
            strides = "" if cu.is_contiguous() else ", not contiguous"
            raise ValueError(f"{name} must be (B + 1,) int32, got {tuple(cu.shape)} {cu.dtype}{strides}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens of queries and keys differ in length: {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    if not (q.device == k.device == v.device == cu_seqlens_q.device == cu_seqlens_k.device):
        devices = {str(x.device) for x in (q, k, v, cu_seqlens_q, cu_seqlens_k)}
        raise ValueError(f"all tensors must be on one device, got {sorted(devices)}")


def _check_layout(side: str, layout: PackedLayout, tokens: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse a layout of another batch: its tiles would be read and written behind the tensors' end.

    The lengths themselves are compared on a CPU alone, as the host would wait for a GPU's.
    """
    found = layout.total, layout.batch_size, layout.cu_seqlens.device
    wanted = tokens.shape[0], cu_seqlens.shape[0] - 1, tokens.device
    if found != wanted:
        told = "{} tokens in {} sequences on {}"
        raise ValueError(f"the layout of {side} is of {told.format(*found)}, they are {told.format(*wanted)}")
    if tokens.device.type == "cpu" and layout.cu_seqlens is not cu_seqlens:
        if not torch.equal(layout.cu_seqlens, cu_seqlens):
            offsets = cu_seqlens.tolist()
            raise ValueError(f"the layout of {side} has offsets {layout.cu_seqlens.tolist()}, not {offsets}")


def flash_attn_varlen_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Specify `flash_attn_varlen_func` in plain torch, in the dtype of q, sequence by sequence.

    Returns:
        out (T, H, DV) and lse (H, T).
    """
    group = q.shape[1] // k.shape[1]
    left, right = window_size[0], 0 if causal else window_size[1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [v.new_empty(0, q.shape[1], v.shape[2])], [q[:0, :, 0].t()]
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(q).expand(len(starts_q) - 1, q.shape[1])
    for i in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        qi = q[rows].transpose(0, 1)  # [H, L, D]
        ki, vi = (x[keys].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))  # [H, Lk, D]
        scores = qi @ ki.mT * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        len_q, len_k = scores.shape[1:]
        offset = (
            torch.arange(len_k, device=q.device)
            - torch.arange(len_q, device=q.device)[:, None]
            - (len_k - len_q)
        )
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[i, :, None, None] * offset.abs()
        hidden = torch.zeros_like(offset, dtype=torch.bool)
        if left >= 0:
            hidden |= offset < -left
        if right >= 0:
            hidden |= offset > right
        alone = hidden.all(-1)[:, None]  # queries without keys
        scores = scores.masked_fill(hidden & ~alone, -math.inf)
        lses.append(scores.logsumexp(-1).masked_fill(alone[:, 0], -math.inf))
        probs = scores.softmax(-1).masked_fill(alone, 0)
        if dropout_p > 0:
            assert dropout_seed is not None
            tokens = torch.arange(len_q, device=q.device)[None, None] + starts_q[i]
            heads = torch.arange(q.shape[1], device=q.device)[None, :, None]
            first = torch.tensor([starts_k[i]], device=q.device)
            keep = dropout_keep(int(dropout_seed), dropout_p, tokens, heads, first, len_k)[0]
            probs = probs * keep / (1 - dropout_threshold(dropout_p) / 65536)
        outs.append((probs @ vi).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses, 1)
