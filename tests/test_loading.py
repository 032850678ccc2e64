"""From a name to an encoder: adapters, what the hub is asked for, attention that a model lacks, reloads."""

import dataclasses
import inspect
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from uncausal.bench.families import tiny_model
from uncausal.encoder import loading
from uncausal.encoder.adapters import load_adapter
from uncausal.encoder.conversion import NotBidirectionalError, assert_bidirectional
from uncausal.encoder.loading import EncoderSpec, adapter_chain, ensure_pad_token, resolve_dtype
from uncausal.encoder.model import Encoder

TEXTS = ["hello world", "the quick brown fox jumps over a lazy dog", "plants make energy"]
CPU = {"dtype": "float32", "device": "cpu"}


def save_adapter(base, folder, *, name=None, causal=False, seed=1):
    """A LoRA adapter of random weights on the model in folder `base`."""
    model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(base)
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(seed)
    for parameter_name, parameter in adapter.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter.save_pretrained(folder)
    if name is not None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": str(name)})
        )
    return folder


def merged(base, *folders):
    """The same by hand: the base model's encoder with the adapters' products added to its weights."""
    from safetensors.torch import load_file

    encoder = Encoder.from_pretrained(base, **CPU)
    weights = dict(encoder.backbone.named_parameters())
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, b in tensors.items():
            if ".lora_B" in key:
                module = key.split(".lora_B")[0].removeprefix("base_model.model.").removeprefix("model.")
                a = tensors[key.replace("lora_B", "lora_A")]
                weights[f"{module}.weight"].data += 2 * b @ a  # lora_alpha 8 / r 4
    return encoder.encode(TEXTS)


def bidirectional(path, kind=SentenceTransformer):
    """Whether a reloaded encoder's first token sees its last."""
    model = kind(str(path), device="cpu")[0].model
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.inference_mode():
        first, second = model(input_ids=ids, use_cache=False).last_hidden_state[:, 0]
    return bool((first - second).abs().max() > 1e-3)


@pytest.mark.parametrize("causal", [False, True], ids=["headless", "with-head"])
def test_adapter_repository(tiny_llama, tmp_path, causal):
    """Regression: it was saved as an adapter alone, without `is_causal`, and came back causal."""
    folder = save_adapter(tiny_llama, tmp_path / "adapter", causal=causal)
    encoder = Encoder.from_pretrained(folder, **CPU)
    expected = merged(tiny_llama, folder)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-4)
    assert np.abs(expected - merged(tiny_llama)).max() > 1e-2
    encoder.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("adapter*"))
    for reload in (
        SentenceTransformer(str(tmp_path / "saved"), device="cpu"),
        Encoder.from_pretrained(tmp_path / "saved", **CPU),
    ):
        np.testing.assert_allclose(reload.encode(TEXTS), expected, atol=1e-4)
    assert bidirectional(tmp_path / "saved") and bidirectional(tmp_path / "saved", Encoder)


def test_adapters_of_several_stages(tiny_llama, tmp_path):
    """LLM2Vec's adapters stand one upon another: by `adapter=`, by an adapter's own base, by `merge()`."""
    first = save_adapter(tiny_llama, tmp_path / "mntp", name=tiny_llama)
    second = save_adapter(tiny_llama, tmp_path / "simcse", name=first, seed=2)
    expected = merged(tiny_llama, first, second)
    options = {"adapter": [first, second]}
    np.testing.assert_allclose(
        Encoder.from_pretrained(tiny_llama, **options, **CPU).encode(TEXTS), expected, atol=1e-4
    )
    np.testing.assert_allclose(
        Encoder.from_pretrained(first, adapter=second, **CPU).encode(TEXTS), expected, atol=1e-4
    )
    np.testing.assert_allclose(Encoder.from_pretrained(second, **CPU).encode(TEXTS), expected, atol=1e-4)
    encoder = Encoder.from_pretrained(tiny_llama, **CPU)
    encoder.merge(first, second)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-4)
    assert adapter_chain(str(second), {"revision": "abc"}) == (
        str(tiny_llama),
        [str(first), str(second)],
        {"revision": None},
    )
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        encoder.merge(tmp_path)


