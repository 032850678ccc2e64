"""torch.compile(fullgraph=True): one compilation, whatever the number of sequences."""

import pytest
import torch
from torch._dynamo.utils import counters

from uncausal.bench import static
from uncausal.kernels.attention import flash_attn_func, flash_attn_varlen_func
from uncausal.kernels.info_nce import info_nce
from uncausal.kernels.latent_pooling import LatentAttentionPooling


def packed(batch):
    lengths = [7 + i % 3 for i in range(batch)]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return cu, sum(lengths)


def attention_inputs(batch):
    cu, total = packed(batch)
    return *(torch.randn(total, h, 8, requires_grad=True) for h in (6, 2, 2)), cu


def pooling_inputs(batch):
    cu, total = packed(batch)
    return torch.randn(total, 16, requires_grad=True), cu


def attend(q, k, v, cu):
    return flash_attn_varlen_func(q, k, v, cu, cu, window_size=(3, 3))


def attend_dense(q, k, v):
    return flash_attn_func(q, k, v)


def dense_inputs(batch):
    return [torch.randn(batch, 13, h, 8, requires_grad=True) for h in (6, 2, 2)]


def contrast(query, key):
    return info_nce(query, key)


def contrast_both_ways(query, key):
    return info_nce(query, key, symmetric=True)


def contrast_densely(query, key):
    return info_nce(query, key, symmetric=True, backend="dense")


def contrast_inputs(batch):
    return [torch.randn(batch, 8, requires_grad=True) for _ in range(2)]


def graphs(function, make, batches=(30, 21, 48), compare=True):
    """Call a compiled function on batches, check results and gradients, return how often it was compiled."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for batch in batches:
        inputs = make(batch)
        leaves = [x for x in inputs if x.requires_grad]
        out = compiled(*inputs)
        grads = torch.autograd.grad(out.sum(), leaves)
        if compare:
            want = function(*inputs)
            torch.testing.assert_close(out, want)
            torch.testing.assert_close(grads, torch.autograd.grad(want.sum(), leaves))
    return counters["stats"]["unique_graphs"]


CASES = {
    "varlen": (attend, attention_inputs),
    "dense": (attend_dense, dense_inputs),
    "info_nce": (contrast, contrast_inputs),
    "info_nce-symmetric": (contrast_both_ways, contrast_inputs),
    "info_nce-dense": (contrast_densely, contrast_inputs),
}


@pytest.mark.parametrize("case", CASES)
def test_one_compilation_serves_every_number_of_sequences(case):
    """Regression: `min(lengths, default=0)` broke the graph, and an op's fake fixed the number of queries."""
    assert graphs(*CASES[case]) == 1


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
def test_one_compilation_of_latent_pooling(frozen):
    """Regression: the choice of a fold broke the graph, and so did a frozen layer's cache."""
    layer = LatentAttentionPooling(16, num_latents=16, num_heads=2)
    if frozen:
        layer.requires_grad_(False).freeze()
    assert graphs(lambda x, cu: layer(x, cu), pooling_inputs) == 1


def contrast_by_kernels(query, key):
    return info_nce(query, key, backend="triton")


def contrast_both_ways_by_kernels(query, key):
    return info_nce(query, key, symmetric=True, backend="triton")


LAUNCHED = {
    "varlen": (attend, attention_inputs),
    "dense": (attend_dense, dense_inputs),
    "info_nce": (contrast_by_kernels, contrast_inputs),
    "info_nce-symmetric": (contrast_both_ways_by_kernels, contrast_inputs),
}


@pytest.mark.parametrize("case", LAUNCHED)
def test_one_compilation_of_the_kernels_host_path(case):
    """The maps of the kernels are built inside the graph; launches are recorded, results not looked at."""
    function, make = LAUNCHED[case]
    with static.recorded_launches("sm80") as launches:
        assert graphs(function, make, compare=False) == 1
    assert launches
