"""Packed batches: sequences laid end to end, without padding, and the maps that kernels walk over them.

Layout legend: B sequences, L padded length, T packed tokens, G query heads that share one key head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class PackedLayout:
    """One batch of packed sequences, built once and shared by every layer, forward and backward.

    Args:
        cu_seqlens: (B + 1,) int32, offsets of the sequences; begins with 0 and ends with T.
        total: T, the number of packed tokens.
        lengths: the B lengths as Python integers, when the host knows them.
        max_seqlen: the greatest length, when the host knows it.
        equal_lengths: whether every length is max_seqlen, as in a dense batch.
        indices: (T,) int64, place of every packed token in the flattened (B * L) padded batch.
        padded_shape: (B, L) of the padded batch that `indices` refers to.
    """

    cu_seqlens: Tensor
    total: int
    lengths: tuple[int, ...] | None = None
    max_seqlen: int | None = None
    equal_lengths: bool = False
    indices: Tensor | None = None
    padded_shape: tuple[int, int] | None = None
    _maps: dict[tuple, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "PackedLayout":
        """Lay out sequences of known lengths; fits right-padded batches of max(lengths) columns."""
        lengths = tuple(int(n) for n in lengths)
        if any(n < 0 for n in lengths):
            raise ValueError(f"lengths must not be negative, got {min(lengths)}")
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        offsets[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        longest = max((0, *lengths))  # dynamo knows no default=
        starts = torch.arange(len(lengths)) * longest - offsets[:-1]
        indices = starts.repeat_interleave(offsets.diff()) + torch.arange(int(offsets[-1]))
        return cls(
            cu_seqlens=offsets.to(device, torch.int32),
            total=int(offsets[-1]),
            lengths=lengths,
            max_seqlen=longest,
            indices=indices.to(device),
            padded_shape=(len(lengths), longest),
        )

    @classmethod
    def from_shape(cls, batch: int, length: int, device: torch.device | str = "cpu") -> "PackedLayout":
        """Lay out a dense batch: `batch` sequences of one length."""
        cu_seqlens = torch.arange(batch + 1, device=device, dtype=torch.int32) * length
        return cls(cu_seqlens, batch * length, max_seqlen=length, equal_lengths=True)

    @classmethod
    def from_mask(cls, attention_mask: Tensor) -> "PackedLayout":
        """Lay out the tokens where attention_mask (B, L) is not zero, whichever side is padded."""
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (B, L), got {tuple(attention_mask.shape)}")
        mask = attention_mask != 0
        counts = mask.sum(1)
        cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
        cu_seqlens[1:] = counts.cumsum(0)
        indices = mask.flatten().nonzero().squeeze(1)
        lengths = tuple(counts.tolist())  # nonzero has waited for the device already
        shape = (mask.shape[0], mask.shape[1])
        return cls(cu_seqlens, len(indices), lengths, max((0, *lengths)), indices=indices, padded_shape=shape)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, total: int, max_seqlen: int | None = None) -> "PackedLayout":
        """Wrap offsets that are already on the device, without waiting for them."""
        return cls(cu_seqlens.to(torch.int32), total, max_seqlen=max_seqlen)

    @property
    def batch_size(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def sequence_of_token(self) -> Tensor:
        """Return (T,) int32, the sequence that every packed token belongs to."""
        if ("sequence",) not in self._maps:
            tokens = torch.arange(self.total, device=self.cu_seqlens.device, dtype=torch.int32)
            self._maps["sequence",] = torch.searchsorted(
                self.cu_seqlens[1:], tokens, right=True, out_int32=True
            )
        return self._maps["sequence",]

    def tiles(self, block: int, group: int = 1, align: int = 1) -> Tensor:
        """Return the tile map: (N, 2) int32, first and last + 1 row of every tile, longest sequences first.

        A row is a token times `group` heads. A sequence of at least `block` rows has tiles of its own; a run
        of shorter neighbours is cut every `block` rows, so that several of them share a tile. A tile lies in
        `block` rows from a multiple of `align` on. Built on the device without waiting for it: where the host
        doesn't know the lengths, N is an upper bound and the tiles in excess are empty, (0, 0).
        """
        key = ("tiles", block, group, align)
        if key not in self._maps:
            count = self.count_tiles(block, group, align)
            self._maps[key] = build_tiles(self.cu_seqlens, count, block, group, align)
        return self._maps[key]

    def count_tiles(self, block: int, group: int = 1, align: int = 1) -> int:
        """Return the number of tiles, an upper bound where the host doesn't know the lengths."""
        if self.lengths is not None:
            return _count_tiles(self.lengths, block, group, align)
        rows = self.total * group
        if self.equal_lengths and self.max_seqlen is not None:
            own = self.max_seqlen * group
            lost = 0 if own % align == 0 else align - 1
            return -(-rows // block) if own < block else self.batch_size * -(-(own + lost) // block)
        owners = min(self.batch_size, 2 * (rows // block) + 1)
        return (rows + owners * (align - 1)) // block + owners


def _count_tiles(lengths: tuple[int, ...], block: int, group: int, align: int) -> int:
    def tiles(begin: int, end: int) -> int:
        return -(-(end - begin // align * align) // block) if end > begin else 0

    count = run = end = 0  # run: where the run of short sequences begins
    for rows in (n * group for n in lengths):
        begin, end = end, end + rows
        if rows >= block:
            count += tiles(run, begin) + tiles(begin, end)
            run = end
    return count + tiles(run, end)


def build_tiles(cu_seqlens: Tensor, count: int, block: int, group: int, align: int = 1) -> Tensor:
    """Build the (count, 2) int32 tile map of `PackedLayout.tiles` with device operations alone."""
    offsets = cu_seqlens.long() * group
    begin, length = offsets[:-1], offsets.diff()
    if count == 0 or len(begin) == 0:
        return torch.zeros(count, 2, dtype=torch.int32, device=cu_seqlens.device)
    alone = length >= block
    # Sequences that open a segment: every long one, and the first of each run of short ones.
    opens = alone.clone()
    opens[0] = True
    opens[1:] |= alone[:-1]
    # A segment ends where the next one opens: the smallest opening offset to the right.
    later = torch.where(opens, begin, offsets[-1]).roll(-1)
    later[-1] = offsets[-1]
    end = later.flip(0).cummin(0).values.flip(0)
    base = begin // align * align
    tiles = torch.where(opens & (end > begin), (end - base + block - 1) // block, 0)
    last = tiles.cumsum(0)
    index = torch.arange(count, device=cu_seqlens.device)
    owner = torch.searchsorted(last, index, right=True)
    valid = owner < len(begin)
    owner = owner.clamp_max(len(begin) - 1)
    place = base[owner] + (index - (last - tiles)[owner]) * block
    first_row, last_row = torch.maximum(place, begin[owner]), torch.minimum(place + block, end[owner])
    rows = torch.stack([first_row, last_row], 1) * valid[:, None]
    cost = torch.where(valid, length[owner], -1)
    return rows[cost.argsort(descending=True, stable=True)].to(torch.int32)


def pack(x: Tensor, attention_mask: Tensor | PackedLayout) -> tuple[Tensor, PackedLayout]:
    """Drop the padding of a batch.

    Args:
        x: (B, L, ...) padded batch.
        attention_mask: (B, L), non-zero on tokens; or the layout that an earlier call returned.

    Returns:
        (T, ...) packed tokens, and the layout, which carries cu_seqlens, max_seqlen and the way back.
    """
    layout = (
        attention_mask if isinstance(attention_mask, PackedLayout) else PackedLayout.from_mask(attention_mask)
    )
    if layout.indices is None or tuple(x.shape[:2]) != layout.padded_shape:
        raise ValueError(f"x must be (B, L, ...) with (B, L) = {layout.padded_shape}, got {tuple(x.shape)}")
    return x.flatten(0, 1).index_select(0, layout.indices), layout


def unpack(packed: Tensor, layout: Tensor | PackedLayout, padding_value: float = 0.0) -> Tensor:
    """Put packed tokens back into a padded batch, the inverse of `pack`.

    Args:
        packed: (T, ...) packed tokens.
        layout: what `pack` returned, or the attention_mask (B, L).
        padding_value: value of the padded places.

    Returns:
        (B, L, ...) padded batch.
    """
    layout = layout if isinstance(layout, PackedLayout) else PackedLayout.from_mask(layout)
    if layout.indices is None or layout.padded_shape is None:
        raise ValueError("layout was built from cu_seqlens alone and doesn't know the padded batch")
    if packed.shape[0] != layout.total:
        raise ValueError(f"packed must have {layout.total} rows, got {packed.shape[0]}")
    batch, length = layout.padded_shape
    padded = packed.new_full((batch * length, *packed.shape[1:]), padding_value)
    return padded.index_copy(0, layout.indices, packed).unflatten(0, (batch, length))
