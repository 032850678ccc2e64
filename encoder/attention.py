"""Offers the packed attention of `uncausal.kernels.attention` to transformers under the name "uncausal".

Importing this module is enough: `model.set_attn_implementation("uncausal")` then works. The name must not
contain "flash": sentence-transformers refuses such a name unless flash-attn itself is installed.

A batch reaches the kernel in one of three forms:
    packed  (1, T) with `cu_seq_lens_q` and `cu_seq_lens_k`, or with `position_ids` that restart
    padded  (B, L) with a 2D mask: real tokens are gathered, attended and scattered back
    dense   (B, L) without padding
What depends on the batch alone (a PackedLayout) is built in the first layer and found again in the others.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface

from uncausal.encoder.layers import find_decoder
from uncausal.kernels.attention import flash_attn_func, flash_attn_varlen_func
from uncausal.kernels.packing import PackedLayout, pack, unpack

NAME = "uncausal"
_WINDOW, _FULL = "_uncausal_window", "_uncausal_full"  # what a mask tells besides padding


class _Batch(NamedTuple):
    """The sequences of a batch whose rows are not all one full sequence."""

    layout: PackedLayout
    padded: bool  # tokens must be gathered, and scattered back afterwards
    has_gaps: bool = False  # padding lies between real tokens


class _Recent:
    """The last few values derived from a tensor, found again while that very tensor lives unchanged.

    A weak dictionary would leak: a layout holds the cu_seqlens that would be its key.
    """

    def __init__(self, size: int = 8):
        self.size = size
        self.entries: list[tuple[weakref.ref, int | Tensor, _Batch | None]] = []

    def get(self, tensor: Tensor, build: Callable[[Tensor], _Batch | None]) -> _Batch | None:
        # Inference tensors count no versions: only their content tells that a buffer was filled again.
        version = None if tensor.is_inference() else tensor._version
        for reference, known, value in self.entries:
            if reference() is tensor:
                if torch.equal(known, tensor) if isinstance(known, Tensor) else known == version:
                    return value
        with torch.inference_mode(False):  # a later call with gradients finds it too
            value = build(tensor)
        kept = [entry for entry in self.entries if entry[0]() is not None and entry[0]() is not tensor]
        state = tensor.clone() if version is None else version
        self.entries = [(weakref.ref(tensor), state, value), *kept[: self.size - 1]]
        return value


_recent = _Recent()


def _batch_from_mask(mask: Tensor) -> _Batch:
    starts = mask & ~pad(mask, (1, 0))[:, :-1]
    return _Batch(PackedLayout.from_mask(mask), True, bool((starts.sum(1) > 1).any()))


def _batch_from_position_ids(position_ids: Tensor) -> _Batch | None:
    """position_ids: (1, T); a sequence starts where they do not count on. None when there is only one."""
    starts = (position_ids[0].diff() != 1).nonzero().squeeze(1) + 1
    if not len(starts):
        return None
    total = position_ids.shape[1]
    offsets = [0, *starts.tolist(), total]
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    return _Batch(PackedLayout.from_lengths(lengths, position_ids.device), False)


def layout_of(features: Mapping[str, Any]) -> PackedLayout:
    """The layout of a packed batch, from `cu_seq_lens_q` (B + 1,) and `input_ids` (1, T).

    Given to the model as `layout`, it saves every layer the search for it. `lengths`, B integers, are known
    without reading anything off a device, which would wait for it; large tiles are chosen by them.
    """
    cu_seqlens, total = features["cu_seq_lens_q"], features["input_ids"].shape[1]
    lengths = features.get("lengths", ())
    # GradCache hands every slice of a batch the lengths of the whole
    if len(lengths) != len(cu_seqlens) - 1 or sum(lengths) != total:
        return _batch_from_cu_seqlens(cu_seqlens, total, features).layout
    if cu_seqlens.device.type == "cpu":
        return PackedLayout.from_lengths(lengths)
    return PackedLayout(cu_seqlens, total, tuple(lengths), max(lengths))


def _batch_from_cu_seqlens(cu_seqlens: Tensor, total: int, kwargs: Mapping[str, Any]) -> _Batch:
    other, longest = kwargs.get("cu_seq_lens_k"), kwargs.get("max_length_q")
    if other is not None and other is not cu_seqlens and not torch.equal(other, cu_seqlens):
        raise NotImplementedError(
            "uncausal attention attends within a batch: cu_seq_lens_q and _k must agree"
        )
    if cu_seqlens.device.type == "cpu":
        return _Batch(PackedLayout.from_lengths(cu_seqlens.diff().tolist()), False)
    longest = longest if isinstance(longest, int) else None
    return _Batch(PackedLayout.from_cu_seqlens(cu_seqlens, total, longest), False)


def _find_batch(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict) -> _Batch | None:
    """The sequences of this batch, or None when every row of it is one full sequence."""
    rows, _, length, _ = query.shape
    layout, cu_seqlens, position_ids = (kwargs.get(x) for x in ("layout", "cu_seq_lens_q", "position_ids"))
    if layout is not None or cu_seqlens is not None:
        if rows != 1:
            raise ValueError(f"packed input has the shape (1, T), but this batch has {rows} rows")
        if layout is not None:
            return _Batch(layout, False)
        assert isinstance(cu_seqlens, Tensor)
        return _recent.get(cu_seqlens, lambda tensor: _batch_from_cu_seqlens(tensor, length, kwargs))
    if mask is not None:
        if mask.ndim != 2:
            raise NotImplementedError(
                f"uncausal attention takes a 2D padding mask, not {tuple(mask.shape)}; use sdpa or eager"
            )
        if length != key.shape[2]:
            raise NotImplementedError(
                f"uncausal attention keeps no cache of padded keys ({length} queries, {key.shape[2]} keys); "
                "pass use_cache=False"
            )
        return _recent.get(mask, _batch_from_mask)
    if position_ids is not None and rows == 1 and position_ids.shape == (1, length) == (1, key.shape[2]):
        if torch.compiler.is_compiling():  # no graph depends on what they hold: they must be one sequence's
            torch._assert_async((position_ids.diff() == 1).all(), "compiled, a packed batch needs a layout")
            return None
        return _recent.get(position_ids, _batch_from_position_ids)
    return None


def _window_size(sliding_window: int | None, causal: bool, max_seqlen: int | None) -> tuple[int, int]:
    """Windows as the library counts: with the token itself when causal, without it on either side if not."""
    if sliding_window is None or (max_seqlen is not None and sliding_window >= max_seqlen):
        return (-1, -1)
    return (sliding_window - 1, 0) if causal else (sliding_window, sliding_window)


def uncausal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attends with the packed kernel; called by transformers for every layer of a model set to "uncausal".

    Args:
        module: the attention layer; causal unless `is_causal`, `module.is_causal` or its config is false.
        query: (B, H, L, D).
        key: (B, HK, L, D), heads not repeated.
        value: (B, HK, L, DV) with DV <= D.
        attention_mask: (B, L) bool, true at real tokens, or None.
        dropout: probability; the library passes 0 outside training.
        sliding_window: tokens seen to the left (causal) or on either side (bidirectional).
        s_aux: (H,) attention sinks: a logit per head that takes part in the softmax and carries no value.
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `position_ids`, and our own `layout`.

    Returns:
        (B, L, H, DV) and None: attention weights are never formed. Padding positions hold zeros.

    Raises:
        NotImplementedError: a position bias, a paged cache, or a mask that is not a padding mask.
    """
    for name in ("position_bias", "head_mask", "cache", "block_table"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"uncausal attention does not support {name}; use sdpa or eager")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(is_causal) and getattr(getattr(module, "config", None), "is_causal", True) is not False
    head_dim, width = query.shape[-1], value.shape[-1]
    if isinstance(attention_mask, Tensor):
        sliding_window = getattr(attention_mask, _WINDOW, sliding_window)
        attention_mask = None if getattr(attention_mask, _FULL, False) else attention_mask
    batch = _find_batch(query, key, attention_mask, kwargs)
    max_seqlen = batch.layout.max_seqlen if batch else key.shape[2]
    options: dict[str, Any] = dict(
        dropout_p=dropout,
        softmax_scale=head_dim**-0.5 if scaling is None else scaling,
        causal=causal,
        window_size=_window_size(sliding_window, causal, max_seqlen),
        softcap=softcap or 0.0,
        return_attn_probs=s_aux is not None,
    )
    if torch.is_autocast_enabled(query.device.type):  # which leaves rotated queries and keys in fp32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) if x.dtype != torch.float64 else x for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, L, H, D)
    if width < head_dim:  # multi-head latent attention; the kernel wants one head dimension
        v = pad(v, (0, head_dim - width))
    if batch is None:
        return _with_sinks(flash_attn_func(q, k, v, **options), s_aux)[..., :width], None

    if batch.has_gaps and options["window_size"] != (-1, -1):
        raise NotImplementedError(
            "uncausal attention has no sliding window across padding between real tokens"
        )
    layout = batch.layout
    q, k, v = (pack(x, layout)[0] if batch.padded else x.squeeze(0) for x in (q, k, v))  # (T, H, D)
    lengths = (layout.cu_seqlens, layout.cu_seqlens, max_seqlen, max_seqlen)
    out = _with_sinks(flash_attn_varlen_func(q, k, v, *lengths, **options, layout=layout), s_aux)[..., :width]
    return (unpack(out, layout) if batch.padded else out.unsqueeze(0)), None


