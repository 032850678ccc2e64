"""Corpora in shards: interrupted, resumed and shared runs write the bytes of an undisturbed one."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from uncausal import Encoder
from uncausal.encoder.data.rows import DataError
from uncausal.encoder.serving import corpus
from uncausal.encoder.serving.corpus import (
    CorpusSettings,
    corpus_rows,
    encode_corpus,
    model_digest,
    read_corpus,
)

WORDS = "the a cat dog king sees likes paints river music".split()
ROWS = [(f"id{i}", " ".join(WORDS[(i * k) % 10] for k in range(1, 3 + i % 9))) for i in range(57)]
SETTINGS = CorpusSettings(rows_per_shard=10)


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def other(tiny_checkpoint):
    """Another model of the same shape."""
    found = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    with torch.no_grad():
        found.backbone.get_input_embeddings().weight.mul_(-1)
    return found


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory):
    """The files of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    result = encode_corpus(encoder, ROWS, folder, SETTINGS)
    assert (result.encoded, result.found, result.shards) == (57, 0, 6) and result.tokens > 57
    return contents(folder)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_rows_are_those_of_encode(encoder, whole, tmp_path):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    table = read_corpus(tmp_path)
    assert table["id"].to_pylist() == [id for id, _ in ROWS]
    np.testing.assert_allclose(
        table["embedding"].to_pylist(), encoder.encode([t for _, t in ROWS]), atol=1e-6
    )


def test_rerun_encodes_what_is_missing_or_damaged(encoder, whole, tmp_path):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "part-00001.parquet").unlink()
    (tmp_path / "part-00003.parquet").write_bytes(whole["part-00003.parquet"][:-9])
    (tmp_path / "part-00004.json").write_text("{")
    with pytest.raises(ValueError, match="part-00001.parquet: is missing"):
        read_corpus(tmp_path)
    result = encode_corpus(encoder, ROWS, tmp_path, SETTINGS)
    assert (result.encoded, result.found) == (30, 27)
    assert contents(tmp_path) == whole


def test_changed_text_is_encoded_again(encoder, whole, tmp_path):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    changed = [*ROWS[:25], ("id25", "two apples"), *ROWS[26:]]
    result = encode_corpus(encoder, changed, tmp_path, SETTINGS)
    assert (result.encoded, result.found) == (10, 47)


def test_shares_add_up_to_the_whole(encoder, whole, tmp_path):
    for turn in (2, 0, 1):
        encode_corpus(encoder, iter(ROWS), tmp_path, SETTINGS, shard=(turn, 3))
    assert contents(tmp_path) == whole


def test_killed_run_goes_on(tiny_checkpoint, encoder, whole, tmp_path):
    """SIGKILL at some moment: what is there is whole, and the end is the undisturbed run's."""
    script = (
        "import sys; from uncausal import Encoder; from tests.test_corpus import ROWS, SETTINGS\n"
        "from uncausal.encoder.serving.corpus import encode_corpus\n"
        "encoder = Encoder.from_pretrained(sys.argv[1], device='cpu', dtype='float32')\n"
        "encode_corpus(encoder, ROWS, sys.argv[2], SETTINGS)\n"
    )
    command = [sys.executable, "-c", script, str(tiny_checkpoint), str(tmp_path)]
    process = subprocess.Popen(command, cwd=os.path.dirname(os.path.dirname(__file__)))
    while len(list(tmp_path.glob("part-*.parquet"))) < 2 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = list(tmp_path.glob("part-*.parquet"))
    assert len(found) >= 2 and all(file.read_bytes() == whole[file.name] for file in found)
    encode_corpus(encoder, ROWS, tmp_path, SETTINGS)
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith(".")} == whole


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_types_and_dimensions(encoder, tmp_path, dtype):
    settings = CorpusSettings(dtype=dtype, dimension=8, normalize=True)
    encode_corpus(encoder, ROWS, tmp_path, settings)
    table = pq.read_table(tmp_path / "part-00000.parquet")
    found = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    if dtype == "int8":
        assert (abs(found).max(1) == 127).all(), "a scale is of one vector, whatever stands beside it"
        found *= np.array(table["scale"])[:, None]
    cut = encoder.encode([text for _, text in ROWS])[:, :8]
    np.testing.assert_allclose(found, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=5e-3)
    assert table["embedding"].type.value_type == {"float16": "halffloat", "int8": "int8"}[dtype]


