"""Hard negatives: which candidates are refused, on planted scores."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.util import SimilarityFunction, mine_hard_negatives

from uncausal.bench.measure import resident_bytes
from uncausal.encoder.data.pairs import read_pairs
from uncausal.encoder.training import mining
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


class Drawn(Planted):
    """A teacher of random unit vectors in eight dimensions, in a precision; prompts move all of them."""

    def __init__(self, *texts, kind="cosine", dtype=torch.float32):
        self.similarity_fn_name, self.dtype = kind, dtype
        self.similarity, self.similarity_pairwise = (
            getattr(SimilarityFunction, f"to_similarity_{form}fn")(kind) for form in ("", "pairwise_")
        )
        self.of = dict(zip(texts, np.random.default_rng(0).normal(size=(len(texts), 8)), strict=True))

    def encode_query(self, texts, prompt=None, normalize_embeddings=False, **options):
        assert normalize_embeddings
        vectors = torch.tensor(np.stack([self.of[text] for text in texts]), dtype=self.dtype)
        vectors[:, 0] += len(prompt or "") / 20
        vectors = torch.nn.functional.normalize(vectors)
        return (vectors.float() if self.dtype == torch.bfloat16 else vectors).numpy()

    encode_document = encode_query


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


@pytest.mark.parametrize(
    "options",
    [
        {"relative_margin": None, "top_k": 9},
        {"relative_margin": None, "top_k": 6, "rank_shift": 3},
        {"relative_margin": 0.05, "top_k": 60},
        {"relative_margin": 0.5, "top_k": 60, "rank_shift": 2},
        {"relative_margin": None, "absolute_margin": 0.1, "max_score": 0.3, "top_k": 60},
    ],
    ids=lambda options: "-".join(f"{k}{v}" for k, v in options.items()),
)
@pytest.mark.parametrize("scores", [1 << 20, 1], ids=["whole", "a-query-at-a-time"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("cosine", torch.float32),
        ("cosine", torch.bfloat16),
        ("cosine", torch.float16),
        ("dot", torch.float32),
        ("euclidean", torch.float32),
    ],
)
def test_negatives_are_those_of_sentence_transformers(monkeypatch, options, scores, kind, dtype):
    """Anchors of one to three positives, among other documents, in chunks of any size."""
    monkeypatch.setattr(mining, "SCORES_BYTES", scores)
    documents = [f"document {i}" for i in range(60)]
    pairs = [(f"query {i}", documents[(7 * i + j) % 50]) for i in range(20) for j in range(1 + i % 3)]
    pairs = Dataset.from_list([{"anchor": a, "positive": p} for a, p in pairs])
    teacher = Drawn(*documents, *dict.fromkeys(pairs["anchor"]), kind=kind, dtype=dtype)
    prompts = {"query_prompt": "to: ", "corpus_prompt": "of a"}
    ours = {"query_prompt": "to: ", "document_prompt": "of a"} if scores == 1 else {}
    options = {**options, **ours}
    found = Mining(num_negatives=3, sampling="top", **options).mine(pairs, teacher, documents)
    shift = options.get("rank_shift", 0)
    rules = {n: value for n, value in options.items() if n not in ("rank_shift", "top_k", *prompts, *ours)}
    rules |= prompts if ours else {}
    theirs = mine_hard_negatives(
        pairs,
        teacher,  # type: ignore[arg-type]
        corpus=documents,
        range_min=shift,
        range_max=len(documents) - 1,  # which is before what scores too high is left out
        num_negatives=3,
        output_format="n-tuple",
        verbose=False,
        **rules,
    )
    assert 0 < len(found) and sorted(map(str, found.to_list())) == sorted(map(str, theirs.to_list()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_positives_of_one_anchor(monkeypatch):
    """As many candidates were kept of every query as the most frequent anchor has positives: 400 MB here."""
    monkeypatch.setattr(mining, "SCORES_BYTES", 1 << 20)
    documents = [f"document {i}" for i in range(6000)]
    rows = [("the same", text) for text in documents[:3000]]
    rows += [(f"query {i}", text) for i, text in enumerate(documents[:3000])]
    pairs = Dataset.from_dict({"anchor": [a for a, _ in rows], "positive": [p for _, p in rows]})
    teacher = Drawn(*documents, *dict.fromkeys(pairs["anchor"]))
    settings = Mining(relative_margin=None)
    peak = resident_bytes(lambda: settings.mine(pairs, teacher, documents), "cpu")
    assert peak < 60 << 20


def test_negatives_of_the_pairs_are_replaced():
    """A row kept those that had no namesake among the new ones."""
    old = {"anchor": "query", "positive": "right", "id": 3} | {f"negative_{i}": "old" for i in range(1, 5)}
    found = Mining(num_negatives=2, sampling="top").mine(Dataset.from_list([old]), Planted(), tuple(SCORES))
    new = {"negative_1": "near", "negative_2": "far"}
    assert found.to_list() == [{"anchor": "query", "positive": "right", "id": 3, **new}]


def test_top_k_counts_the_candidates_of_a_query():
    """As NV-Retriever counts them: what cannot be a negative takes no place among them."""
    pairs = [("query", "right"), *(("other", text) for text in ("far", "farther", "0", "1"))]
    [row] = mined(pairs, corpus=("false", "near"), num_negatives=1, top_k=1)
    assert row["negative"] == "near"
    rows = mined(pairs, corpus=("false", "near"), num_negatives=1, top_k=2)
    assert {row["negative"] for row in rows} <= {"near", "far"}
    [row] = mined(pairs, corpus=("false", "near"), num_negatives=1, top_k=1, rank_shift=1)
    assert row["negative"] == "far"


def test_the_draw_does_not_depend_on_chunks(monkeypatch):
    documents = [f"document {i}" for i in range(40)]
    pairs = Dataset.from_list([{"anchor": f"query {i}", "positive": documents[i]} for i in range(30)])
    teacher, found = Drawn(*documents, *pairs["anchor"]), []
    for scores in (1 << 20, 3000, 1):
        monkeypatch.setattr(mining, "SCORES_BYTES", scores)
        found.append(Mining(relative_margin=None).mine(pairs, teacher, documents).to_list())
    assert found[0] == found[1] == found[2] and len(found[0]) == 30
    assert len({tuple(documents.index(row[f"negative_{i}"]) for i in (1, 2, 3, 4)) for row in found[0]}) > 20


def test_a_vector_that_is_not_finite_is_refused():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCORES, "near", math.nan)
        with pytest.raises(ValueError, match="the teacher's vector is not finite: 'near'"):
            mined(num_negatives=1)


def test_one_negative_has_the_plain_name():
    [row] = mined(num_negatives=1)
    assert row["negative"] == "near"


def test_other_positives_of_a_query_are_no_negatives():
    rows = mined(pairs=[("query", "right"), ("query", "near")], num_negatives=1)
    assert {row["negative"] for row in rows} == {"far"} and [row["id"] for row in rows] == [0, 1]


def test_a_positive_stays_as_it_is_written():
    """Regression: of two that differ in spaces alone, which is other code, one stood for both."""
    code = ["if a:\n  b\n  c", "if a:\n  b\nc", "while d: e", "f(g)"]
    pairs = [{"anchor": f"query {i}", "positive": text} for i, text in enumerate(code)]
    mined = Mining(num_negatives=1, relative_margin=None).mine(read_pairs(pairs), "bm25")
    assert list(mined["positive"]) == code[: len(mined)] and len(mined) == 4


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
    with pytest.raises(ValueError, match="'cat 0' and 'cat 1' have one id or class and other positives"):
        Mining(num_negatives=1).mine(Dataset.from_list(rows).with_format("torch"), "bm25")
    rows = [("a", "1"), ("a", "2"), ("b", "1")]  # 2 would be a negative of b
    rows = [{"anchor": anchor, "positive": positive, "label": 0} for anchor, positive in rows]
    with pytest.raises(ValueError, match="'a' and 'b' have one id or class and other positives"):
        Mining(num_negatives=1).mine(Dataset.from_list(rows), "bm25")


def test_rows_without_enough_negatives_are_dropped_or_refused():
    rows = mined(pairs=[("query", "right"), ("other", "far")], num_negatives=2, relative_margin=0.2)
    assert [row["id"] for row in rows] == [0]
    with pytest.raises(ValueError, match="no row has 4 negatives among 5 documents: .* or rank_shift"):
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
    settings = Mining(num_negatives=1, sampling="top", relative_margin=None)
    rows = settings.mine(pairs, "bm25", corpus).to_list()
    assert [row["negative"] for row in rows] == ["the cat sleeps", "a river of words"]
