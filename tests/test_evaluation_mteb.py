"""The mini suite's kinds under MTEB, and MTEB's own mock tasks, all offline."""

import numpy as np
import pytest

pytest.importorskip("mteb", reason="mteb is not installed: pip install 'uncausal[mteb]'")

import mteb
from sentence_transformers import SentenceTransformer

from uncausal.encoder.evaluation.compare import INSTRUCT, evaluate_models
from uncausal.encoder.evaluation.mteb import InstructedEncoder, evaluate_mteb, find_task, main_scores
from uncausal.encoder.evaluation.sts import ScoredPair
from uncausal.encoder.evaluation.tasks import (
    STS,
    Classification,
    Clustering,
    PairClassification,
    Reranking,
    Retrieval,
)
from uncausal.encoder.model import Encoder

WORDS = "river bank money loan water fish boat credit swim interest debt lake tide coin market".split()


def sentences(count, seed):
    generator = np.random.default_rng(seed)
    return [f"{' '.join(generator.choice(WORDS, 5))} {number}" for number in range(count)]


def tasks():
    first, second = sentences(24, 0), sentences(24, 1)
    pairs = [ScoredPair(a, b, float(n % 6)) for n, (a, b) in enumerate(zip(first, second, strict=True))]
    samples = [
        {"query": query, "positive": second[n : n + 2], "negative": second[n + 2 : n + 6]}
        for n, query in enumerate(first[:12])
    ]
    rows = [(text, "xyz"[n % 3]) for n, text in enumerate(sentences(60, 2))]
    return [
        STS(name="sts-one", family="sts", parts={"": pairs}, instruction="compare"),
        STS(name="sts-parts", family="sts", parts={"a": pairs[:12], "b": pairs[12:]}),
        Retrieval(
            name="retrieval",
            family="retrieval",
            queries={f"q{n}": text for n, text in enumerate(first)},
            documents={f"d{n}": text for n, text in enumerate(second)},
            relevant={f"q{n}": {f"d{n}", f"d{(n + 5) % 24}"} for n in range(24)},
            instruction="find it",
        ),
        Reranking(name="reranking", family="reranking", samples=samples),
        PairClassification(
            name="pairs", family="pair", pairs=[pair._replace(score=float(pair.score > 3)) for pair in pairs]
        ),
        Classification(name="classes", family="class", train=rows[:30], test=rows[30:], draws=3),
        Clustering(
            name="clusters", family="cluster", documents=[r[0] for r in rows], labels=[r[1] for r in rows]
        ),
    ]


@pytest.fixture(scope="module")
def encoder(smollm2):
    return Encoder.from_pretrained(smollm2, num_layers=1, dtype="float32", device="cpu")


def test_local_tasks_score_as_the_suite_does(encoder):
    ours = {name: s.value for name, s in evaluate_models({"m": encoder}, tasks()).models[0].tasks.items()}
    theirs = main_scores(evaluate_mteb(encoder, [task.name for task in tasks()], tasks()))
    assert list(theirs) == list(ours)
    for name in ("sts-one", "sts-parts", "retrieval", "reranking", "pairs"):
        assert theirs[name] == pytest.approx(ours[name], abs=0.02), name
    for name in ("classes", "clusters"):  # of other probes
        assert 0 < theirs[name] < 100


class Listener(SentenceTransformer):
    """A model that keeps what it was asked to encode."""

    def __init__(self, encoder):
        super().__init__(modules=list(encoder.children()), device="cpu")
        self.asked = {}

    def encode(self, inputs, *args, prompt=None, **options):
        self.asked.setdefault(prompt, set()).update(inputs)
        return super().encode(inputs, *args, prompt=prompt, **options)


def test_instructions_go_before_queries_alone(encoder):
    listener, retrieval, sts = Listener(encoder), tasks()[2], tasks()[0]
    evaluate_mteb(listener, ["retrieval", "sts-one"], [retrieval, sts], instruct=INSTRUCT)
    assert listener.asked == {
        "Instruct: find it\nQuery: ": set(retrieval.queries.values()),
        None: set(retrieval.documents.values()),
        "Instruct: compare\nQuery: ": set(sts.texts()["query"]),
    }


def test_mock_run_passes(encoder):
    results = mteb.mock_run(InstructedEncoder(encoder, INSTRUCT))
    ran = [name for name, status in results.items() if status is not None]
    assert results.all_passed, results.to_markdown()
    assert len(ran) > 5


def test_unknown_task_is_named(encoder):
    with pytest.raises(KeyError, match="STSBenchmark"):
        evaluate_mteb(encoder, ["STSBenchmrk"])


@pytest.mark.parametrize(
    ("split", "found"), [(None, ["validation", "test"]), ("dev", ["validation"]), ("test", ["test"])]
)
def test_split_is_scored_that_was_asked_for(encoder, monkeypatch, split, found):
    """Regression: whatever the split, MTEB's tasks were scored on all that they have."""
    asked = []
    monkeypatch.setattr(mteb, "evaluate", lambda model, tasks, **options: asked.extend(tasks))
    evaluate_mteb(encoder, ["PoemSentimentClassification"], split=split)
    assert list(asked[0].eval_splits) == found


def test_split_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="STS12: MTEB has no dev split of it to score, only test"):
        find_task("STS12", "dev")