@pytest.mark.parametrize("merge", [True, False], ids=["merge", "save-alone"])
def test_attached_adapter_is_saved_merged(tiny_llama, tmp_path, merge):
    """Regression: `load_adapter`, then `save`, kept the adapter and lost the model's mode."""
    folder = save_adapter(tiny_llama, tmp_path / "adapter")
    encoder = Encoder.from_pretrained(tiny_llama, **CPU)
    encoder.load_adapter(str(folder))
    if merge:
        encoder.merge()
        assert not any("lora" in name for name, _ in encoder.named_parameters())
    encoder.save(tmp_path / "saved")
    expected = merged(tiny_llama, folder)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-4)
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS), expected, atol=1e-4
    )


def test_adapter_of_a_causal_task_is_merged(tiny_llama, tmp_path):
    """Regression: nearly all of the hub name it, and peft's class for it asks for a head's methods."""
    folder = save_adapter(tiny_llama, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": "CAUSAL_LM"}))
    expected = merged(tiny_llama, folder)
    np.testing.assert_allclose(
        Encoder.from_pretrained(tiny_llama, adapter=folder, **CPU).encode(TEXTS), expected, atol=1e-4
    )


@pytest.mark.parametrize("attention", ["uncausal", "sdpa"])
def test_an_adapter_of_the_embeddings_encodes(tiny_llama, attention):
    """Regression: the layer that peft puts in their place has no number of embeddings."""
    encoder = Encoder.from_pretrained(tiny_llama, device="cpu", dtype="float32", attention=attention)
    before = encoder.encode(["a fox", "the lazy dog"])
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    np.testing.assert_allclose(encoder.encode(["a fox", "the lazy dog"]), before, atol=1e-6)


def test_saving_leaves_an_attached_adapter_to_be_trained(tiny_llama, tmp_path):
    """Regression: a trainer's first checkpoint merged it, and the next step had nothing to train."""
    encoder = Encoder.from_pretrained(tiny_llama, **CPU)
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    before = encoder.encode(TEXTS)
    encoder.save(tmp_path / "checkpoint")
    assert trained and trained == [n for n, p in encoder.named_parameters() if p.requires_grad]
    assert np.array_equal(encoder.encode(TEXTS), before)
    again = Encoder.from_pretrained(tmp_path / "checkpoint", **CPU)
    np.testing.assert_allclose(again.encode(TEXTS), before, atol=1e-5)


def test_the_copy_that_is_merged_takes_no_gradients_along(tiny_llama):
    """It is made where a device may have no room: of the weights alone, on the CPU, tied ones once."""
    encoder = Encoder.from_pretrained(tiny_llama, **CPU)
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    encoder.backbone.twin = encoder.backbone.norm
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    copied = encoder._copied_to_cpu()
    assert copied.backbone.twin.weight is copied.backbone.norm.weight
    for (name, one), (other, twin) in zip(encoder.named_parameters(), copied.named_parameters(), strict=True):
        assert name == other and torch.equal(one, twin) and twin.grad is None
        assert one.data_ptr() != twin.data_ptr() and one.requires_grad == twin.requires_grad


def test_an_alibi_encoder_of_an_earlier_version_is_loaded(tiny_llama, tmp_path, caplog):
    tiny_model("bloom", "eager", vocab_size=512).save_pretrained(tmp_path / "bloom")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "bloom")
    with pytest.raises(NotBidirectionalError, match="ALiBi is right under a causal mask alone"):
        Encoder.from_pretrained(tmp_path / "bloom", max_seq_length=32, **CPU)
    causal = Encoder.from_pretrained(tmp_path / "bloom", bidirectional=False, max_seq_length=32, **CPU)
    causal.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    assert np.isfinite(Encoder.from_pretrained(tmp_path / "saved", **CPU).encode(TEXTS)).all()
    assert "this one was saved so, and is loaded as it was" in caplog.text


def test_saving_says_where_others_attend_causally(tiny_llama, tmp_path, caplog):
    encoder = Encoder.from_pretrained(tiny_llama, **CPU)
    encoder.save(tmp_path / "llama")
    assert "attends causally" not in caplog.text
    encoder.backbone.config.model_type = "stablelm"
    encoder._warn_of_plain_reload()
    assert "stablelm attends causally where nothing is padded" in caplog.text


