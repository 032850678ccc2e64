"""The encoder: the same vector whatever the batch, order, padding side and attention; saving; bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, LlamaConfig, LlamaModel

from uncausal.encoder.files import staged
from uncausal.encoder.model import Encoder

TEXTS = [
    "A man is playing a guitar.",
    "Autism is a neurodevelopmental disorder characterized by impaired social interaction, communication and "
    "restricted and repetitive behavior; parents usually notice signs in the first two years of life.",
    "Yes",
    "The cat sat on the mat, and the dog beside it.",
    "Two words",
]
POOLINGS = ["mean", "weighted_mean", "last_token"]


@pytest.fixture(scope="module")
def encoder(smollm2):
    return Encoder.from_pretrained(smollm2, num_layers=3, device="cpu", dtype="float32")


def padded(encoder, texts, side, attention):
    """Encode with the library alone: padded batches and its own attention."""
    plain = SentenceTransformer(modules=list(encoder.children()), device="cpu")
    plain[0].model.set_attn_implementation(attention)
    plain[0].tokenizer.padding_side = side
    try:
        with encoder.padded():
            return plain.encode(texts)
    finally:
        plain[0].model.set_attn_implementation("uncausal")
        plain[0].tokenizer.padding_side = "right"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_encode_is_the_same_however_it_is_batched(encoder, pooling):
    encoder.set_pooling(pooling)
    vectors = encoder.encode(TEXTS)
    alone = np.stack([encoder.encode(text) for text in TEXTS])
    turned = encoder.encode(TEXTS[::-1], batch_tokens=16)[::-1]
    assert vectors.std(axis=0).min() > 0, "the texts must differ for this test to mean anything"
    np.testing.assert_allclose(alone, vectors, rtol=0, atol=1e-4)
    np.testing.assert_allclose(turned, vectors, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "uncausal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_encode_agrees_with_padded_batches_on_both_sides(encoder, pooling, attention, side):
    """Regression: public code pooled padding, and left padding moved every vector."""
    encoder.set_pooling(pooling)
    np.testing.assert_allclose(
        padded(encoder, TEXTS, side, attention), encoder.encode(TEXTS), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_prompt_is_attended_but_not_pooled(encoder, pooling):
    encoder.set_pooling(pooling)
    prompt = "Retrieve a duplicate question:\n"
    vector = encoder.encode(TEXTS[0], prompt=prompt)
    assert np.abs(vector - encoder.encode(TEXTS[0])).max() > 1e-2, "the prompt was not attended"
    ids = encoder.tokenizer(prompt + TEXTS[0], return_tensors="pt")["input_ids"]
    skipped = len(encoder.tokenizer(prompt)["input_ids"])
    with torch.inference_mode():
        hidden = encoder.backbone(ids).last_hidden_state[0].double()
    weights = torch.arange(1, len(hidden) + 1).double()[:, None]
    weights = {
        "mean": weights * 0 + 1,
        "weighted_mean": weights,
        "last_token": (weights == len(hidden)).double(),
    }
    weight = weights[pooling][skipped:]
    expected = (hidden[skipped:] * weight).sum(0) / weight.sum()
    np.testing.assert_allclose(vector, expected.numpy(), rtol=0, atol=1e-4)


def test_packed_documents_do_not_see_each_other(encoder):
    encoder.set_pooling("mean")
    first = encoder.encode([TEXTS[0], TEXTS[1]], batch_tokens=4096)[0]
    second = encoder.encode([TEXTS[0], TEXTS[3]], batch_tokens=4096)[0]
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)


def test_pooling_over_nothing_raises(encoder):
    """Regression: an empty instruction mask once pooled the padding instead of failing."""
    with pytest.raises(ValueError, match="left to pool"):
        encoder[0].preprocess(["x"], prompt="word " * 8, max_length=4)


def test_long_texts_are_counted_when_cut(encoder, caplog):
    encoder.set_pooling("mean")
    limit, encoder.max_seq_length = encoder.max_seq_length, 12
    try:
        exactly = encoder.tokenizer.decode(encoder.tokenizer(TEXTS[1])["input_ids"][:12])
        encoder.encode([*TEXTS, exactly])
        assert "2 of 6 texts were longer than 12 tokens" in caplog.text
        caplog.clear()
        encoder.encode([exactly])
        assert not caplog.text
    finally:
        encoder.max_seq_length = limit


@pytest.mark.parametrize("pooling", POOLINGS)
def test_saved_encoder_loads_without_this_package(encoder, tmp_path, pooling):
    encoder.set_pooling(pooling)
    path = tmp_path / "encoder"
    encoder.save_pretrained(str(path))
    code = (
        "import json, sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'uncausal': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu')\n"
        "print(json.dumps(model.encode(json.loads(sys.argv[2])).tolist()))\n"
    )
    command = [sys.executable, "-c", code, str(path), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    vectors = np.array(json.loads(done.stdout.splitlines()[-1]))
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS), rtol=0, atol=1e-4)
    again = Encoder.from_pretrained(path, device="cpu", dtype="float32")
    assert again.packed and again.pooling == pooling and len(again.backbone.layers) == 3
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-5)


def test_saved_causal_encoder_stays_causal(smollm2, tmp_path):
    options = {"device": "cpu", "dtype": "float32"}
    causal = Encoder.from_pretrained(smollm2, bidirectional=False, num_layers=1, **options)
    causal.save_pretrained(str(tmp_path / "causal"))
    again = Encoder.from_pretrained(tmp_path / "causal", **options)
    np.testing.assert_allclose(again.encode(TEXTS), causal.encode(TEXTS), rtol=0, atol=1e-5)
    both = Encoder.from_pretrained(tmp_path / "causal", bidirectional=True, **options)
    assert np.abs(both.encode(TEXTS) - causal.encode(TEXTS)).max() > 1e-2


def test_saved_config_is_bidirectional_for_transformers_alone(encoder, tmp_path):
    """Regression: public conversions produced checkpoints that loaded silently causal."""
    encoder.save_pretrained(str(tmp_path))
    for attention in ("eager", "sdpa"):
        model = AutoModel.from_pretrained(tmp_path, attn_implementation=attention)
        ids = torch.tensor([[504, 2644, 314, 4025]])
        changed = ids.clone()
        changed[0, -1] = 905
        with torch.inference_mode():
            difference = model(ids).last_hidden_state[0, 1] - model(changed).last_hidden_state[0, 1]
        assert difference.abs().max() > 1e-3, attention


def test_failed_save_leaves_the_earlier_one(encoder, tmp_path, monkeypatch):
    path = tmp_path / "encoder"
    encoder.set_pooling("mean")
    encoder.save_pretrained(str(path))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(encoder.tokenizer), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        encoder.save_pretrained(str(path))
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder"]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 6])
def test_save_interrupted_while_it_replaces_leaves_one_of_both(tiny_llama, tmp_path, monkeypatch, step):
    """Regression: files were moved one by one, and weights of one save met another's configuration."""
    path = tmp_path / "encoder"
    encoder = Encoder.from_pretrained(tiny_llama, dtype="float32", device="cpu")
    encoder.save(path)
    weights = (path / "model.safetensors").read_bytes()
    names = sorted(p.relative_to(path) for p in path.rglob("*"))
    encoder.prune(1)
    monkeypatch.setattr("uncausal.encoder.files._exchange", lambda *_: False)
    calls = []
    for name in ("replace", "rename"):
        original = getattr(Path, name)

        def interrupted(self, target, original=original, name=name):
            if self.name != "README.md" or name == "replace":
                calls.append(self)
            if len(calls) == step:
                raise KeyboardInterrupt
            return original(self, target)

        monkeypatch.setattr(Path, name, interrupted)
    try:
        encoder.save(path)
    except KeyboardInterrupt:
        assert (path / "model.safetensors").read_bytes() == weights
        assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 2
        assert sorted(p.relative_to(path) for p in path.rglob("*")) == names
    else:
        assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder"]


