"""The kinds of evaluation task: which texts each needs encoded, and its score of the vectors.

A task names its texts, is given their vectors, and answers with a `Measurement`: the number of units it is
made of (pairs, queries, test examples) and the score of any choice of them, so that the same resampling gives
every task an interval. Scores are in points, 0 to 100. Similarity is the cosine everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.stats import spearmanr
from sentence_transformers.util import cos_sim, pairwise_cos_sim
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, ndcg_score, v_measure_score
from torch.nn.functional import normalize

from uncausal.encoder.evaluation.sts import ScoredPair

QUERY, DOCUMENT = "query", "document"


class Measurement(NamedTuple):
    """How many units a task was measured on, and the score of any of them (an array of their numbers)."""

    size: int
    score: Callable[[np.ndarray], float]


class Vectors(Protocol):
    """Looks up the vectors, (texts, dimension) in float32 on the CPU, of texts that were encoded before."""

    def __call__(self, texts: Sequence[str], side: str = QUERY) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all kinds share.

    Args:
        name: names the task in reports.
        family: tasks of one family are averaged before families are.
        instruction: what to do, in words, for models that are told.
    """

    name: str
    family: str
    instruction: str = ""

    def texts(self) -> dict[str, list[str]]:
        """The texts to encode: "query" the side that an instruction is put before, "document" the other."""
        raise NotImplementedError

    def measure(self, vectors: Vectors) -> Measurement:
        """Score the vectors."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class STS(Task):
    """Spearman's correlation of cosines with the scores that people gave, averaged over the parts of the set.

    Args:
        parts: pairs by part; most sets have one.
    """

    parts: Mapping[str, Sequence[ScoredPair]]

    def texts(self) -> dict[str, list[str]]:
        return {QUERY: [text for pairs in self.parts.values() for pair in pairs for text in pair[:2]]}

    def measure(self, vectors: Vectors) -> Measurement:
        pairs = [pair for part in self.parts.values() for pair in part]
        part = np.repeat(np.arange(len(self.parts)), [len(pairs) for pairs in self.parts.values()])
        cosines = _cosines(vectors, pairs)
        gold = np.array([pair.score for pair in pairs])

        def score(rows: np.ndarray) -> float:
            correlations = []
            for number in range(len(self.parts)):
                chosen = rows[part[rows] == number]
                correlation: Any = spearmanr(cosines[chosen], gold[chosen])[0]
                correlations.append(correlation)
            return 100 * float(np.mean(correlations))

        if not np.isfinite(score(np.arange(len(pairs)))):
            raise ValueError(
                f"{self.name}: there is no correlation, as all scores or all cosines are the same"
            )
        return Measurement(len(pairs), score)


@dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """nDCG@10 of the documents ranked by cosine, averaged over queries; relevance is yes or no.

    Args:
        queries, documents: text by id.
        relevant: ids of a query's relevant documents, by query id.
    """

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    relevant: Mapping[str, set[str]]

    def __post_init__(self) -> None:
        for query in self.queries:
            missing = self.relevant[query] - self.documents.keys()
            if missing or not self.relevant[query]:
                raise ValueError(
                    f"{self.name}: query {query!r} has no relevant document, or absent ones: {missing}"
                )

    def texts(self) -> dict[str, list[str]]:
        return {QUERY: list(self.queries.values()), DOCUMENT: list(self.documents.values())}

    def measure(self, vectors: Vectors) -> Measurement:
        similarity = cos_sim(
            vectors(list(self.queries.values())), vectors(list(self.documents.values()), DOCUMENT)
        ).numpy()
        values = []
        for row, query in zip(similarity, self.queries, strict=True):
            gain = [document in self.relevant[query] for document in self.documents]
            values.append(ndcg_score([gain], [row], k=10))
        return _mean_of(values)


@dataclass(frozen=True, kw_only=True)
class Reranking(Task):
    """Mean average precision of few candidates ranked by cosine.

    Args:
        samples: {"query", "positive": [...], "negative": [...]}, as sentence-transformers' evaluator takes.
    """

    samples: Sequence[Mapping[str, Any]]

    def texts(self) -> dict[str, list[str]]:
        documents = [text for s in self.samples for text in (*s["positive"], *s["negative"])]
        return {QUERY: [sample["query"] for sample in self.samples], DOCUMENT: documents}

    def measure(self, vectors: Vectors) -> Measurement:
        values = []
        for sample in self.samples:
            candidates = [*sample["positive"], *sample["negative"]]
            similarity = cos_sim(vectors([sample["query"]]), vectors(candidates, DOCUMENT))[0].numpy()
            gain = np.arange(len(candidates)) < len(sample["positive"])
            values.append(average_precision_score(gain, similarity))
        return _mean_of(values)


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Accuracy of a logistic regression on a few examples a label, averaged over draws of the examples.

    The probe sees vectors of length 1.

    Args:
        train: labelled texts to draw the examples from.
        test: labelled texts to classify.
        shots: examples a label in a draw.
        draws: how many draws.
    """

    train: Sequence[tuple[str, str]]
    test: Sequence[tuple[str, str]]
    shots: int = 8
    draws: int = 10

    def __post_init__(self) -> None:
        leaked = {text for text, _ in self.train} & {text for text, _ in self.test}
        if leaked:
            raise ValueError(f"{self.name}: {len(leaked)} texts are in train and test: {min(leaked)!r}")

    def texts(self) -> dict[str, list[str]]:
        return {QUERY: [text for text, _ in (*self.train, *self.test)]}

    def measure(self, vectors: Vectors) -> Measurement:
        train, test = (
            normalize(vectors([text for text, _ in rows])).numpy() for rows in (self.train, self.test)
        )
        train_labels, test_labels = (
            np.array([label for _, label in rows]) for rows in (self.train, self.test)
        )
        right = np.zeros(len(test))
        for draw in range(self.draws):
            order = np.random.default_rng(draw).permutation(len(train))
            shots = np.concatenate(
                [order[train_labels[order] == label][: self.shots] for label in np.unique(train_labels)]
            )
            probe = LogisticRegression(C=100, max_iter=1000).fit(train[shots], train_labels[shots])
            right += probe.predict(test) == test_labels
        return _mean_of(right / self.draws)


