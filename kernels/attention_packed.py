"""flash-attn's forms of attention whose projections lie in one tensor: each takes views of it apart.

What stands behind the tensors is as in `flash_attn_func` and `flash_attn_varlen_func`, in flash-attn's order.
"""

from torch import Tensor

from uncausal.kernels.attention import flash_attn_func, flash_attn_varlen_func


def flash_attn_qkvpacked_func(
    qkv: Tensor,
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
    """Attend within each sequence of a dense batch, from qkv (B, L, 3, H, D); see `flash_attn_func`."""
    q, k, v = _parts("qkv", qkv, 5, 3)
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
    return flash_attn_func(q, k, v, *options, return_attn_probs, dropout_seed=dropout_seed, backend=backend)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
    """Attend within each sequence, q (B, L, H, D) and kv (B, Lk, 2, HK, D); see `flash_attn_func`."""
    k, v = _parts("kv", kv, 5, 2)
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
    return flash_attn_func(q, k, v, *options, return_attn_probs, dropout_seed=dropout_seed, backend=backend)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
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
    """Attend within each sequence of a packed batch, from qkv (T, 3, H, D); see `flash_attn_varlen_func`."""
    q, k, v = _parts("qkv", qkv, 4, 3)
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
    return flash_attn_varlen_func(
        q, k, v, *lengths, *options, return_attn_probs, dropout_seed=dropout_seed, backend=backend
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
    *,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
):
    """Attend within each sequence, q (T, H, D) and kv (Tk, 2, HK, D); see `flash_attn_varlen_func`."""
    k, v = _parts("kv", kv, 4, 2)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
    return flash_attn_varlen_func(
        q, k, v, *lengths, *options, return_attn_probs, dropout_seed=dropout_seed, backend=backend
    )


def _parts(name: str, packed: Tensor, dims: int, count: int) -> tuple[Tensor, ...]:
    if packed.dim() != dims or packed.shape[-3] != count:
        raise ValueError(f"{name} must be (..., {count}, heads, D) of {dims} axes, got {tuple(packed.shape)}")
    return packed.unbind(-3)
