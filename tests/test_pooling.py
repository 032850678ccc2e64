"""Packed pooling against sentence-transformers' own on padded states, and the latent attention module."""

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from uncausal.encoder.pooling import pool_packed

LENGTHS = [[7], [1, 64, 5], [31, 2, 1, 129]]
BOUND = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def packed_and_padded(lengths, dtype, side="right"):
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randn(n, 24, generator=generator, dtype=torch.float64).to(dtype) for n in lengths]
    padded = torch.full((len(rows), max(lengths), 24), 7.0, dtype=dtype)  # padding that would show in any sum
    mask = torch.zeros(padded.shape[:2], dtype=torch.long)
    for row, (values, n) in enumerate(zip(rows, lengths, strict=True)):
        span = slice(0, n) if side == "right" else slice(max(lengths) - n, None)
        padded[row, span], mask[row, span] = values, 1
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.cat(rows), cu_seqlens, padded, mask


@pytest.mark.parametrize("mode", ["mean", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_pool_packed_equals_padded(mode, dtype, side, lengths):
    hidden, cu_seqlens, padded, mask = packed_and_padded(lengths, dtype, side)
    features = {"token_embeddings": padded, "attention_mask": mask}
    expected = Pooling(24, mode)(features)["sentence_embedding"]
    actual = pool_packed(hidden, cu_seqlens, mode)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=BOUND[dtype], atol=BOUND[dtype])


@pytest.mark.parametrize("mode", ["mean", "weightedmean", "lasttoken"])
def test_pool_packed_without_prompt(mode):
    hidden, cu_seqlens, padded, mask = packed_and_padded([9, 4, 30], torch.float64)
    features = {"token_embeddings": padded, "attention_mask": mask, "prompt_length": 3}
    expected = Pooling(24, mode, include_prompt=False)(features)["sentence_embedding"]
    torch.testing.assert_close(pool_packed(hidden, cu_seqlens, mode, 3), expected)
    each = pool_packed(hidden, cu_seqlens, mode, torch.tensor([0, 3, 29]))
    torch.testing.assert_close(each[1], expected[1])
    torch.testing.assert_close(each[2], hidden[-1])


def test_pool_packed_gradient():
    hidden, cu_seqlens, _, _ = packed_and_padded([3, 1, 5], torch.float64)
    hidden.requires_grad_()
    for mode in ("mean", "weightedmean", "lasttoken"):
        assert torch.autograd.gradcheck(lambda h, mode=mode: pool_packed(h, cu_seqlens, mode, 0), hidden)


def test_pool_packed_names_the_empty_sequence():
    hidden = torch.randn(5, 4)
    with pytest.raises(ValueError, match="sequence 1 has no token"):
        pool_packed(hidden, torch.tensor([0, 3, 3, 5]), "lasttoken")
    with pytest.raises(ValueError, match="sequence 1 has no token.*2 tokens, 2 of them prompt"):
        pool_packed(hidden, torch.tensor([0, 3, 5]), "mean", 2)
    with pytest.raises(ValueError, match="from 0 to 5"):
        pool_packed(hidden, torch.tensor([0, 3]), "mean")
    with pytest.raises(ValueError, match="mode"):
        pool_packed(hidden, torch.tensor([0, 5]), "middle")
