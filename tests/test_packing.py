"""Packed layouts: the way there and back, and tile maps that cover every row once."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from uncausal.kernels import packing
from uncausal.kernels.packing import PackedLayout, pack, unpack


def test_pack_unpack_both_paddings():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    x = torch.randn(4, 4, 3, requires_grad=True)
    packed, layout = pack(x, mask)
    assert layout.cu_seqlens.tolist() == [0, 2, 2, 4, 8]
    assert layout.lengths == (2, 0, 2, 4) and layout.max_seqlen == 4
    assert torch.equal(packed, x[mask.bool()])
    back = unpack(packed, layout, padding_value=7.0)
    assert torch.equal(back, torch.where(mask.bool()[..., None], x, 7.0))
    assert torch.equal(unpack(packed, mask), unpack(packed, layout))
    back.square().sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 2 * x * mask[..., None])


def test_from_lengths_packs_right_padded_batches():
    layout = PackedLayout.from_lengths([3, 0, 1])
    x = torch.arange(9).view(3, 3)
    assert pack(x, layout)[0].tolist() == [0, 1, 2, 6]
    assert layout.sequence_of_token().tolist() == [0, 0, 0, 2]


def test_errors_show_what_came():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4, 1\)"):
        pack(torch.zeros(2, 4, 1), torch.ones(2, 3))
    with pytest.raises(ValueError, match="5 rows, got 4"):
        unpack(torch.zeros(4, 1), PackedLayout.from_lengths([2, 3]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.one_of(st.integers(0, 5), st.integers(0, 70)), min_size=1, max_size=40),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([1, 8]),
)
def test_tiles_cover_every_row_once(lengths, block, group, align):
    known = PackedLayout.from_lengths(lengths)
    unknown = PackedLayout.from_cu_seqlens(known.cu_seqlens, known.total)
    tiles = known.tiles(block, group, align)
    assert tiles is known.tiles(block, group, align)
    bounded = unknown.tiles(block, group, align)
    used = bounded[bounded[:, 1] > bounded[:, 0]]
    assert torch.equal(
        tiles, used
    )  # exact without empty tiles when the lengths are known, the same ones otherwise
    assert len(bounded) <= known.total * group // block + 2 * len(lengths) + 1

    rows = torch.cat([torch.arange(a, b) for a, b in tiles.tolist()] or [torch.zeros(0)])
    assert sorted(rows.tolist()) == list(range(known.total * group))
    assert all(0 < b - a and b - a // align * align <= block for a, b in tiles.tolist())
    sequence = known.sequence_of_token()
    sizes = []
    for a, b in tiles.tolist():
        members = sequence[a // group : (b - 1) // group + 1].unique().tolist()
        if len(members) > 1:  # only sequences shorter than a tile share one
            assert all(lengths[i] * group < block for i in members)
        sizes.append(lengths[members[0]] * group if len(members) == 1 else 0)
    long = [n for n in sizes if n >= block]
    assert long == sorted(long, reverse=True)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.one_of(st.integers(0, 5), st.integers(0, 150)), min_size=1, max_size=20),
    st.sampled_from([(64, 16), (64, 64), (32, 64)]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 8]),
)
def test_split_tiles_cover_every_row_once(lengths, blocks, group, align):
    """Sequences from 64 tokens on have large tiles of their own, what they leave small ones."""
    large, small = blocks
    known = PackedLayout.from_lengths(lengths)
    unknown = PackedLayout.from_cu_seqlens(known.cu_seqlens, known.total)
    parts = known.split_tiles(64, large, small, group, align)
    assert [x is not None for x in parts] == [max(lengths) >= 64, any(0 < n < 64 for n in lengths)]
    bounded = unknown.split_tiles(64, large, small, group, align)
    if None not in parts:
        assert all(torch.equal(x[x[:, 1] > x[:, 0]], y) for x, y in zip(bounded, parts, strict=True))
    for found in (parts, bounded):
        tiles = [part[part[:, 1] > part[:, 0]] for part in found if part is not None]
        rows = torch.cat([torch.arange(a, b) for part in tiles for a, b in part.tolist()] or [torch.zeros(0)])
        assert sorted(rows.tolist()) == list(range(known.total * group))
    sequence = known.sequence_of_token()
    for part, block in zip(parts, blocks, strict=True):
        for a, b in [] if part is None else part.tolist():
            members = sequence[a // group : (b - 1) // group + 1].unique().tolist()
            long = any(lengths[i] >= 64 for i in members)
            assert b - a // align * align <= block and (len(members) == 1 or not long)
            if part is parts[0]:  # a small tile would not have held it
                assert long and (None in parts or small >= large or b - a // align * align > small)


def test_a_layout_is_found_again_while_its_offsets_stay():
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    layout = PackedLayout.recalled(offsets, 9)
    assert PackedLayout.recalled(offsets, 9) is layout
    assert layout.tiles(16).tolist() == [[0, 9]]
    offsets.copy_(torch.tensor([0, 9, 9]))  # a buffer that is filled again
    again = PackedLayout.recalled(offsets, 9)
    assert again is not layout and again.sequence_of_token().tolist() == [0] * 9
    assert PackedLayout.recalled(offsets.clone(), 9) is not again
    with torch.inference_mode():
        counted = torch.tensor([0, 9], dtype=torch.int32)  # such tensors count no versions
    assert PackedLayout.recalled(counted, 9) is not PackedLayout.recalled(counted, 9)
    like = torch.ones(1)
    dense = PackedLayout.recalled_shape(2, 5, like)
    assert PackedLayout.recalled_shape(2, 5, like) is dense
    assert PackedLayout.recalled_shape(2, 6, like).total == 12
    with FakeTensorMode() as mode:  # neither may find the other's maps
        fake = PackedLayout.recalled_shape(2, 5, mode.from_tensor(like)).cu_seqlens
    assert isinstance(fake, FakeTensor) and PackedLayout.recalled_shape(2, 5, like) is dense
    assert PackedLayout.recalled(again.cu_seqlens, 9, 4) is not again  # of other tiles
    offsets.data = torch.tensor([0, 3, 9], dtype=torch.int32)
    assert PackedLayout.recalled(offsets, 9) is not again


def test_few_layouts_are_kept_and_none_of_a_graph_or_another_stream(monkeypatch):
    monkeypatch.setattr(packing, "_recent", {})
    device = torch.device("cuda")
    stream = SimpleNamespace(cuda_stream=1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.cuda_stream == 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def recalled(length: int) -> PackedLayout:
        return packing._recalled((length,), device, lambda: PackedLayout.from_lengths([length]))

    first = recalled(1)
    assert recalled(1) is first
    stream.cuda_stream = 2
    other = recalled(1)
    assert other is not first and recalled(1) is other
    stream.cuda_stream = 0  # capturing
    assert recalled(1) is not recalled(1)
    stream.cuda_stream = 1
    for length in range(2, 40):
        recalled(length)
    assert len(packing._recent) == 16 and recalled(1) is not first

    def made():
        return layout.kept(("key",), lambda: torch.ones(1))

    layout = PackedLayout(SimpleNamespace(device=device), 4)
    stream.cuda_stream = 1
    one = made()
    assert made() is one
    stream.cuda_stream = 2
    two = made()
    assert two is not one and made() is two
    stream.cuda_stream = 0  # capturing
    assert made() is not made()
    stream.cuda_stream = 1
    assert made() is one


def test_a_transform_does_not_leave_its_tensors_behind(monkeypatch):
    """Regression: functionalize left a wrapper as offsets, which failed every later call of the shape."""
    monkeypatch.setattr(packing, "_recent", {})
    torch.func.functionalize(lambda x: x + PackedLayout.recalled_shape(2, 5, x).cu_seqlens.sum())(
        torch.ones(1)
    )
    assert not packing._recent


def test_maps_made_in_inference_mode_serve_training():
    layout = PackedLayout.from_lengths([4, 5])
    with torch.inference_mode():
        dense = PackedLayout.recalled_shape(3, 7, torch.ones(1))
        made = [layout.sequence_of_token(), layout.tiles(16), dense.cu_seqlens]
    assert not any(x.is_inference() for x in made)


@pytest.mark.parametrize("length", [1, 37, 64, 100, 128])
@pytest.mark.parametrize("align", [1, 32])
def test_a_dense_batch_has_the_tiles_of_its_lengths(length, align):
    dense, known = PackedLayout.from_shape(5, length), PackedLayout.from_lengths([length] * 5)
    assert torch.equal(dense.cu_seqlens, known.cu_seqlens) and dense.total == known.total
    tiles = dense.tiles(64, 1, align)
    assert torch.equal(tiles[tiles[:, 1] > 0], known.tiles(64, 1, align))
    assert len(tiles) - len(known.tiles(64, 1, align)) <= (5 if length % align else 0)


@pytest.mark.parametrize("name", ["12 to 39", "64", "uniform", "long"])
def test_dropout_gives_few_keys_of_a_tile_away(name):
    """Regression: a tile of 64 keys took 32, so that its draws could begin at a multiple of 32."""
    generator = torch.Generator().manual_seed(0)
    low, high, bound = {"12 to 39": (12, 39, 0.95), "64": (64, 64, 0.8), "uniform": (64, 512, 0.8)}.get(
        name, (512, 1024, 0.9)
    )
    lengths = torch.randint(low, high + 1, (200,), generator=generator).tolist()
    layout = PackedLayout.from_lengths(lengths)
    assert layout.total / (64 * len(layout.tiles(64, 1, 32))) >= bound


def test_thousands_of_short_sequences_need_few_tiles():
    lengths = torch.randint(1, 41, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    layout = PackedLayout.from_lengths(lengths)
    assert len(layout.tiles(128)) == -(-layout.total // 128)
