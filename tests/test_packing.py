"""Packed layouts: the way there and back, and tile maps that cover every row once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