def _with_sinks(result: Any, sinks: Tensor | None) -> Tensor:
    """Scales each row by exp(lse) / (exp(lse) + exp(sink)): the effect of one more logit in the softmax."""
    if sinks is None:
        return result
    out, lse = result[:2]  # (..., T, H, D), (..., H, T)
    share = torch.sigmoid(lse.float() - sinks.float()[:, None]).transpose(-1, -2)
    return out * share.unsqueeze(-1).to(out.dtype)


def uncausal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """Hands the padding mask to the attention function; called by transformers once per batch.

    Without a mask function of its own an attention function silently attends padding.

    Returns:
        (B, L) bool, true at real tokens, or None when nothing is padded and no window cuts the sequences.

    Raises:
        NotImplementedError: the model asks for a pattern other than causal, bidirectional or sliding window.
    """
    if use_vmap or getattr(mask_function, "__name__", "") == "or_mask":  # torch.compile reads no __qualname__
        raise NotImplementedError(
            "uncausal attention does not support masks with an overlay; use sdpa or eager"
        )
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise NotImplementedError("uncausal attention does not support chunked attention; use sdpa or eager")
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:]
        attention_mask = None if attention_mask.all() else attention_mask
    if local_size is not None and local_size < kv_length:
        # Some models leave the window to the mask and do not tell the attention function.
        full = attention_mask is None
        if full:
            attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        setattr(attention_mask, _WINDOW, local_size)
        setattr(attention_mask, _FULL, full)
    return attention_mask


def assert_packs(model: nn.Module) -> None:
    """Runs a short padded batch, for a model whose attention has no form here.

    Raises:
        NotImplementedError: it asks for what the packed attention lacks, or computes attention by itself
            whatever it is told (alibi, mostly).
    """
    _, decoder = find_decoder(model)
    if not decoder._can_set_attn_implementation():
        raise NotImplementedError(f"{type(decoder).__name__} cannot use {NAME} attention: take eager or sdpa")
    ids = torch.ones(2, 6, dtype=torch.long, device=next(decoder.parameters()).device)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    training = decoder.training
    try:
        with torch.inference_mode():
            decoder.eval()(input_ids=ids, attention_mask=mask)
    finally:
        decoder.train(training)


AttentionInterface.register(NAME, uncausal_attention)
AttentionMaskInterface.register(NAME, uncausal_mask)
