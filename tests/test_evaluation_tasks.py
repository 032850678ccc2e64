"""Each kind of task on planted vectors whose score is known by hand, and against the library's evaluators."""

import math

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    RerankingEvaluator,
)

from uncausal.encoder.evaluation.compare import INSTRUCT, encode_once, evaluate_models
from uncausal.encoder.evaluation.sts import ScoredPair
from uncausal.encoder.evaluation.tasks import (
    STS,
    Classification,
    Clustering,
    PairClassification,
    Reranking,
    Retrieval,
)


class Planted(SentenceTransformer):
    """A model that knows the vector of every text, and what it was asked for."""

    def __init__(self, vectors, prompts=None):
        super().__init__(modules=[torch.nn.Identity()], device="cpu", prompts=prompts)
        self.vectors, self.calls = vectors, []

    def encode(self, inputs, prompt=None, convert_to_tensor=False, **options):
        self.calls.append((prompt, list(inputs)))
        rows = torch.tensor([self.vectors[text] for text in inputs], dtype=torch.float32)
        return rows if convert_to_tensor else rows.numpy()

    encode_query = encode_document = encode


def angle(degrees):
    return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]


def score(task, model):
    evaluation = evaluate_models({"planted": model}, [task], resamples=0)
    return evaluation.models[0].tasks[task.name].value


PAIRS = [ScoredPair("zero", text, gold) for text, gold in (("ten", 5), ("fifty", 3), ("ninety", 0))]
ANGLES = {"zero": angle(0), "ten": angle(10), "fifty": angle(50), "ninety": angle(90)}


def test_sts_is_the_rank_correlation():
    task = STS(name="s", family="f", parts={"": PAIRS})
    assert score(task, Planted(ANGLES)) == pytest.approx(100)
    assert score(task, Planted({**ANGLES, "ten": angle(90), "ninety": angle(10)})) == pytest.approx(-100)


def test_sts_averages_its_parts():
    """A part with all scores high and one with all low correlate inside each, whatever lies between them."""
    again = [ScoredPair("zero", pair.second, 5 - pair.score) for pair in PAIRS]
    task = STS(name="s", family="f", parts={"right": PAIRS, "wrong": again, "right again": PAIRS})
    assert score(task, Planted(ANGLES)) == pytest.approx(100 / 3)


def test_retrieval_is_ndcg_at_10():
    """The relevant document stands second of two, so nDCG is 1 / log2(3), and first for the other query."""
    task = Retrieval(
        name="r",
        family="f",
        queries={"1": "zero", "2": "fifty"},
        documents={"a": "ten", "b": "ninety"},
        relevant={"1": {"b"}, "2": {"b"}},
    )
    model = Planted({**ANGLES, "fifty": angle(80)})
    assert score(task, model) == pytest.approx(100 * (1 / np.log2(3) + 1) / 2)


@pytest.mark.parametrize("relevant", [set(), {"a", "elsewhere"}])
def test_retrieval_refuses_a_query_without_its_documents(relevant):
    with pytest.raises(ValueError, match="query '1'"):
        Retrieval(name="r", family="f", queries={"1": "x"}, documents={"a": "y"}, relevant={"1": relevant})


def test_reranking_is_mean_average_precision():
    """Positives at ranks 1 and 3 of 3: (1 + 2/3) / 2; one at rank 2 of 2: 1/2."""
    samples = [
        {"query": "zero", "positive": ["ten", "ninety"], "negative": ["fifty"]},
        {"query": "ninety", "positive": ["ten"], "negative": ["fifty"]},
    ]
    task = Reranking(name="r", family="f", samples=samples)
    assert score(task, Planted(ANGLES)) == pytest.approx(100 * (5 / 6 + 1 / 2) / 2)


def test_pair_classification_is_average_precision():
    pairs = [pair._replace(score=float(pair.score != 3)) for pair in PAIRS]
    task = PairClassification(name="p", family="f", pairs=pairs)
    assert score(task, Planted(ANGLES)) == pytest.approx(100 * (1 + 2 / 3) / 2)


def labelled(count, start=0):
    return [(f"{label} {number}", label) for label in "xyz" for number in range(start, start + count)]


def one_hot(rows):
    return {text: np.eye(3)["xyz".index(label)].tolist() for text, label in rows}


