"""What `evaluate_models` loads, and how an evaluation is shown."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, Qwen3Config, RobertaConfig

from uncausal.encoder.evaluation import compare as compare_module
from uncausal.encoder.evaluation.compare import (
    Difference,
    Evaluation,
    Measured,
    ModelScores,
    Score,
    compare,
)
from uncausal.encoder.evaluation.report import format_table, plot, write_json
from uncausal.encoder.evaluation.tasks import Measurement
from uncausal.encoder.loading import _is_decoder, load_model
from uncausal.encoder.model import Encoder


def evaluation():
    scores = {"a": Score(81.25, 80, 82.5), "b": Score(60, 55.5, 64)}
    return Evaluation(
        models=[
            ModelScores(name, {"sts": score, "mean": score}, {"stsb": score}, texts=1234, seconds=5.4)
            for name, score in scores.items()
        ],
        differences=[Difference("a", "b", dict.fromkeys(["sts", "mean"], Score(21.25, -1, 30)))],
    )


def test_table_has_a_column_for_each_model_and_difference():
    lines = format_table(evaluation()).splitlines()
    assert len(set(map(len, lines))) == 1
    assert lines[0].split("  ")[-1].strip() == "a - b"
    assert lines[1].split() == "sts 81.2 [80.0, 82.5] 60.0 [55.5, 64.0] 21.2 [-1.0, 30.0]".split()
    assert lines[-2].split() == ["texts", "1,234", "1,234"]


def test_json_holds_all_scores(tmp_path):
    write_json(evaluation(), tmp_path / "scores.json")
    read = json.loads((tmp_path / "scores.json").read_text())
    assert read["models"][0]["tasks"] == {"stsb": [81.25, 80, 82.5]}
    assert read["differences"][0]["families"]["mean"] == [21.25, -1, 30]


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot_is_an_image(tmp_path, suffix, magic):
    plot(evaluation(), tmp_path / f"scores.{suffix}")
    assert (tmp_path / f"scores.{suffix}").read_bytes().startswith(magic)


@pytest.mark.parametrize(
    "config, decoder",
    [(LlamaConfig(), True), (Qwen3Config(), True), (BertConfig(), False), (RobertaConfig(), False)],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_decoders_are_told_from_encoders(tmp_path, config, decoder):
    """BERT too has a class for causal models, and `Encoder` cannot run it."""
    config.save_pretrained(tmp_path)
    assert _is_decoder(tmp_path) == decoder


def test_load_model_takes_folders_of_each_kind(smollm2, tmp_path):
    options = {"num_layers": 1, "dtype": "float32", "device": "cpu"}
    encoder = load_model(smollm2, bidirectional=False, pooling="weighted_mean", **options)
    assert isinstance(encoder, Encoder) and encoder.pooling == "weighted_mean"
    assert getattr(encoder.backbone.config, "is_causal", True)
    encoder.save_pretrained(str(tmp_path / "saved"))
    assert load_model(tmp_path / "saved", device="cpu").pooling == "weighted_mean"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no_such_package"):
        load_model("package:no_such_package/model")


def test_one_path_is_one_model(monkeypatch):
    """Regression: a path given alone was taken for a sequence of one-letter names."""
    monkeypatch.setattr(compare_module, "load_model", lambda source: source)
    measured = Measured({"t": Measurement(3, lambda rows: 7.0)}, 3, 0.1)
    [scores] = compare("a/path", lambda model: measured, {"t": "f"}, resamples=5).models
    assert (scores.model, scores.families) == ("a/path", {"f": (7, 7, 7), "mean": (7, 7, 7)})
    with pytest.raises(ValueError, match="at least one model"):
        compare({}, lambda model: measured, {})


def test_load_model_leaves_other_models_to_the_library(tmp_path, caplog):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)]).save_pretrained(str(tmp_path))
    model = load_model(tmp_path, device="cpu")
    assert type(model) is SentenceTransformer
    assert model.encode("a").shape == (4,)
    load_model(tmp_path, device="cpu", attention="auto", dtype="auto")
    assert not caplog.records
    load_model(tmp_path, device="cpu", num_layers=2, bidirectional=False, max_seq_length=9)
    told = "num_layers, bidirectional, max_seq_length"  # static embeddings have no limit
    assert f"is no decoder, and is loaded without {told}" in caplog.text


def test_other_models_take_dtype_and_length(tmp_path):
    """Regression: a peer was scored in another dtype and at another length than was asked."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    model = load_model(tmp_path / "bert", device="cpu", dtype="bfloat16", max_seq_length=7)
    assert model.max_seq_length == 7 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