def test_saved_adapter_says_that_it_stays_causal(tiny_llama, tmp_path, caplog):
    """An encoder that an earlier version saved as an adapter alone does not tell its mode."""
    folder = save_adapter(tiny_llama, tmp_path / "saved")
    Encoder.from_pretrained(tiny_llama, **CPU).save(tmp_path / "plain")
    for name in (
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (folder / name).write_bytes((tmp_path / "plain" / name).read_bytes())
    (tmp_path / "plain" / "1_Pooling").rename(folder / "1_Pooling")
    Encoder.from_pretrained(folder, **CPU)
    assert "is an adapter" in caplog.text and "bidirectional=True" in caplog.text
    encoder = Encoder.from_pretrained(folder, bidirectional=True, pooling="mean", **CPU)
    np.testing.assert_allclose(encoder.encode(TEXTS), merged(tiny_llama, folder), atol=1e-4)


def test_adapter_on_a_head_is_refused(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"])).save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match="lm_head"):
        load_adapter(backbone, tmp_path, headless=False)


@pytest.mark.parametrize("attention", ["uncausal", "sdpa", "eager"])
def test_saved_encoder_is_proved_anew(tiny_llama, tmp_path, attention, monkeypatch):
    """StableLM under sdpa reads its layers' own flag, which is not saved: it came back causal."""
    model = tiny_model("stablelm", "eager", vocab_size=512)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    options = {"attention": attention, **CPU}
    encoder = Encoder.from_pretrained(tmp_path / "base", max_seq_length=32, **options)
    ids = [encoder.tokenizer.decode([5, 6, 7]), encoder.tokenizer.decode([9, 10])]
    encoder.save(tmp_path / "saved")
    again = Encoder.from_pretrained(tmp_path / "saved", **options)
    np.testing.assert_allclose(again.encode(ids), encoder.encode(ids), atol=1e-5)
    monkeypatch.setattr("uncausal.encoder.model.make_bidirectional", lambda model: model)
    if attention == "sdpa":
        with pytest.raises(NotBidirectionalError, match=r"layers\.0\.self_attn .* stays causal"):
            Encoder.from_pretrained(tmp_path / "saved", **options)


def test_quick_proof_is_one_pass():
    model = tiny_model("llama", "uncausal", num_hidden_layers=6)
    passes = []
    model.register_forward_pre_hook(lambda module, args, kwargs: passes.append(1), with_kwargs=True)
    with pytest.raises(NotBidirectionalError, match=r"layers\.0\.self_attn"):
        assert_bidirectional(model, quick=True)
    assert len(passes) == 1


def test_hub_options_reach_every_file(tiny_llama, monkeypatch):
    """Regression: revision, token and cache_dir went to the weights alone, not to config and tokenizer."""
    from transformers import AutoConfig, AutoProcessor

    seen = {}
    for kind in (AutoConfig, AutoModel, AutoProcessor):
        original = kind.from_pretrained

        def spy(*args, _kind=kind, _original=original, **kwargs):
            seen.setdefault(_kind.__name__, kwargs)
            return _original(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", spy)
    wanted = {
        "revision": "v2",
        "token": "secret",
        "trust_remote_code": True,
        "cache_dir": str(tiny_llama / "cache"),
        "local_files_only": True,
    }
    encoder = Encoder.from_pretrained(tiny_llama, **wanted, **CPU)
    assert set(seen) == {"AutoConfig", "AutoModel", "AutoProcessor"}
    for name, kwargs in seen.items():
        assert {key: kwargs.get(key) for key in wanted} == wanted, name
    assert encoder.spec is not None and encoder.spec.hub == wanted and "secret" not in repr(encoder.spec)


def test_hub_options_reach_a_saved_encoder(tiny_llama, tmp_path, monkeypatch):
    Encoder.from_pretrained(tiny_llama, **CPU).save(tmp_path)
    seen = {}
    original = Encoder._load_modules
    monkeypatch.setattr(
        Encoder,
        "_load_modules",
        lambda self, name, **kwargs: seen.update(kwargs) or original(self, name, **kwargs),
    )
    Encoder.from_pretrained(tmp_path, revision="v2", token="secret", cache_dir="somewhere", **CPU)
    assert (seen["revision"], seen["token"], seen["cache_folder"]) == ("v2", "secret", "somewhere")


def test_unknown_argument_is_refused(tiny_llama):
    """Regression: `**kwargs` took misspelt names to transformers, which ignores some."""
    with pytest.raises(TypeError, match="poolling"):
        Encoder.from_pretrained(tiny_llama, poolling="mean")


def test_pickled_weights_are_refused(tiny_llama, tmp_path):
    """Nothing is unpickled unless asked for, and the message says how to ask."""
    for file in tiny_llama.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="use_safetensors=False"):
        Encoder.from_pretrained(tmp_path, **CPU)
    encoder = Encoder.from_pretrained(tmp_path, use_safetensors=False, **CPU)
    np.testing.assert_allclose(encoder.encode(TEXTS), merged(tiny_llama), atol=1e-5)


@pytest.mark.parametrize("size", [5, 300, -9])
def test_damaged_weights_are_told_by_name(tiny_llama, tmp_path, size):
    for file in tiny_llama.iterdir():
        whole = file.read_bytes()
        (tmp_path / file.name).write_bytes(whole[:size] if file.suffix == ".safetensors" else whole)
    with pytest.raises(ValueError, match=f"{tmp_path}: its weights are damaged or cut short"):
        Encoder.from_pretrained(tmp_path, **CPU)


@pytest.mark.parametrize("saved", [False, True])
def test_tokenizer_of_another_model_is_refused(tiny_llama, tmp_path, saved, caplog):
    """Its tokens beyond the embeddings were an IndexError at the first text that has one."""
    encoder = Encoder.from_pretrained(tiny_llama, **CPU)
    rows = encoder.backbone.get_input_embeddings().num_embeddings
    if saved:
        encoder.save(tmp_path)
    else:
        encoder.backbone.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens([f"<new {i}>" for i in range(rows - len(tokenizer) + 1)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"'<new \d+>' is number {rows}, and the model has {rows} embeddings"
    ):
        Encoder.from_pretrained(tmp_path, **CPU)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(rows)  # as Llama's fine-tuned have it
    tokenizer.save_pretrained(tmp_path)
    found = Encoder.from_pretrained(tmp_path, **CPU)
    assert np.isfinite(found.encode(TEXTS)).all()
    packed = found.encode(TEXTS)
    with found.padded():  # regression: an IndexError
        np.testing.assert_allclose(found.encode(TEXTS), packed, atol=1e-5)
    found.save(tmp_path / "again")
    assert "batches fail: the pad token has no embedding" in caplog.text
    again = Encoder.from_pretrained(tmp_path / "again", **CPU)
    np.testing.assert_array_equal(again.encode(TEXTS), found.encode(TEXTS))


def test_tokenizer_without_pad_token(tiny_llama, tmp_path):
    """Regression: a saved encoder of a Llama could not batch in plain sentence-transformers."""
    assert AutoTokenizer.from_pretrained(tiny_llama).pad_token is None
    encoder = Encoder.from_pretrained(tiny_llama, **CPU)
    encoder.save(tmp_path)
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(plain.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    with encoder.padded():
        np.testing.assert_allclose(encoder.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)


def test_tokenizer_without_any_special_token(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.eos_token = tokenizer.bos_token = None
    with pytest.raises(ValueError, match="set its pad_token"):
        ensure_pad_token(tokenizer)


@pytest.mark.parametrize("family, found", [("bloom", "eager"), ("falcon", "sdpa"), ("llama4_text", "sdpa")])
def test_attention_auto_falls_back(tiny_llama, tmp_path, caplog, family, found):
    """Models with no form for the packed attention are encoded with torch's, and say so once."""
    tiny_model(family, "eager", vocab_size=512).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    bidirectional = False if family in ("llama4_text", "bloom") else None
    options = {"max_seq_length": 32, "bidirectional": bidirectional, **CPU}
    encoder = Encoder.from_pretrained(tmp_path, **options)
    assert encoder.backbone.config._attn_implementation == found and not encoder.packed
    assert len([r for r in caplog.records if "torch's attention" in r.message]) == 1
    texts = [encoder.tokenizer.decode([5, 6, 7]), encoder.tokenizer.decode([9, 10])]
    single = np.stack([encoder.encode(text) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), single, atol=1e-4)
    with pytest.raises((KeyError, NotImplementedError, ValueError)):
        Encoder.from_pretrained(tmp_path, attention="uncausal", **options)


def test_a_layer_that_stays_causal_is_no_reason_to_fall_back(tiny_llama, monkeypatch, caplog):
    monkeypatch.setattr("uncausal.encoder.model.make_bidirectional", lambda model: model)
    with pytest.raises(NotBidirectionalError, match="stays causal"):
        Encoder.from_pretrained(tiny_llama, **CPU)
    assert "torch's attention" not in caplog.text


def test_spec_has_every_argument():
    arguments = list(inspect.signature(Encoder.from_pretrained).parameters.values())
    fields = {field.name: field.default for field in dataclasses.fields(EncoderSpec)}
    assert [argument.name for argument in arguments] == list(fields)
    assert all(fields[a.name] == a.default for a in arguments[1:])


def test_spec_rebuilds_the_encoder_in_another_process(tiny_llama, tmp_path):
    first = save_adapter(tiny_llama, tmp_path / "adapter")
    options = {
        "pooling": "last_token",
        "num_layers": 1,
        "normalize": True,
        "template": "chat",
        "adapter": first,
    }
    encoder = Encoder.from_pretrained(tiny_llama, max_seq_length=12, **options, **CPU)
    assert encoder.spec is not None
    (tmp_path / "spec.pickle").write_bytes(pickle.dumps(encoder.spec))
    code = (
        "import pickle, sys, numpy\n"
        "spec = pickle.load(open(sys.argv[1] + '/spec.pickle', 'rb'))\n"
        f"numpy.save(sys.argv[1] + '/vectors.npy', spec.load().encode({TEXTS!r}))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), encoder.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("name", ["float23", "Tensor", "int8"])
def test_unknown_dtype_is_named(name):
    """Regression: an AttributeError of torch, and 'Tensor' or 'int8' went further."""
    with pytest.raises(ValueError, match=f"dtype '{name}' is unknown"):
        resolve_dtype(name)
    assert resolve_dtype("bfloat16") == torch.bfloat16


def test_adapter_files_are_fetched(monkeypatch, tmp_path):
    asked = []

    def cached_file(source, name, **options):
        asked.append((source, name, options))
        return str(tmp_path / name)

    monkeypatch.setattr(loading, "cached_file", cached_file)
    hub = {"revision": "v2", "token": "t", "trust_remote_code": True, "cache_dir": "c"}
    assert loading.adapter_folder("someone/adapter", hub) == str(tmp_path)
    assert [name for _, name, _ in asked] == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(options == {"revision": "v2", "token": "t", "cache_dir": "c"} for *_, options in asked)


def test_head_is_looked_for_where_the_model_was(tiny_llama, monkeypatch):
    """Regression: the head of MNTP came from the main revision, without a token, whatever the model's was."""
    from uncausal.encoder.training import lm_head

    asked = []
    monkeypatch.setattr(
        lm_head, "cached_file", lambda source, name, **options: asked.append((source, name, options))
    )
    encoder = Encoder.from_pretrained(tiny_llama, revision="v2", token="t", cache_dir="c", **CPU)
    encoder.backbone.config.tie_word_embeddings = False
    encoder.backbone.config._name_or_path = "someone/model"
    assert encoder.spec is not None
    for source, revision in ((None, "v2"), ("other/model", None)):
        asked.clear()
        with pytest.raises(ValueError, match="no language-model head"):
            lm_head.find_head(encoder.backbone, source, encoder.spec.hub)
        wanted = {"revision": revision, "token": "t", "cache_dir": "c", "local_files_only": False}
        assert len(asked) == 2
        for found, _, options in asked:
            assert found == (source or "someone/model") and wanted.items() <= options.items()


PRIVATE = {
    Transformer: ["_load_model", "_can_flatten_inputs", "_get_prompt_length", "can_flatten_inputs"],
    SentenceTransformer: [
        "_inference",
        "_multi_process",
        "_post_init",
        "_parse_model_config",
        "_get_model_config",
        "_resolve_inference_device",
        "_last_module",
        "_load_modules",
        "_module_classes",
        "_model_card_model_id_placeholder",
        "get_model_kwargs",
    ],
}


def test_private_hooks_of_sentence_transformers_are_there():
    """The package leans on these names; a release that drops one must fail here and not in silence."""
    source = inspect.getsource(Transformer)
    missing = [
        f"{kind.__name__}.{name}"
        for kind, names in PRIVATE.items()
        for name in names
        if not hasattr(kind, name) and f"self.{name} = " not in source
    ]
    assert not missing, f"sentence-transformers has lost {missing}"
    ours = {**vars(Encoder), **{f"t.{k}": v for k, v in vars(type(Encoder)).items()}}
    overridden = {
        n for n in ours if n.startswith("_") and not n.startswith("__") and hasattr(SentenceTransformer, n)
    }
    assert overridden <= {*PRIVATE[SentenceTransformer], "_abc_impl"}, (
        "a hook is overridden that the list lacks"
    )
    parameters = inspect.signature(Transformer._load_model).parameters
    assert list(parameters)[1:6] == [
        "model_name_or_path",
        "transformer_task",
        "config",
        "backend",
        "is_peft_model",
    ]
    assert "unpad_inputs" in dir(Transformer) and "model_forward_params" in source