def test_an_encoders_own_prompt_and_dimension_hold_for_corpora(tiny_checkpoint, tmp_path, caplog):
    """As `encode` has them; corpora had whole vectors of bare texts."""
    own = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", max_seq_length=6)
    own.prompts, own.default_prompt_name, own.truncate_dim = {"all": "the king "}, "all", 8
    encode_corpus(own, ROWS, tmp_path, SETTINGS)
    table = read_corpus(tmp_path)
    np.testing.assert_allclose(table["embedding"].to_pylist(), own.encode([t for _, t in ROWS]), atol=1e-6)
    assert np.array(table["embedding"].to_pylist()).shape == (57, 8)
    assert "texts were longer than 6 tokens and were cut" in caplog.text


def test_rows_are_let_go_shard_by_shard(encoder, tmp_path):
    """Regression: those of the first shard stayed to the end."""

    class Text(str):  # a weak reference needs a class of its own
        pass

    def drawn():
        for id, text in ((id, Text(text)) for id, text in ROWS):
            kept.append(weakref.ref(text))
            if len(kept) == 41:
                gc.collect()
                alive.append([ref() is not None for ref in kept].index(True))
            yield id, text

    kept, alive = [], []
    encode_corpus(encoder, drawn(), tmp_path / "out", SETTINGS)
    assert alive[0] >= 30


def test_other_settings_are_refused(encoder, whole, tmp_path):
    (tmp_path / "manifest.json").write_bytes(whole["manifest.json"])
    with pytest.raises(ValueError, match=r"differs in dtype \('float32' there, 'int8' here\)"):
        encode_corpus(encoder, ROWS, tmp_path, CorpusSettings(rows_per_shard=10, dtype="int8"))
    with pytest.raises(ValueError, match="shard 3/3 does not exist"):
        encode_corpus(encoder, ROWS, tmp_path, SETTINGS, shard=(3, 3))
    with pytest.raises(ValueError, match="dimension 999 is more than the model has: 32"):
        encode_corpus(encoder, ROWS, tmp_path, CorpusSettings(dimension=999))
    on_a_gpu = whole["manifest.json"].replace(b'"device": "cpu"', b'"device": "cuda"')
    (tmp_path / "manifest.json").write_bytes(on_a_gpu)
    with pytest.raises(ValueError, match=r"differs in device \('cuda' there, 'cpu' here\)"):
        encode_corpus(encoder, ROWS, tmp_path, SETTINGS)


def test_of_two_runs_that_begin_a_folder_with_other_settings_one_is_refused(encoder, tmp_path, monkeypatch):
    """Regression: both saw an empty folder, and it held shards of both."""
    begin = corpus.staged_file

    def meanwhile(file, **options):  # between the look at the folder and the manifest
        monkeypatch.setattr(corpus, "staged_file", begin)
        corpus.open_corpus(encoder, tmp_path, CorpusSettings(rows_per_shard=10, dtype="int8"))
        return begin(file, **options)

    monkeypatch.setattr(corpus, "staged_file", meanwhile)
    with pytest.raises(ValueError, match=r"differs in dtype \('int8' there, 'float32' here\)"):
        corpus.open_corpus(encoder, tmp_path, SETTINGS)


def test_shards_of_a_folder_begun_anew_meanwhile_are_not_taken_for_done(encoder, other, whole, tmp_path):
    """Regression: one process went on in a folder that another model's had begun, and its shards stayed."""
    settings, made_by = corpus.open_corpus(encoder, tmp_path, SETTINGS)
    (tmp_path / "manifest.json").unlink()
    corpus.open_corpus(other, tmp_path, SETTINGS)
    corpus.encode_shard(encoder, ROWS[:10], tmp_path, 0, settings, made_by)
    result = encode_corpus(other, ROWS, tmp_path, SETTINGS)
    assert (result.encoded, result.found) == (57, 0) and read_corpus(tmp_path).num_rows == 57
    corpus.encode_shard(encoder, ROWS[:10], tmp_path, 0, settings, made_by)
    (tmp_path / "input.json").write_bytes(whole["input.json"])
    with pytest.raises(ValueError, match="part-00000.parquet: was made by another model or other settings"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "null", "", "\xff"])