def test_save_leaves_no_weights_of_an_earlier_one(tiny_llama, tmp_path):
    """Regression: an earlier save's shards, adapter and pooling stayed and were loaded."""
    path = tmp_path / "encoder"
    (path / "1_LatentPooling").mkdir(parents=True)
    (path / "checkpoints").mkdir()
    (path / "modules.json").write_text('[{"path": ""}, {"path": "1_LatentPooling"}]')
    old = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json"]
    for name in (
        *old,
        "adapter_model.safetensors",
        "1_LatentPooling/config.json",
        "notes.txt",
        "checkpoints/1",
    ):
        (path / name).write_text("{}")
    (tmp_path / "link").symlink_to(path)
    encoder = Encoder.from_pretrained(tiny_llama, dtype="float32", device="cpu")
    encoder.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    left = {p.name for p in path.iterdir()}
    assert not left & {*old, "adapter_model.safetensors", "1_LatentPooling"}
    assert (path / "notes.txt").exists() and (path / "checkpoints" / "1").exists(), "what is not ours stays"
    np.testing.assert_allclose(SentenceTransformer(str(path)).encode(TEXTS), encoder.encode(TEXTS), atol=1e-4)


def test_save_removes_nothing_that_is_not_a_saves(tiny_llama, tmp_path):
    """Regression: a user's `2024_data/` and `model.py` were taken for an earlier save's, and were gone."""
    kept = {"2024_data/rows.txt", "1_Data/rows.txt", "model.py", "model-notes.md", "README.md"}
    kept |= {"model_v1.bin", "pytorch_model.bin"}
    for name in kept:
        (tmp_path / "encoder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "encoder" / name).write_text("mine")
    encoder = Encoder.from_pretrained(tiny_llama, dtype="float32", device="cpu")
    for _ in range(
        2
    ):  # the second time it is a model's folder, and weights of another name are an earlier save's
        encoder.save(tmp_path / "encoder")
        assert {name for name in kept if (tmp_path / "encoder" / name).exists()} == kept
        assert all((tmp_path / "encoder" / name).read_text() == "mine" for name in kept)
        kept -= {"pytorch_model.bin"}


def test_saved_over_another_has_no_chat_template_of_it(tiny_llama, byte_llama, tmp_path):
    """Regression: an encoder without a chat template came back with that of the one saved there before."""
    for folder in (tiny_llama, byte_llama):
        Encoder.from_pretrained(folder, dtype="float32", device="cpu").save(tmp_path / "encoder")
    assert Encoder(str(tmp_path / "encoder"), device="cpu").tokenizer.chat_template is None


def test_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    """Regression: SIGKILL between two renames left no model under the name, only a hidden folder."""
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Path, "rename", None)
    for content in ("first", "second"):
        with staged(tmp_path / "folder") as staging:
            (staging / "file").write_text(content)
        assert (tmp_path / "folder" / "file").read_text() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("where", [".", ".."])