@dataclass(frozen=True, kw_only=True)
class Clustering(Task):
    """V-measure of k-means, on vectors of length 1, against the labels, averaged over three seeds.

    Args:
        documents: distinct texts.
        labels: a label for each; k is the number of labels.
    """

    documents: Sequence[str]
    labels: Sequence[str]

    def texts(self) -> dict[str, list[str]]:
        return {QUERY: list(self.documents)}

    def measure(self, vectors: Vectors) -> Measurement:
        points, gold = normalize(vectors(self.documents)).numpy(), np.array(self.labels)
        k = len(set(self.labels))
        found = [KMeans(k, n_init="auto", random_state=seed).fit_predict(points) for seed in range(3)]

        def score(rows: np.ndarray) -> float:
            return 100 * float(np.mean([v_measure_score(gold[rows], clusters[rows]) for clusters in found]))

        return Measurement(len(points), score)


@dataclass(frozen=True, kw_only=True)
class PairClassification(Task):
    """Average precision of the true pairs when pairs are ranked by cosine.

    Args:
        pairs: two texts, and 1 if the pair is true, else 0.
    """

    pairs: Sequence[ScoredPair]

    def texts(self) -> dict[str, list[str]]:
        return {QUERY: [text for pair in self.pairs for text in pair[:2]]}

    def measure(self, vectors: Vectors) -> Measurement:
        cosines = _cosines(vectors, self.pairs)
        gold = np.array([pair.score for pair in self.pairs])
        return Measurement(
            len(gold), lambda rows: 100 * float(average_precision_score(gold[rows], cosines[rows]))
        )


def _cosines(vectors: Vectors, pairs: Sequence[ScoredPair]) -> np.ndarray:
    first, second = vectors([pair.first for pair in pairs]), vectors([pair.second for pair in pairs])
    return pairwise_cos_sim(first, second).numpy()


def _mean_of(values: Sequence[float] | np.ndarray) -> Measurement:
    points = 100 * np.asarray(values)
    return Measurement(len(points), lambda rows: float(points[rows].mean()))
