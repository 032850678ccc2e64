"""Corpora on Ray Data: the shards of `encode_corpus`, bit by bit, from a pool of workers on any machines.

One task reads the input and cuts it into shards, each a row, which no block splits; each worker holds a model
and writes shards as the local engine does. Ray starts anew what dies, and holds the reader back while the
workers are busy. The folder must be one that all machines see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from uncausal.encoder.serving.corpus import (
    CorpusResult,
    CorpusSettings,
    close_corpus,
    cut_into_shards,
    encode_shard,
    is_done,
    open_corpus,
)


def encode_corpus_on_ray(
    load: Callable[[], SentenceTransformer],
    read: Callable[[], Iterable[tuple[str, str]]],
    output: str | Path,
    settings: CorpusSettings | None = None,
    *,
    workers: int = 1,
    cpus: float | None = None,
    gpus: float = 0,
    show_progress_bar: bool = False,
) -> CorpusResult:
    """Encode (id, text) rows to Parquet shards on Ray, leaving out those that are there already.

    Args:
        load: returns an `Encoder` that is packed; called in every worker.
        read: returns the rows, in an order that does not change between runs; called in the task that reads.
        output: folder of the shards.
        settings: what decides their bytes.
        workers: models at work at a time.
        cpus: of each worker; by default an equal share of the cluster's, but for the reader's one.
        gpus: of each worker.
        show_progress_bar: draw a bar, with tokens a second.

    Returns:
        What was done.

    Raises:
        RuntimeError: a worker failed; its own error says why (`encode_corpus` says what there is).
    """
    settings, output = settings or CorpusSettings(), Path(output).absolute()
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    context = DataContext.get_current()
    context.target_max_block_size = 1  # a block a shard
    context.enable_progress_bars = False
    share = cpus if cpus is not None else max(ray.cluster_resources()["CPU"] - READER_CPUS, 1) / workers

    def shards(_: Any) -> Iterator[dict[str, np.ndarray]]:
        for number, rows in cut_into_shards(read(), settings):
            done = is_done(output, number, rows)
            yield {
                "number": np.array([number]),
                "rows": np.array([len(rows)]),
                "ids": _column([] if done else [id for id, _ in rows]),
                "texts": _column([] if done else [text for _, text in rows]),
            }

    done = (
        # of items, which take no task; ray.data.range does, and workers may have left it no CPU
        ray.data.from_items([0])
        .map_batches(shards, num_cpus=READER_CPUS)
        .map_batches(
            Worker,
            fn_constructor_args=(load, output, settings),
            batch_size=1,
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            num_cpus=share,
            num_gpus=gpus,
        )
    )
    encoded = found = tokens = count = 0
    start = time.perf_counter()
    with tqdm(desc="Encoding", unit="text", disable=not show_progress_bar) as bar:
        for row in done.iter_rows():
            tokens, count = tokens + row["tokens"], count + 1
            encoded += row["rows"] * row["written"]
            found += row["rows"] * (not row["written"])
            bar.set_postfix({"tokens/s": f"{tokens / (time.perf_counter() - start):,.0f}"})
            bar.update(row["rows"])
    close_corpus(output, count, encoded + found)
    return CorpusResult(encoded, found, tokens, time.perf_counter() - start, count)


READER_CPUS = 0.5


class Worker:
    """A model in a process of its own."""

    def __init__(self, load: Callable[[], SentenceTransformer], output: Path, settings: CorpusSettings):
        self.encoder, self.output = load(), output
        self.settings = open_corpus(self.encoder, output, settings)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode and write a shard, if it is still to be written."""
        rows = list(zip(batch["ids"][0], batch["texts"][0], strict=True))
        number = int(batch["number"][0])
        tokens = encode_shard(self.encoder, rows, self.output, number, self.settings) if rows else 0
        counts = {"rows": batch["rows"], "tokens": np.array([tokens]), "written": np.array([bool(rows)])}
        return counts


def _column(values: list[str]) -> np.ndarray:
    """One row that is a list."""
    column = np.empty(1, dtype=object)
    column[0] = values
    return column
