"""Low-rank adapters: attached, refused, merged."""

import copy
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tiny import load
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from uncausal.encoder import adapters
from uncausal.encoder.training.lora import InputDropout, LowRankLinear, attach_lora


def test_lora_only_upper_layers_stops_the_backward_pass(checkpoint):
    encoder = load(checkpoint)
    view = attach_lora(encoder.backbone, r=4, alpha=8, dropout=0.0, trainable_layers=[1])
    trained = {name.split(".layers.")[1][0] for name, p in view.named_parameters() if p.requires_grad}
    assert trained == {"1"}
    seen = {}
    for index, layer in enumerate(encoder.backbone.layers):
        layer.register_forward_hook(lambda m, a, out, i=index: seen.update({i: out.requires_grad}))
    encoder.backbone(torch.arange(3, 9)[None]).last_hidden_state.sum().backward()
    assert seen == {0: False, 1: True}
    assert not encoder.backbone.get_input_embeddings().weight.requires_grad


def test_attach_lora_refuses_what_the_model_does_not_have(checkpoint):
    backbone = load(checkpoint).backbone
    with pytest.raises(ValueError, match=r"no linear layer \['qkv'\]"):
        attach_lora(backbone, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "qkv"])
    with pytest.raises(ValueError, match=r"layers \[2\] do not exist: the model has the layers 0 to 1"):
        attach_lora(backbone, r=4, alpha=8, dropout=0.0, trainable_layers=[1, 2])


def test_attach_lora_finds_the_linear_layers_of_another_family():
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=50))
    view = attach_lora(model, r=2, alpha=4, dropout=0.0, trainable_layers=[1])
    trained = {
        name.split("h.1.")[1].split(".lora")[0] for name, p in view.named_parameters() if p.requires_grad
    }
    assert trained == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def test_adapter_of_a_model_with_a_head_is_refused(checkpoint, tmp_path):
    """Such an adapter has another prefix; peft would load none of it and only warn."""
    causal = AutoModelForCausalLM.from_pretrained(checkpoint)
    get_peft_model(causal, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    encoder = load(checkpoint)
    with pytest.raises(
        ValueError, match=r"start with 'base_model\.model\.model\.', those of a headless LlamaModel"
    ):
        adapters.load_adapter(encoder.backbone, tmp_path)
    assert not any("lora" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("name", ["/nowhere/adapter", "nobody/adapter"])
def test_adapter_that_is_nowhere_is_named(checkpoint, name, monkeypatch):
    """Regression: the error was the hub's, about the letters of a repository's id."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"no adapter '{name}': not a folder here"):
        load(checkpoint, adapter=name)


def test_adapter_damaged_missing_or_of_another_model(checkpoint, tmp_path):
    backbone = load(checkpoint).backbone
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        adapters.load_adapter(backbone, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="not readable as safetensors"):
        adapters.load_adapter(backbone, tmp_path)
    from transformers import GPT2Config, GPT2Model

    other = GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50))
    get_peft_model(other, LoraConfig(r=2, target_modules=["c_attn"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fits no module of LlamaModel"):
        adapters.load_adapter(backbone, tmp_path)


def test_merge_reports_what_bfloat16_rounds_away(checkpoint, caplog):
    """An update below half a unit in the last place of a bfloat16 weight vanishes in the merge."""
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        backbone = load(checkpoint).backbone.to(dtype)
        view = attach_lora(backbone, r=4, alpha=8, dropout=0.0)
        torch.manual_seed(0)
        for name, parameter in view.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-4)
        shares[dtype] = adapters.merge_lora(view)
    assert shares[torch.float32] < 1e-3 and shares[torch.bfloat16] > 0.5
    assert "bfloat16 weights rounded away" in caplog.text


@pytest.mark.parametrize("p", [0.05, 0.5, 0.99999])
def test_input_dropout_draws_what_torch_does(p):
    """Four draws come from one number: each must drop its share, and none the neighbour's."""
    torch.manual_seed(0)
    layer, x = InputDropout(p), torch.full((4001, 101), 2.0, requires_grad=True)
    out = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), out)
    kept = out != 0
    assert out[kept].allclose(torch.tensor(2 / (1 - round(p * 65536) / 65536)), rtol=1e-5)
    lanes = kept.flatten()[: 4 * 101000].view(-1, 4).double()
    spread = 5 * (p * (1 - p) / len(lanes)) ** 0.5 + 2**-16
    assert ((lanes.mean(0) - (1 - p)).abs() < spread).all()
    if p < 0.9:
        assert (lanes.T.corrcoef() - torch.eye(4)).abs().max() < 0.02
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad * 2, out)
    assert layer.eval()(x) is x


def test_an_adapter_has_it(checkpoint):
    view = attach_lora(load(checkpoint).backbone, r=4, alpha=8, dropout=0.1)
    dropouts = [module for module in view.modules() if isinstance(module, nn.Dropout)]
    assert len([x for x in dropouts if type(x) is InputDropout and x.p == 0.1]) == 7 * 2
    assert len([x for x in view.modules() if type(x) is LowRankLinear]) == 7 * 2


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_low_rank_layers_compute_what_pefts_do(base, autocast):
    """Outputs and gradients, but for the rounding of a sum; merged or disabled ones are left to peft."""
    torch.manual_seed(0)
    inner = torch.nn.Linear(24, 40) if base == "linear" else Conv1D(40, 24)
    ours = LoraLinear(inner, "default", LoraConfig(), r=4, lora_alpha=12, fan_in_fan_out=base == "conv1d")
    torch.nn.init.normal_(ours.lora_B["default"].weight)
    theirs = copy.deepcopy(ours)
    ours.__class__ = LowRankLinear
    found = []
    for layer in (ours, theirs):
        x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, inner.weight]
        found.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *weights[:2]])])
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32) and out.shape == (3, 7, 40)
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < (2e-2 if autocast else 1e-6) * other.norm()
    x = torch.randn(5, 24)
    with mock.patch.object(LoraLinear, "forward", return_value="peft's"):
        assert isinstance(ours(x), torch.Tensor)
        for change in ({"merged_adapters": ["default"]}, {"_disable_adapters": True}):
            with mock.patch.multiple(ours, **change):
                assert ours(x) == "peft's"
