"""Code search as an evaluation: the set, its metric and its baseline."""

import math

import numpy as np
import pytest

from uncausal.encoder.data.code import decode, definitions, summary
from uncausal.encoder.data.sources import HELD_OUT, HELD_OUT_DEV, HELD_OUT_TEST, distribution_files
from uncausal.encoder.evaluation import code
from uncausal.encoder.evaluation.code import (
    CodeSearchSet,
    bm25_scores,
    code_search_set,
    evaluate_code_search,
    evaluate_sizes,
    search_metrics,
)
from uncausal.encoder.model import Encoder


def test_code_search_set_is_aligned_and_of_the_packages():
    found = code_search_set(["requests", "jinja2"], 60)
    assert len(found.queries) == len(set(found.queries)) == len(set(found.documents)) == 60
    files = [file for name in ("requests", "jinja2") for file in distribution_files(name)]
    told = {d.code: summary(d.doc) for file in files for d in definitions(decode(file.read()))}
    assert [told[document] for document in found.documents] == found.queries
    assert not [q for q, document in zip(*found, strict=True) if q in document]
    told = {d.code for file in distribution_files("requests") for d in definitions(decode(file.read()))}
    assert sum(document in told for document in found.documents) == 30  # as many of each package
    assert code_search_set(["requests", "jinja2"], 60) == found
    assert code_search_set(["requests", "jinja2"], 60, seed=1) != found


def test_held_out_splits_share_no_package():
    assert not set(HELD_OUT_DEV) & set(HELD_OUT_TEST) and len(set(HELD_OUT)) == 8


def test_search_metrics():
    scores = np.zeros((12, 12))
    np.fill_diagonal(scores, 1)
    assert search_metrics(scores)["mrr@10"] == 100
    scores[0, 1] = 2  # second
    scores[1, 2:] = scores[1, 1]  # tied with all: eleventh
    scores[2, 3:] = 2  # tenth
    metrics = search_metrics(scores)
    assert metrics["mrr@10"] == pytest.approx(100 * (9 + 1 / 2 + 1 / 10) / 12)
    assert metrics["recall@10"] == pytest.approx(100 * 11 / 12)
    assert metrics["low"] < metrics["mrr@10"] < metrics["high"] and metrics["queries"] == 12
    assert search_metrics(np.ones((50, 50)))["mrr@10"] == 0
    scores[3] = np.nan  # regression: found before the first place, a reciprocal rank of infinity
    with pytest.raises(ValueError, match="a vector is not finite"):
        search_metrics(scores)


def test_bm25_scores_are_the_formula():
    documents = ["def readFile(path): return read(path)", "def add(a, b): return a", "class Graph: pass"]
    search_set = CodeSearchSet(["read the file", "ADD", "graphs"], documents)
    scores = bm25_scores(search_set)
    mean = (7 + 6 + 3) / 3  # words of the documents, names taken apart
    idf = math.log(1 + 2.5 / 1.5)

    def term(count, length):
        return idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / mean))

    expected = np.zeros((3, 3))
    expected[0, 0] = term(2, 7) + term(1, 7)
    expected[1, 1] = term(1, 6)
    np.testing.assert_allclose(scores, expected)


def test_evaluate_code_search_ranks_by_cosine(smollm2):
    encoder = Encoder.from_pretrained(smollm2, num_layers=1, dtype="float32", device="cpu", max_seq_length=32)
    found = code_search_set(["requests"], 24)
    same = CodeSearchSet(found.documents, found.documents)
    assert evaluate_code_search(encoder, same)["mrr@10"] == 100
    turned = CodeSearchSet(found.documents, found.documents[1:] + found.documents[:1])
    assert evaluate_code_search(encoder, turned)["mrr@10"] < 60
    asked, stored = encoder.encode(found.queries), encoder.encode(found.documents)
    cosines = (asked @ stored.T) / np.outer(*(np.linalg.norm(v, axis=1) for v in (asked, stored)))
    expected = np.mean(
        [100 / r if (r := (row >= row[i]).sum()) <= 10 else 0 for i, row in enumerate(cosines)]
    )
    assert evaluate_code_search(encoder, found)["mrr@10"] == pytest.approx(expected, abs=0.01)


def test_evaluate_sizes_are_those_of_the_cut_vectors(smollm2, monkeypatch):
    encoder = Encoder.from_pretrained(smollm2, num_layers=1, dtype="float32", device="cpu", max_seq_length=32)
    found = code_search_set(["requests"], 24)
    rows = evaluate_sizes(encoder, found, dimensions=[8, 576])
    assert [(row["dimension"], row["int8"], row["bytes"]) for row in rows] == [
        (8, False, 32),
        (8, True, 8),
        (576, False, 2304),
        (576, True, 576),
    ]
    for row in rows[::2]:
        expected = evaluate_code_search(encoder, found, truncate_dim=row["dimension"])
        assert row["mrr@10"] == pytest.approx(expected["mrr@10"], abs=0.01) and row["ms"] > 0
    assert rows[0]["mrr@10"] != rows[2]["mrr@10"]
    assert rows[3]["mrr@10"] == pytest.approx(rows[2]["mrr@10"], abs=3)
    [whole, _] = evaluate_sizes(encoder, found)
    assert whole["mrr@10"] == rows[2]["mrr@10"]
    told = evaluate_code_search(encoder, found, prompt="a function that says: ")
    [asked, _] = evaluate_sizes(encoder, found, prompt="a function that says: ")
    assert asked["mrr@10"] == pytest.approx(told["mrr@10"], abs=0.01) and asked["mrr@10"] != whole["mrr@10"]
    # one number and zeros, whose products are exact in whatever order they are summed
    monkeypatch.setattr(code, "to_int8", lambda vectors: np.eye(1, vectors.shape[1]).repeat(len(vectors), 0))
    [_, rounded] = evaluate_sizes(encoder, found)
    assert rounded["mrr@10"] == 0  # all alike, and a tie is lost: scored as they are stored
    monkeypatch.setattr(encoder, "encode", None)  # refused before anything is encoded
    with pytest.raises(ValueError, match="vectors have 576 dimensions, not 577"):
        evaluate_sizes(encoder, found, dimensions=[8, 577])


def test_bm25_finds_functions_of_real_packages():
    found = code_search_set(["requests", "jinja2", "fsspec"], 150)
    assert 30 < search_metrics(bm25_scores(found))["mrr@10"] < 80