def test_classification_knows_separable_labels_and_fails_swapped_ones():
    train, test = labelled(9), labelled(5, start=9)
    task = Classification(name="c", family="f", train=train, test=test)
    assert score(task, Planted(one_hot(train + test))) == 100
    swapped = [(text, "xyz"[("xyz".index(label) + 1) % 3]) for text, label in test]
    assert score(task, Planted(one_hot(train + swapped))) == 0


def test_classification_sees_only_the_shots():
    """One of a label's nine training texts is like the others: with one shot a draw, most draws miss it."""
    train, test = labelled(9), labelled(5, start=9)
    vectors = one_hot(train + test)
    vectors |= {text: [0, 0, 1] for text, _ in train if not text.endswith("0")}
    scores = [
        score(Classification(name="c", family="f", train=train, test=test, shots=shots), Planted(vectors))
        for shots in (1, 9)
    ]
    assert scores[0] < 70 and scores[1] > 95


def test_classification_refuses_a_text_in_train_and_test():
    with pytest.raises(ValueError, match="1 texts are in train and test: 'y 3'"):
        Classification(name="c", family="f", train=labelled(4), test=[("y 3", "y")])


def test_clustering_is_v_measure():
    rows = labelled(6)
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    task = Clustering(name="c", family="f", documents=texts, labels=labels)
    assert score(task, Planted(one_hot(rows))) == pytest.approx(100)
    numbers = [text.split()[1] for text in texts]  # every cluster holds one of each
    task = Clustering(name="c", family="f", documents=texts, labels=[str(int(n) % 3) for n in numbers])
    assert score(task, Planted(one_hot(rows))) == pytest.approx(0, abs=1e-6)


@pytest.fixture
def random_model():
    generator = np.random.default_rng(0)
    return Planted({f"t{n}": generator.normal(size=4).tolist() for n in range(60)})


def test_scores_are_those_of_the_librarys_evaluators(random_model):
    texts = [f"t{n}" for n in range(60)]
    first, second, gold = texts[:30], texts[30:], [float(n % 6) for n in range(30)]
    pairs = [ScoredPair(*row) for row in zip(first, second, gold, strict=True)]
    theirs = EmbeddingSimilarityEvaluator(first, second, gold)(random_model)["spearman_cosine"]
    assert score(STS(name="s", family="f", parts={"": pairs}), random_model) == pytest.approx(100 * theirs)

    true = [pair._replace(score=float(pair.score > 3)) for pair in pairs]
    labels = [int(pair.score) for pair in true]
    theirs = BinaryClassificationEvaluator(first, second, labels, similarity_fn_names=["cosine"])(
        random_model
    )
    task = PairClassification(name="p", family="f", pairs=true)
    assert score(task, random_model) == pytest.approx(100 * theirs["cosine_ap"])

    queries, documents = ({text: text for text in half} for half in (first, second))
    relevant = {query: set(second[n : n + 3]) for n, query in enumerate(first)}
    theirs = InformationRetrievalEvaluator(queries, documents, relevant)(random_model)["cosine_ndcg@10"]
    task = Retrieval(name="r", family="f", queries=queries, documents=documents, relevant=relevant)
    assert score(task, random_model) == pytest.approx(100 * theirs)

    samples = [
        {"query": query, "positive": second[n : n + 2], "negative": second[n + 2 : n + 6] + second[:2]}
        for n, query in enumerate(first[:20], start=3)
    ]
    theirs = RerankingEvaluator(samples, at_k=10)(random_model)["map"]
    assert score(Reranking(name="r", family="f", samples=samples), random_model) == pytest.approx(
        100 * theirs
    )


def asymmetric():
    return Retrieval(
        name="r",
        family="f",
        queries={"1": "zero"},
        documents={"a": "ten", "b": "zero"},
        relevant={"1": {"b"}},
        instruction="find it",
    )


def test_every_text_is_encoded_once():
    model = Planted(ANGLES)
    tasks = [STS(name=name, family="f", parts={"": PAIRS + PAIRS[:1]}) for name in "ab"] + [asymmetric()]
    assert len(encode_once(model, tasks).rows) == 4
    assert [(prompt, sorted(texts)) for prompt, texts in model.calls] == [(None, sorted(ANGLES))]


