"""Word level: reading, states, cache, probe and scores."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from uncausal.encoder.evaluation import words
from uncausal.encoder.evaluation.words import (
    TaggedSentence,
    WordTask,
    evaluate_words,
    probe,
    read_tagged,
    spans,
    word_states,
    word_tasks,
)
from uncausal.encoder.model import Encoder

SENTENCES = [["What", "if", "Google", "Morphed"], ["unbelievably", "&", "gt", ";"], ["so"]]


@pytest.fixture(scope="module")
def encoder(smollm2):
    return Encoder.from_pretrained(smollm2, num_layers=2, dtype="float32", device="cpu")


def test_read_tagged_skips_what_is_no_word(tmp_path):
    conllu = tmp_path / "x.conllu.gz"
    rows = ["# text = Don't # go", "1-2\tDon't\t_\t_", "1\tDo\tdo\tAUX", "2\tn't\tnot\tPART", "2.1\tx\tx\tX"]
    conllu.write_bytes(gzip.compress("\n".join([*rows, "3\t#\t#\tSYM", "", "1\tGo\tgo\tVERB"]).encode()))
    assert read_tagged(conllu, 1, 3) == [
        TaggedSentence(["Do", "n't", "#"], ["AUX", "PART", "SYM"]),
        TaggedSentence(["Go"], ["VERB"]),
    ]
    conll = tmp_path / "x.conll"
    conll.write_text("#\tO\nNYC\tB-location\n\t\n\n@me\tO\n")
    assert read_tagged(conll, 0, 1) == [
        TaggedSentence(["#", "NYC"], ["O", "B-location"]),
        TaggedSentence(["@me"], ["O"]),
    ]
    conll.write_text("a\tO\nbroken\n")
    with pytest.raises(ValueError, match=r"x\.conll:2: no field 2"):
        read_tagged(conll, 0, 1)


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("O B-a I-a O", {(1, 3, "a")}),
        ("B-a B-a I-b", {(0, 1, "a"), (1, 2, "a"), (2, 3, "b")}),
        ("I-a I-a", {(0, 2, "a")}),
        ("O O", set()),
    ],
)
def test_spans(tags, expected):
    assert spans(tags.split()) == expected


def test_word_states_are_means_of_sub_tokens(encoder):
    """Each word against the tokens of the text up to it, from the token states that `encode` gives."""
    most = 0
    for sentence, states in zip(SENTENCES, word_states(encoder, SENTENCES), strict=True):
        text = " ".join(sentence)
        tokens = encoder.encode(text, output_value="token_embeddings")
        counts = [
            len(encoder.tokenizer(" ".join(sentence[:n]))["input_ids"]) for n in range(1, len(sentence) + 1)
        ]
        expected = [tokens[a:b].mean(0).numpy() for a, b in zip([0, *counts[:-1]], counts, strict=True)]
        np.testing.assert_allclose(states, expected, atol=2e-4)
        most = max(most, *np.diff([0, *counts]))
    assert most > 1


def test_shift_takes_the_position_before(encoder):
    """All words but the split one are one token each, so a shifted word is the word before it."""
    [plain], [shifted] = (word_states(encoder, [["so", "it", "was"]], shift=shift) for shift in (False, True))
    np.testing.assert_allclose(shifted, plain[[0, 0, 1]], atol=1e-6)


def test_padded_models_give_the_same_states(encoder, smollm2):
    library = Encoder.from_pretrained(smollm2, num_layers=2, dtype="float32", device="cpu", attention="sdpa")
    assert not library.packed
    for ours, theirs in zip(word_states(encoder, SENTENCES), word_states(library, SENTENCES), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_states_are_computed_once_for_a_model(encoder, tmp_path, monkeypatch):
    """Other weights, attention, words or shift are other states; the same are read back."""
    first = word_states(encoder, SENTENCES, cache_dir=tmp_path)
    addresses = {p.name for p in tmp_path.iterdir()}
    word_states(encoder, SENTENCES, cache_dir=tmp_path, shift=True)
    word_states(encoder, SENTENCES[:2], cache_dir=tmp_path)
    encoder.backbone.config.is_causal = True
    word_states(encoder, SENTENCES, cache_dir=tmp_path)
    encoder.backbone.config.is_causal = False
    weight = encoder.backbone.norm.weight
    with torch.no_grad():
        weight[0] += 1
        word_states(encoder, SENTENCES, cache_dir=tmp_path)
        weight[0] -= 1
    assert len(list(tmp_path.iterdir())) == 5
    monkeypatch.setattr(words, "_compute", None)
    again = word_states(encoder, SENTENCES, cache_dir=tmp_path)
    assert addresses and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def planted(seed, count=40):
    """Sentences of three words whose states point to their tags, at a scale far from 1."""
    generator = np.random.default_rng(seed)
    tags = [[str(tag) for tag in generator.choice(["A", "B", "C"], 3)] for _ in range(count)]
    centres = {tag: 50 * np.eye(3, dtype=np.float32)[i] for i, tag in enumerate("ABC")}
    return [np.stack([centres[tag] for tag in row]) for row in tags], tags


def test_states_that_are_not_finite_have_no_score(smollm2, tmp_path):
    """Regression: they were scored, and kept."""
    encoder = Encoder.from_pretrained(smollm2, num_layers=1, dtype="float32", device="cpu")
    with torch.no_grad():
        encoder.backbone.norm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="sentence 0: the model's states are not finite"):
        word_states(encoder, SENTENCES[:1], cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_states_are_computed_again(encoder, tmp_path):
    expected = word_states(encoder, SENTENCES, cache_dir=tmp_path)
    [file] = tmp_path.iterdir()
    np.save(file, np.full_like(np.load(file), np.nan))
    for found in (
        word_states(encoder, SENTENCES, cache_dir=tmp_path),
        np.split(np.load(file), [len(SENTENCES[0])]),
    ):
        assert np.array_equal(found[0], expected[0])


def test_texts_beyond_a_varying_rope_stand_alone(encoder, monkeypatch):
    """Regression: one long sentence turned the positions of all beside it, and their states were kept."""
    sizes, real = [], words._states
    before = words._address(encoder, [], False)
    monkeypatch.setattr(words, "alone_beyond", lambda config: 1)
    assert words._address(encoder, [], False) != before
    monkeypatch.setattr(words, "_states", lambda model, ids: (sizes.append(len(ids)), real(model, ids))[1])
    word_states(encoder, [*SENTENCES, ["so"]])
    assert sizes == [1, 1, 2]  # of which the last are of one token each


def test_probe_learns_what_is_linear_and_no_more():
    (train, tags), (test, gold) = planted(0), planted(1)
    assert probe(train, tags, test, steps=600, learning_rate=1e-2) == gold
    swapped = [["ABC"["ABC".index(tag) - 1] for tag in row] for row in tags]
    wrong = probe(train, swapped, test, steps=600, learning_rate=1e-2)
    assert not any(a == b for x, y in zip(wrong, gold, strict=True) for a, b in zip(x, y, strict=True))


def test_evaluate_words_scores_tags_and_spans(monkeypatch):
    """Two sentences: 3 of 4 tags right; of two gold and three predicted spans, one agrees (F1 = 2 / 5)."""
    predicted = {"pos": [["A", "B"], ["A", "C"]], "ner": [["B-x", "I-x", "O"], ["B-x", "O", "B-y"]]}
    gold = {"pos": [["A", "B"], ["A", "A"]], "ner": [["B-x", "I-x", "O"], ["B-y", "O", "O"]]}
    tasks = [
        WordTask(name, [], [TaggedSentence(["w"] * len(tags), tags) for tags in gold[name]]) for name in gold
    ]
    answers = iter(predicted.values())
    monkeypatch.setattr(words, "word_states", lambda *a, **k: [])
    monkeypatch.setattr(words, "probe", lambda *a, **k: next(answers))
    model = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    [scores] = evaluate_words({"m": model}, tasks, resamples=50).models
    assert scores.tasks["pos"].value == pytest.approx(75)
    assert scores.tasks["ner"].value == pytest.approx(40)
    assert scores.families["mean"].value == pytest.approx(57.5)


def test_word_tasks_have_their_published_sizes():
    data_dir = Path(os.environ.get("UNCAUSAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not data_dir.is_dir():
        pytest.skip("UNCAUSAL_DATA names no data folder")
    for split, sizes in (("test", (2077, 1287)), ("dev", (2001, 1009))):
        pos, ner = word_tasks(data_dir, split, limit=100)
        assert (len(pos.test), len(ner.test), len(pos.train), len(ner.train)) == (*sizes, 100, 100)
        assert (
            {"NOUN", "VERB", "PUNCT"}
            < {tag for s in pos.test for tag in s.tags}
            <= set("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split())
        )
        kinds = {kind for sentence in ner.test for _, _, kind in spans(sentence.tags)}
        assert kinds == {"corporation", "creative-work", "group", "location", "person", "product"}
