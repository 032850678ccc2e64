"""Hard negatives: which candidates are refused, on planted scores."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from uncausal.encoder.training.mining import BM25, Mining

SCORES = {"right": 0.80, "false": 0.79, "near": 0.70, "far": 0.30, "farther": 0.10}


class Planted:
    """A teacher whose score of the query with a document stands in SCORES; queries lie on the first axis."""

    device = torch.device("cpu")

    def encode_query(self, texts, **options):
        return np.tile(np.float32([1, 0]), (len(texts), 1))

    def encode_document(self, texts, **options):
        scores = [SCORES.get(text, 0.0) for text in texts]
        return np.float32([[s, math.sqrt(1 - s * s)] for s in scores])

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


def mined(pairs=(("query", "right"),), corpus=tuple(SCORES), **options):
    rows = Dataset.from_list([{"anchor": a, "positive": p, "id": i} for i, (a, p) in enumerate(pairs)])
    return Mining(sampling="top", **options).mine(rows, Planted(), corpus).to_list()


@pytest.mark.parametrize(
    "options, negatives",
    [
        ({"relative_margin": None}, ["false", "near"]),
        ({"relative_margin": 0.05}, ["near", "far"]),  # 0.95 * 0.80 = 0.76
        ({"relative_margin": 0.2}, ["far", "farther"]),
        ({"relative_margin": None, "absolute_margin": 0.05}, ["near", "far"]),
        ({"relative_margin": None, "max_score": 0.5}, ["far", "farther"]),
        ({"relative_margin": None, "rank_shift": 2}, ["far", "farther"]),
    ],
    ids=["naive", "PercPos95", "PercPos80", "MarginPos", "Abs", "shift"],
)
def test_planted_false_negative(options, negatives):
    """Naive top-k takes the planted false negative (0.79 beside a positive of 0.80); the rules refuse it."""
    [row] = mined(num_negatives=2, **options)
    assert [row["negative_1"], row["negative_2"]] == negatives
    assert (row["anchor"], row["positive"], row["id"]) == ("query", "right", 0)


def test_one_negative_has_the_plain_name():
    [row] = mined(num_negatives=1)
    assert row["negative"] == "near"


def test_other_positives_of_a_query_are_no_negatives():
    rows = mined(pairs=[("query", "right"), ("query", "near")], num_negatives=1)
    assert {row["negative"] for row in rows} == {"far"} and [row["id"] for row in rows] == [0, 1]


def test_copies_of_a_positive_are_no_negatives():
    """A document that differs from the positive in case and spaces alone is the positive."""
    SCORES_OF_COPY = {**SCORES, " Right": 0.80}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCORES, " Right", 0.80)
        [row] = mined(corpus=tuple(SCORES_OF_COPY), num_negatives=1, relative_margin=None)
    assert row["negative"] == "false"


def test_positives_of_one_id_are_no_negatives():
    """Classes are made pairs by drawing a classmate, and all other classmates would be candidates."""
    rows = [{"anchor": f"cat {i}", "positive": f"cat {i + 1}", "label": 0} for i in range(3)]
    with pytest.raises(ValueError, match="'cat 0' and 'cat 1' have one id or class and two positives"):
        Mining(num_negatives=1).mine(Dataset.from_list(rows), "bm25")


def test_rows_without_enough_negatives_are_dropped_or_refused():
    rows = mined(pairs=[("query", "right"), ("other", "far")], num_negatives=2, relative_margin=0.2)
    assert [row["id"] for row in rows] == [0]
    with pytest.raises(ValueError, match="no row has 4 negatives among 5 documents"):
        mined(num_negatives=4)
    with pytest.raises(ValueError, match="3 negatives out of the top 2"):
        Mining(num_negatives=3, top_k=2)


def test_random_sampling_draws_from_the_top_by_seed():
    corpus = [f"document {i}" for i in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        for i, text in enumerate(corpus):
            patch.setitem(SCORES, text, 0.6 - i / 100)
        draws = []
        for seed in (1, 1, 2):
            rows = Dataset.from_list([{"anchor": "query", "positive": "right"}])
            [row] = Mining(num_negatives=4, top_k=10, seed=seed).mine(rows, Planted(), corpus).to_list()
            draws.append([row[f"negative_{i}"] for i in range(1, 5)])
    assert draws[0] == draws[1] != draws[2]
    assert all(set(draw) <= set(corpus[:10]) and len(set(draw)) == 4 for draw in draws)


def test_bm25_equals_its_equation():
    texts = ["the cat sat", "the dog sat on the mat", "a bird"]
    teacher = BM25()
    documents, queries = teacher.encode_document(texts), teacher.encode_query(["cat the the", "fish"])
    lengths, mean = [3, 6, 2], 11 / 3

    def term(frequency, count, length):
        idf = math.log1p((3 - frequency + 0.5) / (frequency + 0.5))
        return idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / mean))

    expected = [term(1, 1, lengths[0]) + term(2, 1, lengths[0]), term(2, 2, lengths[1]), 0.0]
    scores = teacher.similarity(queries, documents)
    torch.testing.assert_close(scores[0], torch.tensor(expected))
    assert not scores[1].any()
    pairwise = teacher.similarity_pairwise(queries[[0, 0, 1]], documents[[0, 1, 2]])
    torch.testing.assert_close(pairwise, torch.tensor([*expected[:2], 0.0]))


def test_bm25_mines():
    pairs = Dataset.from_list(
        [
            {"anchor": "who feeds the cat", "positive": "the cat is fed by the neighbour every day"},
            {"anchor": "which river", "positive": "the river runs through the old town"},
        ]
    )
    corpus = ["the cat sleeps", "a river of words", "nothing else"]
    mining = Mining(num_negatives=1, sampling="top", relative_margin=None)
    rows = mining.mine(pairs, "bm25", corpus).to_list()
    assert [row["negative"] for row in rows] == ["the cat sleeps", "a river of words"]