@pytest.mark.parametrize(
    "instruct, prompts, expected",
    [
        (INSTRUCT, None, {"Instruct: find it\nQuery: ": ["zero"], None: ["ten", "zero"]}),
        (None, {"query": "q: ", "document": "d: "}, {"q: ": ["zero"], "d: ": ["ten", "zero"]}),
    ],
)
def test_prompts_go_before_their_side(instruct, prompts, expected):
    model = Planted(ANGLES, prompts)
    encode_once(model, [asymmetric()], instruct)
    assert dict(model.calls) == expected


@pytest.mark.parametrize("default", ["query", "s2p_query"])
@pytest.mark.parametrize("instruct", [None, INSTRUCT])
def test_a_default_prompt_is_not_for_documents(default, instruct):
    """Regression: `None` asks for the default, and documents got that of queries."""
    model = Planted(ANGLES, {default: "query: ", "document": ""})
    model.default_prompt_name = default
    encode_once(model, [asymmetric()], instruct)
    asked = "Instruct: find it\nQuery: " if instruct else "query: " if default == "query" else None
    assert dict(model.calls) == {asked: ["zero"], "": ["ten", "zero"]}


@pytest.mark.parametrize("default", ["passage", "search_document"])
def test_a_default_prompt_of_documents_stays_theirs(default):
    model = Planted(ANGLES, {"query": "query: ", default: "passage: "})
    model.default_prompt_name = default
    encode_once(model, [asymmetric()])
    assert dict(model.calls) == {"query: ": ["zero"], None: ["ten", "zero"]}
    model.prompts = {"search_query": "query: ", default: "passage: "}
    model.calls.clear()
    encode_once(model, [asymmetric()])
    assert dict(model.calls) == {"": ["zero"], None: ["ten", "zero"]}


def test_a_default_prompt_of_every_text_is_for_both_sides():
    """Regression: it was left out before documents alone."""
    model = Planted(ANGLES, {"all": "all: "})
    model.default_prompt_name = "all"
    encode_once(model, [asymmetric()])
    assert [(prompt, sorted(texts)) for prompt, texts in model.calls] == [(None, ["ten", "zero"])]
    model.prompts, model.default_prompt_name = {"query": "", "document": "d: "}, "document"
    model.calls.clear()
    encode_once(model, [asymmetric()])
    assert dict(model.calls) == {"": ["zero"], "d: ": ["ten", "zero"]}


def test_what_is_not_finite_or_has_no_correlation_has_no_score():
    """Regression: NaN in the table, and in what a program would read as JSON."""
    pairs = [ScoredPair("zero", "ten", 1.0), ScoredPair("zero", "zero", 1.0)]
    with pytest.raises(ValueError, match="s: there is no correlation"):
        evaluate_models({"m": Planted(ANGLES)}, [STS(name="s", family="f", parts={"": pairs})], resamples=2)
    broken = Planted({**ANGLES, "ten": [math.nan, 1.0]})
    with pytest.raises(ValueError, match="the vector of 'ten' is not finite"):
        encode_once(broken, [asymmetric()])


def test_intervals_hold_the_score_and_pair_the_models(random_model):
    """A model against a copy of itself differs by nothing, in every draw."""
    generator = np.random.default_rng(1)
    pairs = [ScoredPair(f"t{n}", f"t{n + 30}", float(generator.integers(6))) for n in range(30)]
    tasks = [STS(name="s", family="sts", parts={"": pairs}), asymmetric()]
    random_model.vectors.update({text: [*vector, 0, 0] for text, vector in ANGLES.items()})
    other = Planted({text: generator.normal(size=4).tolist() for text in random_model.vectors})
    models = {"a": random_model, "copy": random_model, "b": other}
    evaluation = evaluate_models(models, tasks, resamples=200)
    for scores in evaluation.models:
        value, low, high = scores.families["sts"]
        assert low < value < high and 20 < high - low < 140
    same, different, _ = evaluation.differences
    assert same.families["mean"] == (0, 0, 0)
    a, b = evaluation.models[0], evaluation.models[2]
    assert (different.model, different.other) == ("a", "b")
    assert different.families["sts"].value == pytest.approx(a.families["sts"].value - b.families["sts"].value)
    assert a.families["mean"].value == pytest.approx((a.families["sts"].value + a.families["f"].value) / 2)
