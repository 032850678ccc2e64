"""Packed batches: sequences laid end to end, without padding, and the maps that kernels walk over them.

Layout legend: B sequences, L padded length, T packed tokens, G query heads that share one key head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uncausal.kernels.launch import traced

_KEPT = 16  # layouts of batches that are found again


class TileMaps(NamedTuple):
    """What the programs of a batch's launches work on, as `PackedLayout` makes it.

    A kernel is launched twice where a batch holds both long sequences, which have large tiles of their own,
    and short ones, which share small tiles; None where it holds no such sequences. All are int32: the
    sequence of every token, and (N, 2) tiles. The keys' side and dQ are for backward alone.
    """

    sequences_q: Tensor | None = None  # (T,)
    fwd_long: Tensor | None = None  # rows of queries
    fwd_short: Tensor | None = None
    dq_long: Tensor | None = None
    dq_short: Tensor | None = None
    sequences_k: Tensor | None = None  # (Tk,)
    dkv_long: Tensor | None = None  # key tokens
    dkv_short: Tensor | None = None


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
    _maps: dict[tuple, Any] = field(default_factory=dict, repr=False, compare=False)

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

    @classmethod
    def recalled_shape(cls, batch: int, length: int, like: Tensor) -> "PackedLayout":
        """Return `from_shape` on a tensor's device, the same one for the same shape, with the maps it has."""
        device = like.device
        if traced() or type(like) is not Tensor:
            return cls.from_shape(batch, length, device)
        return _recalled((batch, length, device), device, lambda: cls.from_shape(batch, length, device))

    @classmethod
    def recalled(cls, cu_seqlens: Tensor, total: int, max_seqlen: int | None = None) -> "PackedLayout":
        """Return `from_cu_seqlens`, the same one for the same tensor unchanged, with the maps it has.

        What autograd would not notice is not noticed here either: collectives and other kernels that fill a
        tensor again without torch, or writing through `.data` and numpy.
        """
        plain = type(cu_seqlens) is Tensor and cu_seqlens.dtype == torch.int32
        # an inference tensor counts no versions: nothing tells that it was filled again
        if traced() or not plain or cu_seqlens.is_inference():
            return cls.from_cu_seqlens(cu_seqlens, total, max_seqlen)
        # a kept layout holds its offsets, so that no other tensor gets their id
        state = cu_seqlens._version, cu_seqlens.data_ptr(), len(cu_seqlens)
        key = (id(cu_seqlens), *state, total, max_seqlen)
        return _recalled(key, cu_seqlens.device, lambda: cls.from_cu_seqlens(cu_seqlens, total, max_seqlen))

    @property
    def batch_size(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def sequence_of_token(self) -> Tensor:
        """Return (T,) int32, the sequence that every packed token belongs to."""

        def build() -> Tensor:
            tokens = torch.arange(self.total, device=self.cu_seqlens.device, dtype=torch.int32)
            return torch.searchsorted(self.cu_seqlens[1:], tokens, right=True, out_int32=True)

        return self.kept(("sequence",), build)

    def kept(self, key: tuple, build: Callable[[], Any]) -> Any:
        """Return what `build` makes of this batch, made once for each key and, on a GPU, stream.

        In a graph that is captured it is made anew: the graph makes it again at every replay.
        """
        device = self.cu_seqlens.device
        keyed = _on_stream(key, device) if device.type == "cuda" else key
        if keyed is None or keyed not in self._maps:
            # no inference tensor may be saved for backward, should the layout serve training later
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                found = build()
            if keyed is None:
                return found
            self._maps[keyed] = found
        return self._maps[keyed]

    def tiles(self, block: int, group: int = 1, align: int = 1) -> Tensor:
        """Return the tile map: (N, 2) int32, first and last + 1 row of every tile, longest sequences first.

        A row is a token times `group` heads. A sequence of at least `block` rows has tiles of its own; a run
        of shorter neighbours is cut every `block` rows, so that several of them share a tile. A tile lies in
        `block` rows from a multiple of `align` on. Built on the device without waiting for it: where the host
        doesn't know the lengths, N is an upper bound and the tiles in excess are empty, (0, 0).
        """
        return self._tiles(block, group, align, None)

    def split_tiles(
        self, limit: int, large: int, small: int, group: int = 1, align: int = 1
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the tiles of long sequences, from `limit` tokens on, of `large` rows, and small ones.

        Short sequences have small tiles as in `tiles`, where there are both kinds also what a long one leaves
        behind its last full large tile, if a small one holds it. None where there are no such tiles as far as
        the host knows; a maximal length that is too small costs speed alone.
        """
        has_long, has_short = self._has(limit)
        both = Split(limit, large, small) if has_long and has_short else None
        return (
            self._tiles(large, group, align, both, long=both is not None) if has_long else None,
            self._tiles(small, group, align, both) if has_short else None,
        )

    def _has(self, limit: int) -> tuple[bool, bool]:
        """Whether there may be sequences of at least `limit` tokens, and whether shorter ones."""
        if self.lengths is not None:
            return any(n >= limit for n in self.lengths), any(0 < n < limit for n in self.lengths)
        if self.max_seqlen is not None and (self.equal_lengths or self.max_seqlen < limit):
            return self.max_seqlen >= limit, self.max_seqlen < limit
        return True, True

    def _tiles(
        self, block: int, group: int, align: int, split: "Split | None", *, long: bool = False
    ) -> Tensor:
        cut = block, group, align, split, long
        count = self._count_tiles
        return self.kept(("tiles", *cut), lambda: build_tiles(self.cu_seqlens, count(*cut), *cut))

    def _count_tiles(self, block: int, group: int, align: int, split: "Split | None", long: bool) -> int:
        """Return the number of tiles, an upper bound where the host doesn't know the lengths."""
        if self.lengths is not None:
            cuts = _segments(self.lengths, block, group, align, split, long)
            return sum(-(-(end - begin // align * align) // block) for begin, end in cuts if end > begin)
        rows = self.total * group
        if split is None and self.equal_lengths and self.max_seqlen is not None:
            own = self.max_seqlen * group
            lost = 0 if own % align == 0 else align - 1
            return -(-rows // block) if own < block else self.batch_size * -(-(own + lost) // block)
        # what is cut as a whole: a sequence of a block's rows or more, or a run between such
        owners = min(self.batch_size, 2 * (rows // block) + 1)
        longs = min(self.batch_size, self.total // split.limit) if split else 0
        if long:
            return (rows + longs * (align - 1)) // block + longs
        return (rows + owners * (align - 1)) // block + owners + longs


class Split(NamedTuple):
    """How a batch of long and short sequences is cut."""

    limit: int  # tokens from which on a sequence is long
    large: int  # rows
    small: int

    def whole(self, span: Any) -> Any:
        """Rows of a long sequence that large tiles take: what a small one holds besides is left."""
        spare = self.small if self.small < self.large else 0
        return (span + self.large - 1 - spare) // self.large * self.large


_recent: dict[tuple, PackedLayout] = {}


def _on_stream(key: tuple, device: torch.device) -> tuple | None:
    """The key of what is kept for one stream of a GPU, as others would not wait for it.

    None while a graph is captured: it would replay the maps of one batch, and what it makes is not there yet.
    """
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return key
    if torch.cuda.is_current_stream_capturing():
        return None
    return *key, torch.cuda.current_stream(device).cuda_stream


def _recalled(key: tuple, device: torch.device, build: Callable[[], PackedLayout]) -> PackedLayout:
    """Find one of the last layouts again."""
    keyed = _on_stream(key, device) if device.type == "cuda" else key
    if keyed is None:
        return build()
    layout = _recent.pop(keyed, None)
    if layout is None:
        with torch.inference_mode(False):  # it may serve training later
            layout = build()
    _recent[keyed] = layout  # the latest comes last
    while len(_recent) > _KEPT:
        _recent.pop(next(iter(_recent)), None)
    return layout


def _segments(
    lengths: tuple[int, ...], block: int, group: int, align: int, split: Split | None, long: bool
) -> Iterator[tuple[int, int]]:
    """Yield the rows that are cut as a whole: those of a sequence, or of a run of short ones."""
    run = end = 0  # run: where the run of short sequences begins
    for n in lengths:
        begin, end = end, end + n * group
        if split is not None and n >= split.limit:
            base = begin // align * align
            whole = min(base + split.whole(end - base), end)
            yield from [(begin, whole)] if long else [(run, begin), (whole, end)]
            run = end
        elif n * group >= block and not long:
            yield from [(run, begin), (begin, end)]
            run = end
    if not long:
        yield run, end


def build_tiles(
    cu_seqlens: Tensor,
    count: int,
    block: int,
    group: int,
    align: int = 1,
    split: Split | None = None,
    long: bool = False,
) -> Tensor:
    """Build the (count, 2) int32 tile map of a `PackedLayout` with device operations alone."""
    offsets = cu_seqlens.long() * group
    begin, length = offsets[:-1], offsets.diff()
    if count == 0 or len(begin) == 0:
        return torch.zeros(count, 2, dtype=torch.int32, device=cu_seqlens.device)
    is_long = length >= split.limit * group if split is not None else torch.zeros_like(length).bool()
    alone = (length >= block) | is_long
    # Sequences that open a segment: every long one, and the first of each run of short ones.
    opens = alone.clone()
    opens[0] = True
    opens[1:] |= alone[:-1]
    # A segment ends where the next one opens: the smallest opening offset to the right.
    later = torch.where(opens, begin, offsets[-1]).roll(-1)
    later[-1] = offsets[-1]
    end = later.flip(0).cummin(0).values.flip(0)
    base = begin // align * align
    if split is not None:
        whole = torch.minimum(base + split.whole(end - base), end)
        if long:
            end = torch.where(is_long, whole, begin)
        else:
            begin = torch.where(is_long, whole, begin)
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
