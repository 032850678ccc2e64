"""Conversion to bidirectional attention, its proof, and the attention function that transformers calls."""

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from uncausal.bench.families import tiny_model
from uncausal.encoder import attention
from uncausal.encoder.conversion import (
    NotBidirectionalError,
    assert_bidirectional,
    make_bidirectional,
    make_causal,
)
from uncausal.encoder.layers import decoder_layers
from uncausal.kernels.packing import PackedLayout

IMPLEMENTATIONS = ["eager", "sdpa", "uncausal"]


def packed_inputs(*lengths: int) -> dict:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    longest = max(lengths)
    return dict(
        input_ids=torch.randint(3, 128, (1, sum(lengths)), generator=torch.Generator().manual_seed(0)),
        position_ids=position_ids,
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens.clone(),  # batches are moved to the device tensor by tensor
        max_length_q=longest,
        max_length_k=longest,
        use_cache=False,
    )


def states(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


# The proof


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_assert_bidirectional_refuses_the_untouched_model(implementation):
    with pytest.raises(
        NotBidirectionalError, match=r"layers\.0\.self_attn \(LlamaAttention: attention\) stays"
    ):
        assert_bidirectional(tiny_model("llama", implementation))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_assert_bidirectional_refuses_the_silent_causal_trap(implementation):
    """Setting `is_causal` on the attention layers alone leaves eager, and every padded batch, causal."""
    model = tiny_model("llama", implementation)
    for layer in model.layers:
        layer.self_attn.is_causal = False
    where = "without padding" if implementation == "eager" else "in a padded batch"
    with pytest.raises(NotBidirectionalError, match=f"stays causal {where}"):
        assert_bidirectional(model)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("index", [0, 3, 5])
def test_assert_bidirectional_names_the_one_causal_layer(implementation, index):
    model = make_bidirectional(tiny_model("llama", implementation, num_hidden_layers=6))
    part = model.layers[index].self_attn

    def causal(module, args, kwargs):
        length = kwargs["hidden_states"].shape[1]
        return args, kwargs | {"attention_mask": torch.full((length, length), -torch.inf).triu(1)[None, None]}

    part.config = LlamaConfig(**model.config.to_dict())
    part.config._attn_implementation = "eager"
    part.register_forward_pre_hook(causal, with_kwargs=True)
    with pytest.raises(NotBidirectionalError) as caught:
        assert_bidirectional(model)
    assert caught.value.layer == f"layers.{index}.self_attn"


def test_assert_bidirectional_names_the_layer_that_attends_padding():
    model = make_bidirectional(tiny_model("llama", "eager"))

    def unmasked(module, args, kwargs):
        return args, kwargs | {"attention_mask": None}

    model.layers[1].self_attn.register_forward_pre_hook(unmasked, with_kwargs=True)
    with pytest.raises(NotBidirectionalError, match=r"layers\.1\.self_attn .* attends padding"):
        assert_bidirectional(model)


def test_assert_bidirectional_sees_documents_that_see_each_other(monkeypatch):
    model = make_bidirectional(tiny_model("llama", "uncausal"))
    monkeypatch.setattr(attention, "_batch_from_cu_seqlens", lambda *_: None)
    with pytest.raises(NotBidirectionalError, match="packed documents see each other"):
        assert_bidirectional(model)


def test_assert_bidirectional_sees_a_convolution_behind_attention():
    model = make_bidirectional(tiny_model("llama"))
    model.layers[1].self_attn.key_conv = nn.Conv1d(4, 4, 3, padding=2)
    with pytest.raises(NotBidirectionalError) as caught:
        assert_bidirectional(model)
    assert caught.value.layer == "layers.1.self_attn"


def test_assert_bidirectional_refuses_an_attention_the_model_ignores():
    """CodeGen accepts any registered name, computes its own attention, and would get our masks for it."""
    model = make_bidirectional(tiny_model("codegen", "uncausal"))
    with pytest.raises(NotBidirectionalError, match="cannot use uncausal"):
        assert_bidirectional(model)


def test_assert_bidirectional_reports_windows():
    report = assert_bidirectional(make_bidirectional(tiny_model("mistral", "eager")))
    assert report.windows == {"layers.0": 4, "layers.1": 4}
    long = tiny_model("gemma3_text", sliding_window=40, layer_types=["full_attention", "sliding_attention"])
    assert assert_bidirectional(make_bidirectional(long)).windows == {"layers.1": 40}
    report = assert_bidirectional(make_bidirectional(tiny_model("llama", "uncausal")))
    assert (report.windows, report.layers, report.packed) == ({}, 2, True)


def test_assert_bidirectional_leaves_no_trace():
    model = make_bidirectional(tiny_model("llama")).train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    assert_bidirectional(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_assert_bidirectional_leaves_half_precision_weights(dtype, fails):
    """Layers are widened to float32 while they are probed: dtypes and values must come back."""
    model = tiny_model("llama").to(dtype)
    model = model if fails else make_bidirectional(model)
    model.register_buffer("kept", torch.ones(3))
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    with pytest.raises(NotBidirectionalError) if fails else nullcontext():
        assert_bidirectional(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_assert_bidirectional_is_cheap():
    """Counted, not timed: a few hundred tokens whatever the depth, and no gradient."""
    model = make_bidirectional(tiny_model("llama", "uncausal", num_hidden_layers=12))
    passes = []

    def count(module, args, kwargs):
        passes.append(kwargs["input_ids"].numel())
        assert not torch.is_grad_enabled()

    model.register_forward_pre_hook(count, with_kwargs=True)
    assert_bidirectional(model)
    assert len(passes) <= 12 and sum(passes) <= 300


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_assert_bidirectional_accepts_half_precision(implementation):
    assert_bidirectional(make_bidirectional(tiny_model("qwen3_moe", implementation).to(torch.bfloat16)))
    with pytest.raises(NotBidirectionalError):
        assert_bidirectional(make_causal(tiny_model("qwen3_moe", implementation).to(torch.bfloat16)))


def test_assert_bidirectional_takes_heads_and_adapters():
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NotBidirectionalError, match=r"base_model\.model\.model\.layers\.0\.self_attn"):
        assert_bidirectional(model)
    assert assert_bidirectional(make_bidirectional(model)).layers == 2


def test_make_bidirectional_refuses_encoder_decoders_and_strangers():
    from transformers import T5Config, T5Model

    t5 = T5Model(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(NotBidirectionalError, match="encoder-decoder"):
        make_bidirectional(t5)
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        make_bidirectional(nn.Linear(2, 2))


def test_make_causal_undoes_make_bidirectional():
    model = tiny_model("stablelm", "uncausal")
    ids = torch.randint(3, 128, (2, 7))
    before = states(model, input_ids=ids, use_cache=False)
    both = states(make_bidirectional(model), input_ids=ids, use_cache=False)
    assert not torch.allclose(both, before)
    assert torch.equal(states(make_causal(model), input_ids=ids, use_cache=False), before)


def test_decoder_layers_skips_experts_and_vision_towers():
    model = tiny_model("mixtral")
    assert decoder_layers(model) is model.layers
    model = tiny_model("gpt2")
    assert decoder_layers(model) is model.h


def test_saved_model_is_bidirectional_in_a_plain_process(tmp_path):
    model = make_bidirectional(tiny_model("qwen2", "uncausal"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    ids = torch.arange(3, 12)[None]
    torch.save(states(model, input_ids=ids, use_cache=False), tmp_path / "expected.pt")
    script = f"""
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r})
ids = torch.arange(3, 12)[None]
found = model(input_ids=ids).last_hidden_state
torch.testing.assert_close(found, torch.load({str(tmp_path / "expected.pt")!r}), rtol=1e-5, atol=1e-5)
padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
found = model(input_ids=padded, attention_mask=(padded != 0).long()).last_hidden_state[:, 3:]
torch.testing.assert_close(found, torch.load({str(tmp_path / "expected.pt")!r}), rtol=1e-4, atol=1e-4)
assert "uncausal" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The attention function


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_on_either_side_moves_nothing(implementation, side):
    model = make_bidirectional(tiny_model("llama", implementation))
    ids = torch.randint(3, 128, (1, 8), generator=torch.Generator().manual_seed(0))
    padding = torch.full((1, 5), 7)
    pair = (padding, ids) if side == "left" else (ids, padding)
    mask = torch.cat([torch.full_like(x, float(x is ids)) for x in pair], 1)
    found = states(model, input_ids=torch.cat(pair, 1), attention_mask=mask, use_cache=False)
    expected = states(model, input_ids=ids, use_cache=False)
    torch.testing.assert_close(found[mask.bool()][None], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("how", ["cu_seq_lens", "position_ids", "layout"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt_oss"])
def test_packed_documents_equal_single_ones(model_type, how, causal):
    model = tiny_model(model_type, "uncausal")
    model = model if causal else make_bidirectional(model)
    lengths = (9, 1, 6)
    inputs = packed_inputs(*lengths)
    ids = inputs["input_ids"]
    if how != "cu_seq_lens":
        inputs = {k: inputs[k] for k in ("input_ids", "position_ids", "use_cache")}
    if how == "layout":
        inputs["layout"] = PackedLayout.from_lengths(lengths)
    found = states(model, **inputs)[0].split(lengths)
    eager = tiny_model(model_type, "eager")
    eager = eager if causal else make_bidirectional(eager)
    for document, result in zip(ids[0].split(lengths), found, strict=True):
        expected = states(eager, input_ids=document[None], use_cache=False)[0]
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("model_type", ["phimoe", "mistral"])
def test_window_is_the_library_s_even_where_only_the_mask_knows_it(model_type, causal):
    """PhiMoE does not hand its window to the attention function: it saw everything."""
    models = [tiny_model(model_type, name) for name in ("eager", "uncausal")]
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    eager, ours = (
        states(m if causal else make_bidirectional(m), input_ids=ids, use_cache=False) for m in models
    )
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["packed", "padded", "dense"])
def test_attention_dropout_acts_in_training_only(form):
    model = make_bidirectional(tiny_model("llama", "uncausal", attention_dropout=0.3))
    inputs = packed_inputs(7, 5)
    if form != "packed":
        inputs = {"input_ids": inputs["input_ids"].view(2, 6), "use_cache": False}
    if form == "padded":
        inputs["attention_mask"] = torch.tensor([[1] * 6, [0, 0] + [1] * 4])
    assert torch.equal(states(model, **inputs), states(model, **inputs))
    model.train()
    torch.manual_seed(0)
    first, second = states(model, **inputs), states(model, **inputs)
    assert not torch.allclose(first, second)
    torch.manual_seed(0)
    assert torch.equal(states(model, **inputs), first)
    undropped = states(model.eval(), **inputs)
    assert not torch.allclose(first, undropped)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "deepseek_v3"])
def test_gradients_equal_eager(model_type):
    overrides = dict(num_key_value_heads=4) if model_type == "deepseek_v3" else {}
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    gradients = []
    for implementation in ("eager", "uncausal"):
        model = make_bidirectional(tiny_model(model_type, implementation, **overrides))
        out = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[mask.bool()]
        # not the norm of the output, which the model's last layer fixes: its gradient would be rounding alone
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        difference = (gradients[1][name] - expected).abs().max()
        assert difference <= 1e-4 * expected.abs().max() + 1e-5, name


def test_layout_is_built_once_per_batch(monkeypatch):
    built = []
    from_lengths, from_mask = PackedLayout.from_lengths, PackedLayout.from_mask
    monkeypatch.setattr(PackedLayout, "from_lengths", lambda *a: built.append(1) or from_lengths(*a))
    monkeypatch.setattr(PackedLayout, "from_mask", lambda *a: built.append(1) or from_mask(*a))
    model = make_bidirectional(tiny_model("llama", "uncausal", num_hidden_layers=5))
    inputs = packed_inputs(4, 8)
    states(model, **inputs)
    assert len(built) == 1
    states(model, **packed_inputs(4, 8))
    assert len(built) == 2
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.tensor([[1] * 5, [0] + [1] * 4])
    states(model, input_ids=ids, attention_mask=mask, use_cache=False)
    assert len(built) == 3
    states(model, input_ids=ids, use_cache=False)
    assert len(built) == 3


def test_layout_follows_a_cu_seqlens_changed_in_place():
    model = make_bidirectional(tiny_model("llama", "uncausal"))
    inputs = packed_inputs(4, 8)
    del inputs["cu_seq_lens_k"]
    first = states(model, **inputs)
    inputs["cu_seq_lens_q"][1] = 6
    assert not torch.allclose(states(model, **inputs), first)


@pytest.mark.parametrize("how", ["cu_seqlens", "mask", "position_ids"])
def test_layout_follows_a_buffer_filled_again_under_inference_mode(how):
    """Regression: inference tensors count no versions, and the batch before lent its layout."""
    model = make_bidirectional(tiny_model("llama", "uncausal"))
    with torch.inference_mode():
        if how == "mask":
            ids = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(0))
            buffer, change = (
                torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
                torch.tensor([[1] * 6, [1] * 5 + [0]]),
            )
            inputs = {"input_ids": ids, "attention_mask": buffer, "use_cache": False}
        else:
            inputs, other = packed_inputs(4, 8), packed_inputs(7, 5)
            del inputs["cu_seq_lens_k"]
            if how == "position_ids":
                inputs = {name: inputs[name] for name in ("input_ids", "position_ids", "use_cache")}
            name = "position_ids" if how == "position_ids" else "cu_seq_lens_q"
            buffer, change = inputs[name], other[name]
        first = model(**inputs).last_hidden_state
        buffer.copy_(change)
        if how == "cu_seqlens":
            inputs["position_ids"] = packed_inputs(7, 5)["position_ids"]
        second = model(**inputs).last_hidden_state
        fresh = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        expected = model(**fresh).last_hidden_state
    real = buffer.bool() if how == "mask" else torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    torch.testing.assert_close(second[real], expected[real])
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("how", ["cu_seqlens", "position_ids"])
def test_training_finds_the_layout_of_a_call_without_gradients(how):
    """Regression: made under inference mode, it could not be saved for backward."""
    model = make_bidirectional(tiny_model("llama", "uncausal"))
    inputs = packed_inputs(4, 8)
    if how == "position_ids":
        inputs = {name: inputs[name] for name in ("input_ids", "position_ids", "use_cache")}
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
    out = model(**inputs).last_hidden_state
    assert torch.equal(out, expected)
    out.sum().backward()


def test_layout_is_built_once_under_inference_mode(monkeypatch):
    built = []
    from_lengths = PackedLayout.from_lengths
    monkeypatch.setattr(PackedLayout, "from_lengths", lambda *a: built.append(1) or from_lengths(*a))
    model = make_bidirectional(tiny_model("llama", "uncausal", num_hidden_layers=5))
    with torch.inference_mode():
        model(**packed_inputs(4, 8))
    assert len(built) == 1


@pytest.mark.parametrize("form", ["packed", "padded"])
def test_autocast_with_float32_weights(form):
    """Regression: rotation leaves queries and keys in float32 beside bfloat16 values, and the op refused."""
    model = make_bidirectional(tiny_model("llama", "uncausal"))
    reference = make_bidirectional(tiny_model("llama", "sdpa"))
    inputs = packed_inputs(7, 5)
    ids, mask = inputs["input_ids"], None
    if form == "padded":
        ids, mask = ids.view(2, 6), torch.tensor([[1] * 6, [0, 0] + [1] * 4])
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    exact = states(model, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**inputs).last_hidden_state
        out.float().square().sum().backward()
        theirs = states(reference, input_ids=ids, attention_mask=mask, use_cache=False)
    kept = slice(None) if mask is None else mask.bool()
    error = (out - exact)[kept].norm() / exact[kept].norm()
    assert 0 < error < 0.05
    if form == "padded":
        assert error < 2 * (theirs - exact)[kept].norm() / exact[kept].norm()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "proj" in n
    )


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_compiles_without_a_graph_break(model_type, causal):
    """Regression: the mask function asked for a function's name, which torch.compile cannot trace."""
    model = tiny_model(model_type, "uncausal")
    model = model if causal else make_bidirectional(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (2, 1):
        torch._dynamo.reset()
        ids = torch.randint(3, 128, (rows, 9), generator=torch.Generator().manual_seed(0))
        expected = states(model, input_ids=ids, use_cache=False)
        found = states(compiled, input_ids=ids, use_cache=False)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    packed = {k: v for k, v in packed_inputs(4, 5).items() if k in ("input_ids", "position_ids", "use_cache")}
    with pytest.raises(
        RuntimeError, match="packed batch needs a layout"
    ):  # and never one long text in silence
        states(compiled, **packed)


def test_overlays_are_refused():
    """Image blocks of a language model see each other both ways: no mask of ours says so."""
    from transformers.masking_utils import create_causal_mask

    model = tiny_model("llama", "uncausal")
    blocks = torch.tensor([[-1, 0, 0, -1]])
    with pytest.raises(NotImplementedError, match="overlay"):
        create_causal_mask(model.config, torch.ones(1, 4, 8), None, None, block_sequence_ids=blocks)


def test_uncausal_attention_refuses_what_it_cannot_do():
    model = make_bidirectional(tiny_model("llama", "uncausal"))
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="2D padding mask"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"has the shape \(1, T\)"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="position_bias"):
        attention.uncausal_attention(
            model.layers[0].self_attn, *[torch.ones(1, 1, 2, 8)] * 3, None, position_bias=1
        )
    with pytest.raises(NotImplementedError, match="chunked"):
        model = tiny_model("llama4_text", "uncausal", attention_chunk_size=4)
        model(input_ids=ids, use_cache=False)
    with pytest.raises(NotImplementedError, match="between real tokens"):
        model = make_bidirectional(tiny_model("mistral", "uncausal"))
        model(
            input_ids=torch.ones(1, 9, dtype=torch.long),
            attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]]),
        )


def test_name_is_not_taken_for_flash_attention(tiny_llama):
    """Of a name that says flash, in any spelling, the libraries ask for the flash-attn package and its."""
    from sentence_transformers.base.modules import Transformer
    from transformers.utils.generic import is_flash_attention_requested

    assert not is_flash_attention_requested(requested_attention_implementation=attention.NAME)
    module = Transformer(str(tiny_llama), model_kwargs={"attn_implementation": attention.NAME})
    assert module.model.config._attn_implementation == attention.NAME
    assert not module._is_flash_attention_requested() and not module.can_flatten_inputs
    assert "flash" not in attention.NAME.lower() and "kernel" not in attention.NAME.lower()
