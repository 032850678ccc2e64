"""flash-attn's padding helpers: the same tuples, there and back."""

import pytest
import torch

from uncausal.kernels.bert_padding import index_first_axis, pad_input, unpad_input

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=["int", "bool"])
def test_there_and_back(dtype):
    x = torch.randn(4, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, MASK.to(dtype))
    assert torch.equal(packed, x[MASK.bool()])
    assert indices.tolist() == [0, 1, 2, 8, 12, 13, 14, 15] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 3, 3, 4, 8] and cu_seqlens.dtype == torch.int32
    assert longest == 4 and isinstance(longest, int)
    assert used.tolist() == [3, 0, 1, 4] and used.dtype == torch.int32
    back = pad_input(packed, indices, 4, 4)
    assert torch.equal(back, x * MASK[..., None, None])
    back.square().sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 2 * x * MASK[..., None, None])


def test_unused_places_are_kept_but_not_counted():
    unused = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    x = torch.randn(4, 4, 2)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, MASK, unused)
    assert torch.equal(packed, x[(MASK + unused).bool()]) and torch.equal(packed, x.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 4, 4, 7, 11] and longest == 4 and used.tolist() == [3, 0, 1, 4]


def test_a_mask_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"\(B, L\) = \(4, 4\), got \(4, 3\)"):
        unpad_input(torch.ones(4, 4, 2), MASK[:, :3])


def test_index_first_axis():
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(index_first_axis(x, rows), x[rows])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, rows), (x,))
