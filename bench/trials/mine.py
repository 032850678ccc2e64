"""Mining of hard negatives as the corpus grows to 200,000 documents: peak memory and time.

`python -m uncausal.bench.trials.mine --data-dir DIR [--documents 200000] [--pairs N] [--teacher MODEL]` mines
for as many pairs as documents, sentences of Wikipedia, and prints a line for each size, or with `--json`.
Every size has a process of its own. The teacher's vectors are random ones that are in memory before, so that
what grows is mining's own; with `--teacher` a model (or bm25) encodes, and what that takes is counted too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from uncausal.bench.measure import resident_bytes
from uncausal.bench.trials.corpus import passages
from uncausal.encoder.training.mining import Mining

SIZES = (20_000, 50_000, 100_000, 200_000)
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--documents", type=int, default=SIZES[-1])
    parser.add_argument("--pairs", type=int, help="by default as many as documents")
    parser.add_argument("--teacher", help="a model's name or folder, or bm25")
    parser.add_argument("--dimension", type=int, default=384, help="of the random vectors")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = [size for size in SIZES if size < options.documents] + [options.documents]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(measure, (options, size)) for size in sizes]
    if options.json:
        print(json.dumps(rows))
        return
    print("".join(f"{name:>12}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:12,}" for value in row.values()))


def measure(options: argparse.Namespace, size: int) -> dict[str, int]:
    """Mine for `size` documents; return the growth of this process's memory at its highest, in MiB."""
    count = min(options.pairs or size, size)
    texts = [f"{i} {text}" for i, text in enumerate(passages(options.data_dir, size))]
    anchors = [f"{i} what is said of {text.split()[-1]}" for i, text in enumerate(texts[:count])]
    pairs = Dataset.from_dict({"anchor": anchors, "positive": texts[:count]})
    del anchors
    teacher: Any = options.teacher or RandomTeacher(size, count, options.dimension)
    seconds = 0.0

    def run() -> None:
        nonlocal seconds
        start = time.perf_counter()
        assert len(Mining().mine(pairs, teacher, texts))
        seconds = time.perf_counter() - start

    peak = resident_bytes(run, "cpu")
    vectors = 0 if options.teacher else (size + count) * options.dimension * 4
    return {
        "documents": size,
        "pairs": count,
        "vectors MiB": round(vectors / MIB),
        "peak MiB": round(peak / MIB),
        "seconds": round(seconds),
    }


class RandomTeacher:
    """Random unit vectors of texts that begin with their number; a pair's cosine is about 0.8."""

    device = torch.device("cpu")
    similarity_fn_name = "cosine"

    def __init__(self, documents: int, queries: int, dimension: int):
        draw = np.random.default_rng(0)
        self.documents, self.queries = (
            draw.standard_normal((rows, dimension), dtype=np.float32) for rows in (documents, queries)
        )
        for vectors in (self.documents, self.queries):
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self.queries *= 0.6
        self.queries += 0.8 * self.documents[:queries]
        self.queries /= np.linalg.norm(self.queries, axis=1, keepdims=True)

    def encode_document(self, texts: list[str], **options: Any) -> np.ndarray:
        return self._of(self.documents, texts)

    def encode_query(self, texts: list[str], **options: Any) -> np.ndarray:
        return self._of(self.queries, texts)

    def similarity(self, queries: Any, documents: Any) -> Tensor:
        return torch.as_tensor(queries) @ torch.as_tensor(documents).T

    def similarity_pairwise(self, queries: Any, documents: Any) -> Tensor:
        return (torch.as_tensor(queries) * torch.as_tensor(documents)).sum(1)

    def _of(self, vectors: np.ndarray, texts: list[str]) -> np.ndarray:
        numbers = np.fromiter((int(text.split(maxsplit=1)[0]) for text in texts), np.int64, len(texts))
        return vectors if np.array_equal(numbers, np.arange(len(vectors))) else vectors[numbers]


if __name__ == "__main__":
    main()
