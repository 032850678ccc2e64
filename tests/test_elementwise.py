"""The bits of a number do not depend on how many there are, nor a text's on its company or the threads."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from uncausal import Encoder
from uncausal.bench.families import FAMILIES, tiny_model
from uncausal.encoder.elementwise import (
    ACTIVATIONS,
    OF_GELU,
    by_whole_vectors,
    restore_rope,
    use_whole_vectors,
)


@pytest.fixture
def threads():
    """Sets the number of torch's threads, for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


THREADS = (2, 3, 4, 6, 7, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", sorted(ACTIVATIONS, key=str), ids=lambda kind: kind.__name__)
def test_bits_are_those_of_one_thread(threads, kind, dtype):
    """Regression: at 8 threads silu had other bits for 32 of 260 numbers of rows, gelu at 3 and 6."""
    activation, gelu = kind(), kind in OF_GELU
    x = torch.randn(300 * 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    threads(1)
    whole = by_whole_vectors(activation, x, gelu)
    torch.testing.assert_close(whole, activation(x))
    for count in THREADS:
        threads(count)
        for numbers in (1, 70, 16384, 16448, 32768, 40000, 65536, 86 * 1536, 131 * 1536, 300 * 864, len(x)):
            assert torch.equal(by_whole_vectors(activation, x[:numbers], gelu), whole[:numbers]), (
                count,
                numbers,
            )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_familys_tables_and_activations_are_kept(model_type):
    """Regression: a type of rope for each type of layer, and tables of complex numbers, failed."""
    model = tiny_model(model_type, "eager", **FAMILIES[model_type])
    ids = torch.arange(3, 43)[None] % 30
    given = (
        {"input_ids": ids, "position_ids": torch.arange(40)[None]}
        if model_type != "bloom"
        else {"input_ids": ids}
    )
    with torch.no_grad():
        before = model(**given)[0]
        use_whole_vectors(model)
        torch.testing.assert_close(model(**given)[0], before)


@pytest.fixture(scope="module", params=["silu", "gelu_pytorch_tanh"])
def wide(request, tmp_path_factory, tiny_checkpoint):
    """Layers as wide as SmolLM2's, and texts of a hundred tokens and more."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = Encoder.from_pretrained(tiny_checkpoint).tokenizer
    config = LlamaConfig(
        hidden_act=request.param,
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = "the a cat dog king sees likes paints river music".split()
    texts = [" ".join(words[(i * k + k // 7) % 10] for k in range(60 + 11 * i)) for i in range(12)]
    return folder, texts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_texts_vector_is_its_own_at_any_number_of_threads(threads, wide, dtype):
    folder, texts = wide
    encoder = Encoder.from_pretrained(folder, device="cpu", dtype=dtype, max_seq_length=512)
    threads(1)
    expected = encoder.encode(texts)
    for count in THREADS:
        threads(count)
        assert np.array_equal(encoder.encode(texts), expected), count
        alone = np.stack([encoder.encode(text) for text in texts])
        assert np.array_equal(alone, expected), count


def test_gpt2_too_keeps_bits(threads, wide, tmp_path):
    """Its linear layers are of a class of their own, and few rows took another routine."""
    folder, texts = wide
    tokenizer = Encoder.from_pretrained(folder).tokenizer
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=576, n_head=9, n_layer=2, n_positions=512)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, device="cpu", dtype="float32", max_seq_length=512)
    texts = [*texts, "a cat", "music"]
    threads(1)
    expected = encoder.encode(texts)
    for count in (1, 3):
        threads(count)
        assert np.array_equal(np.stack([encoder.encode(text) for text in texts]), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).transformer.h[0].mlp.c_fc
    module, x = encoder.backbone.h[0].mlp.c_fc, torch.randn(5, 576)
    torch.testing.assert_close(module(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(module(x[:1]), plain(x[:1]))


def test_a_graph_of_the_model_is_whole(wide):
    """Regression: what depends on the number of threads broke it."""
    folder, _ = wide
    backbone = Encoder.from_pretrained(folder, device="cpu", dtype="float32").backbone
    given = dict(input_ids=torch.arange(40)[None] % 9, position_ids=torch.arange(40)[None])
    with torch.no_grad():
        compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend="eager")
        torch.testing.assert_close(compiled(**given)[0], backbone(**given)[0])


def test_modules_keep_their_names_and_travel(wide):
    folder, _ = wide
    backbone = Encoder.from_pretrained(folder, device="cpu", dtype="float32").backbone
    plain = AutoModelForCausalLM.from_pretrained(folder).model
    x, positions = torch.randn(3, 70), torch.arange(700)[None]
    with torch.no_grad():
        for name, given in (("layers.0.mlp.act_fn", (x,)), ("rotary_emb", (x, positions))):
            module, before = backbone.get_submodule(name), plain.get_submodule(name)
            assert repr(module) == repr(before) and isinstance(module, type(before))
            for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert type(twin) is type(module)
                torch.testing.assert_close(twin(*given), module(*given), rtol=0, atol=0)
            torch.testing.assert_close(module(*given), before(*given))


def test_dynamic_rope_forgets_longer_texts(tiny_llama, tmp_path):
    """Regression: the library goes on with the frequencies of the longest text so far."""
    shutil.copytree(tiny_llama, tmp_path / "dynamic")
    file = tmp_path / "dynamic" / "config.json"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    changes = {"rope_parameters": rope, "max_position_embeddings": 8}
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    options = {"dtype": "float32", "device": "cpu", "max_seq_length": 64}
    encoder = Encoder.from_pretrained(tmp_path / "dynamic", **options)
    texts = ["hello world " * 6, "a fox", "the", "the lazy dog jumps " * 3]
    longest = max(len(row) for row in encoder.tokenizer(texts)["input_ids"])
    assert longest > 8 and encoder.backbone.rotary_emb.rope_type == "dynamic"
    alone = [Encoder.from_pretrained(tmp_path / "dynamic", **options).encode(text) for text in texts]
    for found in (encoder.encode(texts), encoder.encode(texts[::-1])[::-1]):
        np.testing.assert_array_equal(found, alone)


def test_dynamic_rope_of_each_type_of_layer_is_restored():
    """Regression: where layers of two types have tables of their own, they kept those of the longest text."""
    kinds = {
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    options = {**FAMILIES["gemma3_text"], "rope_parameters": kinds, "max_position_embeddings": 8}
    backbone = tiny_model("gemma3_text", **options)
    full, ids = torch.arange(8)[None], torch.arange(30)[None] % 9
    with torch.no_grad():
        before = backbone(input_ids=full)[0]
        backbone(input_ids=ids)
        assert not torch.equal(backbone(input_ids=full)[0], before)
        restore_rope(backbone.rotary_emb)
        assert torch.equal(backbone(input_ids=full)[0], before)