def test_the_folder_one_is_in_is_not_replaced(tmp_path, monkeypatch, where):
    """Regression: after `save(".")` the process, and the shell around it, stood in a folder that was gone."""
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "folder" / "inside")
    with pytest.raises(ValueError, match="is the folder you are in"), staged(Path(where)):
        raise AssertionError("something was written")
    assert Path.cwd().exists()


def test_folder_that_cannot_be_replaced_is_found_first(tmp_path, monkeypatch):
    """Regression: a folder that is a mount point, or whose parent is read-only, failed after all the work."""
    for name, value in (("os.path.ismount", lambda _: True), ("os.access", lambda *_: False)):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            with pytest.raises(ValueError, match="name one inside it"), staged(tmp_path):
                raise AssertionError("something was written")


def test_staged_copies_where_there_are_no_links(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("kept")

    def no_links(*_args, **_kwargs):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", no_links)
    with staged(tmp_path / "folder") as staging:
        (staging / "new").write_text("new")
    assert {p.name: p.read_text() for p in (tmp_path / "folder").iterdir()} == {"kept": "kept", "new": "new"}


def test_model_card_names_the_model(tiny_llama, tmp_path):
    """Regression: the card kept its placeholder where a model_name was given."""
    encoder = Encoder.from_pretrained(tiny_llama, dtype="float32", device="cpu")
    encoder.save(tmp_path / "first", model_name="someone/encoder")
    encoder.save(tmp_path / "unnamed")
    SentenceTransformer(str(tmp_path / "unnamed"), device="cpu").save(str(tmp_path / "plain"))
    Encoder(str(tmp_path / "unnamed"), device="cpu").save(tmp_path / "again", model_name="someone/encoder")
    Encoder(str(tmp_path / "plain"), device="cpu").save(tmp_path / "ours", model_name="someone/encoder")
    for folder in ("first", "again", "ours"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "someone/encoder" in card and "sentence_transformers_model_id" not in card


def test_a_changed_encoder_has_a_card_of_its_own(tiny_llama, tmp_path):
    """Regression: what was loaded, changed and saved kept the card of what it had been."""
    Encoder.from_pretrained(tiny_llama, dtype="float32", device="cpu").save(tmp_path / "first")
    width = Encoder(str(tmp_path / "first"), device="cpu").get_embedding_dimension()
    texts = [f"{a} {b}" for a in "hello world quick brown fox lazy dog plants".split() for b in "abcdefghijk"]
    for name, change in (("map", lambda e: e.whiten(texts, dim=8)), ("depth", lambda e: e.prune(1))):
        encoder = Encoder(str(tmp_path / "first"), device="cpu")
        change(encoder)
        encoder.save(tmp_path / name)
    first, mapped, pruned = ((tmp_path / n / "README.md").read_text() for n in ("first", "map", "depth"))
    assert f"{width} dimensions" in first and "8 dimensions" in mapped and mapped != first != pruned


@pytest.mark.parametrize("prompt", [None, "Query: "])
def test_a_text_in_a_dict_is_the_text(tiny_llama, prompt):
    """Regression: its template and prompt were pooled, and an empty one encoded."""
    encoder = Encoder.from_pretrained(tiny_llama, dtype="float32", device="cpu", template="chat")
    expected = encoder.encode(["hello world"], prompt=prompt)
    assert np.array_equal(encoder.encode([{"text": "hello world"}], prompt=prompt), expected)
    with pytest.raises(ValueError, match="text 0 is empty"):
        encoder.encode([{"text": " "}])


def test_unwritable_folder_is_an_error(encoder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        encoder.save_pretrained(str(tmp_path / "file" / "encoder"))


@pytest.mark.parametrize("path", ["./nowhere", "a/b/c"])
def test_unknown_model_is_named(path):
    with pytest.raises(FileNotFoundError, match=path):
        Encoder.from_pretrained(path)


def test_unreachable_model_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no model 'nobody/nothing'"):
        Encoder.from_pretrained("nobody/nothing")


def test_gguf_is_parsed_once_a_load(tmp_path, monkeypatch):
    """What transformers asks the gguf package for again and again took ten of seventeen seconds."""
    import gguf
    from transformers import AutoModel, AutoTokenizer

    from uncausal.encoder.loading import located

    before, readers = gguf.GGUFReader, []
    writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "notamodel")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    def read(*_, **__):
        readers.append(gguf.GGUFReader(tmp_path / "odd.gguf"))

    def fail(*_, **__):
        read()
        raise ValueError("of no use")

    monkeypatch.setattr(AutoModel, "from_pretrained", read)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ValueError, match="of no use"), located(tmp_path, "odd.gguf"):
        pass
    assert readers[0] is readers[1] and gguf.GGUFReader is before


def test_unsupported_gguf_is_named(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "odd.gguf"), "notamodel")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="odd.gguf.*notamodel"):
        Encoder.from_pretrained(tmp_path / "odd.gguf")


