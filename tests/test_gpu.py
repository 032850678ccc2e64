"""What only a GPU shows: another device than the current one, streams, and CUDA graphs."""

import pytest
import torch

from uncausal.kernels.attention import flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_ref
from uncausal.kernels.info_nce import info_nce, info_nce_ref
from uncausal.kernels.latent_pooling import LatentAttentionPooling
from uncausal.kernels.packing import PackedLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LENGTHS = ([7, 300, 40, 1, 90, 200], [200, 90, 1, 40, 300, 7])


def inputs(lengths, device="cuda", dim=64):
    generator = torch.Generator().manual_seed(len(lengths) + lengths[0])
    shapes = ((sum(lengths), heads, dim) for heads in (4, 2, 2))
    tensors = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
    return *tensors, PackedLayout.from_lengths(lengths, device).cu_seqlens.clone()


def check(out, q, k, v, cu):
    expected, _ = flash_attn_varlen_ref(*(x.double() for x in (q, k, v)), cu, cu)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_their_tensors_device():
    """And not on the current one, forward nor backward, which runs in a thread of its own."""
    device = torch.device("cuda", 1)
    with torch.cuda.device(0):
        q, k, v, cu = inputs(LENGTHS[0], device)
        q.requires_grad_()
        out = flash_attn_varlen_func(q, k, v, cu, cu, 300, 300)
        out.sum().backward()
        check(out.detach(), q.detach(), k, v, cu)
        query, key = (torch.randn(300, 768, device=device, dtype=torch.bfloat16) for _ in range(2))
        query.requires_grad_()
        loss = info_nce(query, key, backend="triton")
        loss.backward()
        expected = info_nce_ref(query.detach().double(), key.double())
        torch.testing.assert_close(loss.double(), expected, atol=2e-2, rtol=2e-2)
        pooling = LatentAttentionPooling(64, 16, 2, head_dim=32).to(device, torch.bfloat16)
        hidden = torch.randn(sum(LENGTHS[0]), 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        pooled = pooling(hidden, cu)
        pooled.sum().backward()
        assert {x.device for x in (out, q.grad, loss, query.grad, pooled, hidden.grad)} == {device}


def test_layouts_of_one_stream_are_not_taken_in_another():
    """Maps that the first stream has yet to make would be read by the second."""
    stream = torch.cuda.Stream()
    for _ in range(10):
        q, k, v, cu = inputs(LENGTHS[0])
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            first = flash_attn_varlen_func(q, k, v, cu, cu, 300, 300)
        second = flash_attn_varlen_func(q, k, v, cu, cu, 300, 300)
        torch.cuda.synchronize()
        check(second, q, k, v, cu)
        assert torch.equal(first, second)


def test_a_graph_replays_with_other_lengths():
    """Captured without a wait, and with maps that follow the offsets it is given."""
    q, k, v, cu = inputs(LENGTHS[0])
    q.requires_grad_()

    def step():
        out = flash_attn_varlen_func(q, k, v, cu, cu, 300, 300)
        return out, *torch.autograd.grad(out.float().square().sum(), q)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = step()
    for lengths in LENGTHS:
        others = inputs(lengths)
        with torch.no_grad():
            for static, other in zip((q, k, v, cu), others, strict=True):
                static.copy_(other)
        graph.replay()
        check(out.detach(), q.detach(), k, v, cu)
        found = grad.clone()
        assert torch.equal(found, step()[1])


def test_a_dense_batch_in_a_graph():
    q, k, v = (torch.randn(4, 300, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    expected = flash_attn_func(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v)
    graph.replay()
    assert torch.equal(out, expected)
