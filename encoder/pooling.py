"""Pooling of packed hidden states: mean, weighted mean, last token, and NV-Embed's latent attention layer."""

import torch
from torch import Tensor

PACKED_MODES = ("mean", "weightedmean", "lasttoken")


def pool_packed(
    hidden: Tensor, cu_seqlens: Tensor, mode: str = "mean", prompt_lengths: int | Tensor | None = None
) -> Tensor:
    """Pool packed token states into one vector a sequence, as sentence-transformers does on padded ones.

    Its `Pooling` also reads packed states, but knows one prompt length for the whole batch and answers a
    sequence without tokens with zeros or with its neighbour's last token.

    Args:
        hidden: (T, d) floating, the tokens of all sequences in order; half precision is summed in fp32.
        cu_seqlens: (B + 1,) integer, cumulative lengths from 0 to T; kept on the CPU they cost no
            synchronisation.
        mode: "mean", "weightedmean" (SGPT, arXiv 2202.08904: weights 1, 2, ... by position) or "lasttoken".
        prompt_lengths: leading tokens of each sequence to leave out, one number or (B,); positions still
            count from the sequence's own start.

    Returns:
        (B, d) in the dtype of `hidden`.

    Raises:
        ValueError: for an unknown mode, lengths that do not add up, or a sequence with no token to pool.
    """
    if mode not in PACKED_MODES:
        raise ValueError(f"mode must be one of {PACKED_MODES}, got {mode!r}")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (tokens, features), got {tuple(hidden.shape)}")
    lengths, skipped = checked_lengths(cu_seqlens, hidden.shape[0], prompt_lengths)
    if mode == "lasttoken":
        return hidden[(cu_seqlens[1:] - 1).to(hidden.device)]

    dtype = torch.float32 if hidden.dtype in (torch.float16, torch.bfloat16) else hidden.dtype
    weights = token_weights(cu_seqlens, hidden.shape[0], skipped, mode).to(hidden.device, dtype)
    lengths = lengths.to(hidden.device)
    # segment_reduce adds in the order of the tokens on every device; index_add would use atomics on a GPU.
    total = torch.segment_reduce(hidden * weights[:, None], "sum", lengths=lengths, axis=0)
    return (total / torch.segment_reduce(weights, "sum", lengths=lengths)[:, None]).to(hidden.dtype)


def checked_lengths(
    cu_seqlens: Tensor, tokens: int, prompt_lengths: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turn cumulative lengths into lengths, and make sure that every sequence keeps a token to pool.

    Args:
        cu_seqlens: (B + 1,) integer, cumulative lengths.
        tokens: T, which the last entry must equal.
        prompt_lengths: leading tokens left out, one number or (B,).

    Returns:
        Lengths (B,) and prompt lengths (B,), both int64 on the device of `cu_seqlens`.

    Raises:
        ValueError: naming the sequence that has no token, or none behind its prompt.
    """
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    skipped = (
        torch.as_tensor(0 if prompt_lengths is None else prompt_lengths).to(cu_seqlens).expand_as(lengths)
    )
    ends_right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens)
    if not bool(ends_right & (lengths > skipped).all()):
        if not bool(ends_right):
            raise ValueError(f"cu_seqlens must run from 0 to {tokens}, got {cu_seqlens.tolist()}")
        row = int((lengths <= skipped).nonzero()[0])
        counts = f"{int(lengths[row])} tokens, {int(skipped[row])} of them prompt"
        raise ValueError(f"sequence {row} has no token to pool: {counts}")
    return lengths, skipped


def token_weights(cu_seqlens: Tensor, tokens: int, skipped: Tensor, mode: str = "mean") -> Tensor:
    """Give each packed token its weight in the mean: 0 in the prompt, else 1 or its position counted from 1.

    Args:
        cu_seqlens: (B + 1,) integer, cumulative lengths.
        tokens: T.
        skipped: (B,) leading tokens of each sequence without weight.
        mode: "mean" or "weightedmean".

    Returns:
        (T,) int64.
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    repeat = lambda values: torch.repeat_interleave(values, lengths, output_size=tokens)  # noqa: E731
    position = torch.arange(tokens, device=cu_seqlens.device) - repeat(starts)
    weights = position + 1 if mode == "weightedmean" else torch.ones_like(position)
    return weights * (position >= repeat(skipped))