def test_unknown_pooling_is_named(smollm2):
    with pytest.raises(ValueError, match="'max' is unknown"):
        Encoder.from_pretrained(smollm2, pooling="max")


def test_token_embeddings_have_one_row_a_token(encoder):
    encoder.set_pooling("mean")
    hidden = encoder.encode(TEXTS, output_value="token_embeddings")
    lengths = [len(ids) for ids in encoder.tokenizer(TEXTS)["input_ids"]]
    assert [len(rows) for rows in hidden] == lengths
    np.testing.assert_allclose(hidden[0].mean(0), encoder.encode(TEXTS[0]), rtol=0, atol=1e-4)


def test_normalize_and_truncate(encoder):
    encoder.set_pooling("mean")
    vectors = encoder.encode(TEXTS, truncate_dim=64, normalize_embeddings=True)
    assert vectors.shape == (len(TEXTS), 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_new_model_without_gguf(tmp_path, smollm2):
    """A folder of safetensors without sentence-transformers' files is converted as well."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaModel(config).save_pretrained(tmp_path)
    Encoder.from_pretrained(smollm2, num_layers=1).tokenizer.save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, pooling="weighted_mean", normalize=True, dtype="float32")
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(TEXTS), axis=1), 1, atol=1e-5)


def test_latent_pooling_saves_and_loads(smollm2, tmp_path):
    encoder = Encoder.from_pretrained(smollm2, num_layers=1, pooling="latent", dtype="float32", device="cpu")
    assert encoder.pooling == "latent"
    encoder.save_pretrained(str(tmp_path / "latent"))
    again = Encoder.from_pretrained(tmp_path / "latent", dtype="float32", device="cpu")
    assert again.pooling == "latent" and again.packed
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(again.encode(TEXTS), vectors, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS[1]), vectors[1], rtol=0, atol=1e-4)
    with encoder.padded():
        np.testing.assert_allclose(encoder.encode(TEXTS), vectors, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cast", [False, True])
def test_latent_pooling_of_a_bfloat16_encoder_has_the_same_bits_after_a_reload(tiny_llama, tmp_path, cast):
    """Regression: the reload, or a cast, rounded the pooling's weights, which were in float32 before."""
    encoder = Encoder.from_pretrained(tiny_llama, pooling="latent", dtype="bfloat16", device="cpu")
    vectors = encoder.encode(TEXTS, convert_to_tensor=True)
    if cast:
        encoder[1].to("cpu", torch.bfloat16)
    assert torch.equal(encoder.encode(TEXTS, convert_to_tensor=True), vectors)
    for number in range(2):
        encoder.save(tmp_path / f"{number}")
        encoder = Encoder.from_pretrained(tmp_path / f"{number}", dtype="bfloat16", device="cpu")
        assert torch.equal(encoder.encode(TEXTS, convert_to_tensor=True), vectors)


def test_encoder_cast_to_bfloat16_has_the_same_bits_after_a_reload(tiny_llama, tmp_path):
    """Regression: the cast rounded the rotary frequencies, which are not saved: a reload had exact ones."""
    encoder = Encoder.from_pretrained(tiny_llama, dtype="float32", device="cpu").bfloat16()
    encoder.save(tmp_path / "saved")
    again = Encoder.from_pretrained(tmp_path / "saved", dtype="bfloat16", device="cpu")
    found, vectors = (one.encode(TEXTS, convert_to_tensor=True) for one in (again, encoder))
    assert torch.equal(found, vectors)
