"""How kernels are launched: on which device, in which precision, compiled how often; without a device."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from triton import JITFunction

from uncausal.bench import static
from uncausal.kernels import attention, info_nce, latent_pooling_ops, launch
from uncausal.kernels.attention import flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_ref
from uncausal.kernels.latent_pooling import LatentAttentionPooling
from uncausal.kernels.packing import PackedLayout


def attend(total, dtype=torch.bfloat16, dim=32, **options):
    lengths = [20, total - 20]
    layout = PackedLayout.from_lengths(lengths)
    q, k, v = (torch.randn(total, h, dim, dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    lengths = (layout.cu_seqlens, layout.cu_seqlens)
    flash_attn_varlen_func(q, k, v, *lengths, layout=layout, backend="triton", **options).sum().backward()


def contrast(total, dim=32):
    query, key = (torch.randn(total, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    info_nce.info_nce(query, key, symmetric=True, backend="triton").backward()


def pool(total, latents=32, **form):
    layer = LatentAttentionPooling(32, latents, 2, backend="triton", **form).bfloat16()
    hidden = torch.randn(total, 32, dtype=torch.bfloat16, requires_grad=True)
    layer.cheapest_fold = lambda tokens=None: "attention" if layer.pre_norm else "mlp"
    layer(hidden, torch.tensor([0, 20, total])).sum().backward()


PLAIN = {"activation": "gelu", "pre_norm": False, "residual": False}
CALLS = {
    "attention": attend,
    "attention-all": lambda total: attend(total, dropout_p=0.1, window_size=(9, 9), softcap=2.0),
    "info_nce": contrast,
    "info_nce-wide": lambda total: contrast(total, 272),
    "latent_pooling": pool,
    "latent_pooling-plain": lambda total: pool(total, **PLAIN),
}


@pytest.mark.parametrize("call", [name for name in CALLS if name != "info_nce"])
def test_a_token_count_compiles_nothing_again(call):
    """Regression: the first count divisible by 16, or of 1, compiled every kernel again, in mid-training."""
    found = []
    for total in (208, 211):
        with static.recorded_launches("sm80") as launches:
            CALLS[call](total)
        # these stay specialised, for their registers and bounds
        kept = ("_info_nce_lse_kernel", "_info_nce_grad_kernel", "_mlp_pool_kernel", "_mlp_pool_bwd_kernel")
        found.append([one for one in launches if one.kernel.__name__ not in kept])
    assert found[0] and found[0] == found[1]


@pytest.mark.parametrize(("length", "rows"), [(512, 128), (100, 64)])
def test_a_dense_batch_tells_its_lengths(length, rows):
    """Regression: `flash_attn_func` launched the small tiles of unknown lengths, whatever its shape."""
    with static.recorded_launches("sm80") as launches:
        flash_attn_func(*torch.randn(3, 2, length, 4, 64, dtype=torch.bfloat16), backend="triton")
    (one,) = launches
    constants = dict(one.constexprs)
    assert constants["BLOCK_M"] == rows and constants["SHARED"] is (length < 128)


@pytest.fixture
def tf32():
    """Whether fp32 products may be TF32, restored afterwards."""
    switch, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    yield switch
    switch.fp32_precision = "none"  # which the new name may have left behind
    switch.allow_tf32 = before


@pytest.mark.parametrize("name", ["allow_tf32", "fp32_precision"])
@pytest.mark.parametrize("allowed", [False, True], ids=["exact", "tf32"])
def test_fp32_products_follow_torchs_switch(allowed, name, tf32):
    """Regression: attention multiplied exactly whatever `allow_tf32` said, and raised at the newer name."""
    setattr(tf32, name, allowed if name == "allow_tf32" else "tf32" if allowed else "ieee")
    for dtype in (torch.float32, torch.bfloat16):
        with static.recorded_launches("sm80") as launches:
            attend(64, dtype)
        found = {dict(one.constexprs).get("PRECISION") for one in launches} - {None}
        assert found == {"tf32" if allowed and dtype == torch.float32 else "ieee"}


def test_more_latents_than_a_tile_holds():
    """Regression: 600 latents made a tile of 64 x 1024 fp32 scores; the library's softmax takes over."""
    for latents in (512, 600):
        with static.recorded_launches("sm80") as launches:
            pool(64, latents)
        widths = [dict(one.constexprs)["BLOCK_R"] for one in launches if "softmax" in str(one.kernel)]
        assert all(width <= 512 for width in widths) and bool(widths) == (latents == 512)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 16), (torch.float32, 264), (torch.float16, 320)])
def test_what_no_tile_holds_goes_to_torch(dtype, dim, monkeypatch):
    """Regression: fp64 and more than 256 dimensions raised on a GPU, where sdpa computes them."""
    on_gpu = lambda backend, tensor: "triton" if backend == "auto" else backend  # noqa: E731
    monkeypatch.setattr(attention, "resolve_backend", on_gpu)
    q, k, v = (torch.randn(9, 2, dim, dtype=dtype) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    expected, _ = flash_attn_varlen_ref(q, k, v, cu, cu)
    torch.testing.assert_close(flash_attn_varlen_func(q, k, v, cu, cu), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("call", CALLS)
def test_every_launch_is_inside_the_device_guard(call, monkeypatch):
    """Regression: a model on cuda:1 launched on cuda:0, unless the user had called `set_device`."""
    depth, depths = 0, []

    @contextlib.contextmanager
    def guard(tensor):
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    for module in (attention, info_nce, latent_pooling_ops):
        monkeypatch.setattr(module, "on_device", guard)
    with static.recorded_launches("sm80"):
        monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: depths.append(depth))
        CALLS[call](64)
    assert depths and all(depth == 1 for depth in depths)


@pytest.mark.parametrize("call", CALLS)
def test_every_launch_contracts_as_what_was_compiled(call):
    """Regression: it was left to Triton, whose default changes in 3.10, and with it registers and speed."""
    with static.recorded_launches("sm80") as launches:
        CALLS[call](64)
    assert launches and all(dict(one.options)["enable_fp_fusion"] is True for one in launches)


@pytest.mark.parametrize(("major", "backend"), [(7, "torch"), (8, "triton")])
def test_gpus_before_ampere_take_torch(major, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    there = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    assert launch.resolve_backend("auto", there) == backend
    assert launch.resolve_backend("triton", there) == "triton"


def test_the_guard_takes_the_tensors_device():
    there = SimpleNamespace(device=torch.device("cuda", 1))
    with mock.patch.object(torch.cuda, "device") as device:
        launch.on_device(there)
        launch.on_device(torch.ones(1))
    device.assert_called_once_with(there.device)
