"""flash-attn's `bert_padding`, its names and tuples: padded batches to packed tokens and back.

In code of one's own `pack` and `unpack` of packing.py are shorter: a layout carries what these tuples hold.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drop the padding of a batch.

    Args:
        hidden_states: (B, L, ...).
        attention_mask: (B, L), 1 or True at tokens.
        unused_mask: (B, L), 1 or True at places that are kept, but hold no token.

    Returns:
        Packed states (T, ...), their places in the flattened batch (T,) int64, cu_seqlens (B + 1,) int32, the
        greatest length, and the number of tokens of each sequence (B,) int32, unused places left out.
    """
    if hidden_states.shape[:2] != attention_mask.shape:
        expected, got = tuple(hidden_states.shape[:2]), tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must be (B, L) = {expected}, got {got}")
    used = attention_mask.sum(-1, dtype=torch.int32)
    kept = attention_mask != 0 if unused_mask is None else (attention_mask + unused_mask) != 0
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if len(lengths) else 0
    cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put packed states (T, ...) back into (batch, seqlen, ...), zeros elsewhere: undoes `unpad_input`."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Return the rows x[indices], (len(indices), ...); differentiable."""
    return x.index_select(0, indices)