@pytest.mark.parametrize("name", ["input.json", "manifest.json", "part-00002.json"])
def test_damaged_notes_are_told_by_name(encoder, whole, tmp_path, name, content):
    for file, written in whole.items():
        (tmp_path / file).write_bytes(written)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name}: is damaged"):
        read_corpus(tmp_path)
    if name == "manifest.json":
        with pytest.raises(ValueError, match=f"{name}: is damaged"):
            encode_corpus(encoder, ROWS, tmp_path, SETTINGS)
    else:
        encode_corpus(encoder, ROWS, tmp_path, SETTINGS)
        assert contents(tmp_path) == whole


def test_damaged_shards_are_not_read(whole, tmp_path):
    for file, written in whole.items():
        (tmp_path / file).write_bytes(written)
    (tmp_path / "part-00003.parquet").write_bytes(whole["part-00002.parquet"])
    with pytest.raises(ValueError, match="part-00003.parquet: does not hold what was written"):
        read_corpus(tmp_path)


def test_a_shard_is_read_once(whole, tmp_path, monkeypatch):
    """Regression: what was checked was not what was read, where another run put its own in the place."""
    for file, written in whole.items():
        (tmp_path / file).write_bytes(written)
    digest = corpus._digest_of

    def meanwhile(content):
        if content == whole["part-00000.parquet"]:  # has been read
            (tmp_path / "part-00000.parquet").write_bytes(whole["part-00001.parquet"])
        return digest(content)

    monkeypatch.setattr(corpus, "_digest_of", meanwhile)
    assert read_corpus(tmp_path)["id"].to_pylist() == [id for id, _ in ROWS]
    assert (tmp_path / "part-00000.parquet").read_bytes() == whole["part-00001.parquet"]


def test_what_does_not_fit_float16_and_no_rows_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match="holds no row"):
        encode_corpus(encoder, [], tmp_path / "empty", SETTINGS)
    assert not (tmp_path / "empty").exists()
    huge = Encoder(modules=[*encoder, torch.nn.Identity()])
    huge.spec = encoder.spec
    huge[-1].forward = lambda features: {
        **features,
        "sentence_embedding": features["sentence_embedding"] * 1e6,
    }
    with pytest.raises(ValueError, match="is not finite"):
        encode_corpus(huge, ROWS, tmp_path / "half", CorpusSettings(dtype="float16"))
    assert encode_corpus(huge, ROWS, tmp_path / "single", CorpusSettings()).encoded == 57


