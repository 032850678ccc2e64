"""Code search: the docstrings of packages that no model was trained on, each asked of all their functions."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import cos_sim
from sklearn.feature_extraction.text import CountVectorizer

from uncausal.encoder.data.code import code_pairs
from uncausal.encoder.data.duplicates import NearDuplicates
from uncausal.encoder.data.sources import HELD_OUT_TEST, distribution_files
from uncausal.encoder.serving.index import to_int8

PASSAGES = 20_000  # that the time of a query is measured among


class CodeSearchSet(NamedTuple):
    """Descriptions and functions: a description is of the function at the same place, and of no other."""

    queries: list[str]
    documents: list[str]


def code_search_set(
    packages: Sequence[str] = HELD_OUT_TEST, limit: int = 1000, *, seed: int = 0
) -> CodeSearchSet:
    """Make a search set of installed packages: functions without docstrings, asked for by the docstrings.

    Files are taken whole, so that a function must be told from its neighbours.

    Args:
        packages: names of distributions, each of which gives as many functions as the next if it has them.
        limit: draw so many functions.
        seed: of the draw.

    Raises:
        ValueError: a package is not installed.
    """
    draw = random.Random(seed)
    known, chosen = NearDuplicates(), {}
    files = sorted((list(distribution_files(name)) for name in packages), key=len)
    for number, of_package in enumerate(files):
        wanted = len(chosen) + (limit - len(chosen)) // (len(files) - number)
        draw.shuffle(of_package)
        for file in of_package:
            rows = [row for row in code_pairs([file], known=known) if row["anchor"] not in chosen]
            chosen |= {row["anchor"]: row["positive"] for row in rows[: wanted - len(chosen)]}
            if len(chosen) == wanted:
                break
    return CodeSearchSet(list(chosen), list(chosen.values()))


def evaluate_code_search(
    encoder: SentenceTransformer,
    search_set: CodeSearchSet | None = None,
    *,
    prompt: str | None = None,
    **encode_options: Any,
) -> dict[str, float]:
    """Search every description among all functions, and score where the right one stands.

    Args:
        encoder: any model of sentence-transformers; it cuts texts at its own `max_seq_length`.
        search_set: `code_search_set()` by default.
        prompt: put before the descriptions.
        **encode_options: of `encoder.encode`, for example `batch_tokens` or `truncate_dim`.

    Returns:
        As `search_metrics`.
    """
    queries, documents = search_set or code_search_set()
    asked: Any = encoder.encode_query(queries, prompt=prompt, convert_to_tensor=True, **encode_options)
    stored: Any = encoder.encode_document(documents, convert_to_tensor=True, **encode_options)
    return search_metrics(cos_sim(asked, stored).float().cpu().numpy())


def evaluate_sizes(
    encoder: SentenceTransformer,
    search_set: CodeSearchSet | None = None,
    *,
    dimensions: Sequence[int] = (),
    prompt: str | None = None,
    **encode_options: Any,
) -> list[dict[str, Any]]:
    """Score smaller vectors: the first so many numbers of each (Matryoshka), as float32 and as int8.

    Args:
        encoder, search_set, prompt, **encode_options: as in `evaluate_code_search`.
        dimensions: to keep; by default all.

    Returns:
        A row a size, as `search_metrics` and with dimension, int8, bytes of a stored vector, and the
        milliseconds of one query among 20,000 of them, as `Index.search` compares them: in float32.

    Raises:
        ValueError: a vector has fewer dimensions than asked, or is not finite.
    """
    width, rows = encoder.get_embedding_dimension() or 0, []
    for size in dimensions:
        if not 0 < size <= width:
            raise ValueError(f"the model's vectors have {width} dimensions, not {size}")
    queries, documents = search_set or code_search_set()
    asked = encoder.encode_query(queries, prompt=prompt, convert_to_numpy=True, **encode_options)
    stored = encoder.encode_document(documents, convert_to_numpy=True, **encode_options)
    for size in dimensions or (width,):
        short, queried = (_unit(vectors[:, :size].astype(np.float32)) for vectors in (stored, asked))
        for int8 in (False, True):
            kept = _unit(to_int8(short).astype(np.float32)) if int8 else short
            many = np.resize(kept, (PASSAGES, size))
            started = time.perf_counter()
            for query in queried[:20]:
                np.argsort(-(many @ query))
            taken = (time.perf_counter() - started) / len(queried[:20])
            row = {"dimension": size, "int8": int8, "bytes": size * (1 if int8 else 4), "ms": 1000 * taken}
            rows.append(row | search_metrics(queried @ kept.T))
    return rows


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search_metrics(scores: np.ndarray) -> dict[str, float]:
    """Score a square matrix, query by document, whose diagonal is right.

    Returns:
        In points: mrr@10 (mean reciprocal rank, 0 below rank 10), the 95 % interval of it over resampled
        queries (low, high), and recall@10. A tie counts as lost.

    Raises:
        ValueError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError("a vector is not finite: load the model in another dtype")
    ranks = (scores >= np.diag(scores)[:, None]).sum(1)
    gains = 100 * np.where(ranks <= 10, 1 / ranks, 0)
    resampled = np.random.default_rng(0).choice(gains, (1000, len(gains))).mean(1)
    low, high = np.percentile(resampled, (2.5, 97.5))
    return {
        "mrr@10": float(gains.mean()),
        "low": float(low),
        "high": float(high),
        "recall@10": float(100 * (ranks <= 10).mean()),
        "queries": len(ranks),
    }


def bm25_scores(search_set: CodeSearchSet, *, k1: float = 1.2, b: float = 0.75) -> np.ndarray:
    """Score every document for every query by BM25 (Robertson and Zaragoza 2009, equation 3.15).

    Names are taken apart (`readFile`, `read_file` -> read, file); without that BM25 loses a third.
    """
    analyzer: Any = _words
    vectorizer = CountVectorizer(analyzer=analyzer)
    counts: Any = csr_array(vectorizer.fit_transform(search_set.documents), dtype=float)
    asked = csr_array(vectorizer.transform(search_set.queries))
    lengths = np.asarray(counts.sum(1)).ravel()
    found = np.bincount(counts.indices, minlength=counts.shape[1])
    weight = np.log(1 + (counts.shape[0] - found + 0.5) / (found + 0.5))
    norm = np.repeat(k1 * (1 - b + b * lengths / lengths.mean()), np.diff(counts.indptr))
    counts.data = weight[counts.indices] * counts.data * (k1 + 1) / (counts.data + norm)
    return (asked @ counts.T).toarray()


def _words(text: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", text)]
