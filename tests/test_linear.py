"""Linear layers on a CPU: oneDNN's product against torch's, and int8 weights in a real model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from uncausal.encoder.linear import OneDNNLinear, quantize_linear, use_onednn
from uncausal.encoder.model import Encoder

TEXTS = ["How do plants make energy?", "A man is playing the flute.", "The flute is played by a man."]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 33), (1, 1, 33), (0, 33), (33,)], ids=str)
def test_one_dnn_linear(shape, bias):
    torch.manual_seed(0)
    plain = nn.Linear(33, 17, bias)
    layer = nn.Linear(33, 17, bias)
    layer.load_state_dict(plain.state_dict())
    use_onednn(layer)
    assert isinstance(layer, OneDNNLinear)
    x = torch.randn(shape)
    weight, inputs = plain.weight.double(), x.double().requires_grad_()
    want = F.linear(inputs, weight, plain.bias.double() if bias else None)
    out_grad = torch.randn_like(want)
    (want_x,) = torch.autograd.grad(want, inputs, out_grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want.float(), rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out, want.float(), rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(out, [x, *layer.parameters()], out_grad.float())
    torch.testing.assert_close(got[0], want_x.float(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(plain(x), list(plain.parameters()), out_grad.float())
    torch.testing.assert_close(list(got[1:]), list(expected), rtol=1e-5, atol=1e-5)


def test_a_bias_is_trained_alone():
    """Regression: it had no gradient where neither the input nor the weight asked for one."""
    layer = nn.Linear(33, 17)
    use_onednn(layer)
    layer.weight.requires_grad_(False)
    layer(torch.randn(7, 33)).sum().backward()
    assert layer.bias.grad is not None and torch.equal(layer.bias.grad, torch.full((17,), 7.0))


@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 33)], ids=str)
def test_one_dnn_is_what_multiplies(shape):
    """The result does not show it: torch's own product passed every test. Forward and the input's gradient
    do."""

    class Calls(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    layer = nn.Linear(33, 17)
    use_onednn(layer)
    x = torch.randn(shape)
    with torch.no_grad(), Calls() as calls:
        calls.names = []
        layer(x)
    assert calls.names == ["mkldnn._linear_pointwise.default"]
    x.requires_grad_()
    with Calls() as calls:
        calls.names = []
        out = layer(x)
        out.backward(torch.ones_like(out))
    assert calls.names.count("mkldnn._linear_pointwise.default") == 2
    assert not any("addmm" in name or "linear.default" in name for name in calls.names)


def test_other_dtypes_and_autocast_stay_torchs():
    layer = nn.Linear(32, 16)
    use_onednn(layer)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))


def test_quantize(smollm2, tmp_path):
    encoder = Encoder.from_pretrained(smollm2, dtype="float32")
    before = encoder.encode(TEXTS, convert_to_tensor=True)
    count = sum(isinstance(module, nn.Linear) for module in encoder.backbone.modules())
    encoder.quantize()
    left = [name for name, module in encoder.backbone.named_modules() if isinstance(module, nn.Linear)]
    assert count == 7 * len(encoder.backbone.layers)
    assert len(left) == count // 7
    assert all(name.endswith("down_proj") for name in left)
    after = encoder.encode(TEXTS, convert_to_tensor=True)
    cosines = F.cosine_similarity(before, after)
    assert not torch.equal(before, after)
    assert cosines.min() > 0.97, cosines
    with pytest.raises(ValueError, match="int8 weights are not saved"):
        encoder.save(tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_quantize_says_what_it_needs():
    with pytest.raises(ValueError, match="the model is on meta"):
        quantize_linear(nn.Linear(2, 2, device="meta"), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_has_the_same_bits_in_any_company(dtype):
    """Regression: one token alone was multiplied by another routine than the same token in a batch."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(192, 320), torch.nn.Linear(320, 64)).to(dtype)
    use_onednn(model)
    rows = torch.randn(1, 70, 192, dtype=dtype)
    with torch.inference_mode():
        together = model(rows)
        for count in (1, 2, 3, 7, 16, 33, 69):
            assert torch.equal(model(rows[:, :count]), together[:, :count]), count
        assert torch.equal(model(rows[:, -1:]), together[:, -1:])