def test_padded_encoder_is_refused(tiny_checkpoint, tmp_path):
    """Texts of one batch saw one another where the attention does not know where each begins."""
    padded = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", attention="sdpa")
    with pytest.raises(ValueError, match="need the packed attention"):
        encode_corpus(padded, ROWS, tmp_path, SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_refused_call_leaves_the_folder_to_the_next(encoder, tmp_path):
    """Regression: its manifest had the settings that were at fault, and the corrected call was refused."""
    (tmp_path / "in.jsonl").write_text('{"text": "the cat"}\n')
    wrong, right = CorpusSettings(column="txt"), CorpusSettings()
    with pytest.raises(DataError, match="no field 'txt'"):
        encode_corpus(encoder, corpus_rows(tmp_path / "in.jsonl", wrong), tmp_path / "out", wrong)
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        CorpusSettings(batch_tokens=0)
    assert encode_corpus(encoder, corpus_rows(tmp_path / "in.jsonl", right), tmp_path / "out").encoded == 1


def test_unfinished_corpus_is_not_read(encoder, whole, tmp_path):
    """A run killed between two shards left no gap, and was read as the whole."""
    for name in sorted(whole)[:6]:
        (tmp_path / name).write_bytes(whole[name])
    (tmp_path / "input.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="holds no corpus that is finished"):
        read_corpus(tmp_path)


def test_a_corpus_of_two_inputs_is_not_read(encoder, whole, tmp_path):
    """A run over other texts that stops after a shard left the old mark of a finished corpus."""
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    changed = iter([(id, f"{text} two apples") for id, text in ROWS[:20]])

    def stops():
        yield from (row for row, _ in zip(changed, range(12), strict=False))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_corpus(encoder, stops(), tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="holds no corpus that is finished"):
        read_corpus(tmp_path)


def test_a_share_of_another_input_is_not_read(encoder, whole, tmp_path):
    """Regression: a half of the shards was of changed texts, and the end of that input was the mark."""
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    changed = [(id, f"{text} two apples") for id, text in ROWS]
    encode_corpus(encoder, changed, tmp_path, SETTINGS, shard=(0, 2))
    with pytest.raises(ValueError, match="holds shards of more than one input"):
        read_corpus(tmp_path)
    encode_corpus(encoder, changed, tmp_path, SETTINGS, shard=(1, 2))
    assert len(read_corpus(tmp_path)) == 57


def test_a_vector_that_is_not_finite_is_not_written(encoder, tmp_path, monkeypatch):
    norm = encoder.backbone.norm.weight
    value = norm.data.clone()
    norm.data.fill_(float("nan"))
    try:
        with pytest.raises(ValueError, match="the vector of '.+' is not finite"):
            encode_corpus(encoder, ROWS, tmp_path, SETTINGS)
    finally:
        norm.data.copy_(value)
    assert not list(tmp_path.glob("part-*"))


def test_a_note_is_of_what_was_written_and_not_of_what_is_there(encoder, tmp_path, monkeypatch):
    """Regression: a run that put its shard in this one's place was noted as this one's."""
    replace = os.replace

    def race(source, target):
        replace(source, target)
        if str(target).endswith("part-00000.parquet"):
            Path(target).write_bytes(b"of another run")

    monkeypatch.setattr(os, "replace", race)
    encode_corpus(encoder, ROWS, tmp_path, SETTINGS)
    monkeypatch.undo()
    assert encode_corpus(encoder, ROWS, tmp_path, SETTINGS).encoded == 10


def test_unreadable_text_and_id_are_told_by_line(tmp_path):
    """Regression: the id failed in Arrow, once its shard was encoded."""
    for row in ('{"id": "a", "text": "\\ud800"}', '{"id": "\\ud800", "text": "a"}'):
        (tmp_path / "rows.jsonl").write_text(f'{{"id": "b", "text": "b"}}\n{row}\n')
        rows = corpus_rows(tmp_path / "rows.jsonl", CorpusSettings(id_column="id"))
        with pytest.raises(DataError, match=r"rows.jsonl:2: .*surrogate"):
            list(rows)


def test_a_foreign_file_does_not_end_a_run(encoder, tmp_path):
    (tmp_path / "part-old.parquet").write_bytes(b"")
    encode_corpus(encoder, ROWS, tmp_path, SETTINGS)
    assert len(read_corpus(tmp_path)) == 57


def test_another_model_is_refused(tiny_checkpoint, whole, tmp_path):
    """Regression: a causal, a framed or a cutting encoder took the shards of the plain one for its own."""
    (tmp_path / "manifest.json").write_bytes(whole["manifest.json"])
    for change in ({"bidirectional": False}, {"template": "the {text}"}, {"max_seq_length": 3}):
        other = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", **change)
        with pytest.raises(ValueError, match="differs in model"):
            encode_corpus(other, ROWS, tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="holds no corpus that is finished"):
        read_corpus(tmp_path)


def test_used_encoder_has_the_digest_of_a_new_one(tiny_checkpoint):
    used = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32")
    before = model_digest(used)
    with used.padded():
        used.encode(ROWS[0][1])  # leaves the tokenizer's truncation and padding set
    assert model_digest(used) == before


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_weights_of_any_type_have_a_digest(tiny_checkpoint, tmp_path, kind):
    """Regression: bfloat16, the default where the hardware has it, and int8 weights were a traceback."""
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    digests = []
    for change in (0.0, 0.0, 1.0):
        encoder = Encoder.from_pretrained(tiny_checkpoint, device="cpu", dtype=dtype)
        encoder.backbone.layers[1].mlp.up_proj.weight.data[3, 4] += change
        if kind == "int8":
            encoder.quantize()
        digests.append(model_digest(encoder))
    assert digests[0] == digests[1] != digests[2]
    assert encode_corpus(encoder, ROWS, tmp_path, SETTINGS).encoded == 57


def test_shorter_input_is_noticed(encoder, whole, tmp_path):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="part-00004.parquet: is beyond the end of the input"):
        encode_corpus(encoder, ROWS[:40], tmp_path, SETTINGS)


def test_rows_of_files(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"key": 7, "text": "the cat"}\n{"key": 8, "text": " "}\n')
    rows = corpus_rows(file, CorpusSettings(id_column="key"))
    assert next(rows) == ("7", "the cat")
    with pytest.raises(DataError, match="corpus.jsonl:2: the text is empty"):
        next(rows)
    with pytest.raises(DataError, match="corpus.jsonl:1: no field 'id'"):
        next(corpus_rows(file, CorpusSettings(id_column="id")))
