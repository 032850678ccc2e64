"""Corpora on Ray Data: the shards of `encode_corpus`, bit by bit, from a pool of workers on any machines.

One task reads the input and cuts it into shards, each a row, which no block splits; each worker holds a model
and writes shards as the local engine does. Ray starts anew what dies, and holds the reader back while the
workers are busy. The folder must be one that all machines see. An exception comes back as a row, for Ray
would bury it under tracebacks of its own.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError, RayTaskError
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from uncausal.encoder.serving.corpus import (
    CorpusResult,
    CorpusSettings,
    close_corpus,
    cut_into_shards,
    digest_of_manifest,
    digest_of_rows,
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
        RuntimeError: a worker or the reader failed, and this is what it said (`encode_corpus` and `read` say
            what there is); or Ray did. Its cause has the worker's traceback.
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
        try:
            for number, rows in cut_into_shards(read(), settings):
                done = is_done(output, number, rows, digest_of_manifest(output))
                texts = [] if done else rows
                ids, texts = [id for id, _ in texts], [text for _, text in texts]
                yield _shard_row(number, len(rows), ids, texts, digest=digest_of_rows(rows))
        except Exception as error:
            yield _shard_row(-1, 0, failure=_failure(error))

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
    encoded = found = tokens = 0
    digests: dict[int, str] = {}
    start = time.perf_counter()
    with tqdm(desc="Encoding", unit="text", disable=not show_progress_bar) as bar:
        try:
            for row in done.iter_rows():
                if len(row["failure"]):
                    said, where = row["failure"]
                    raise RuntimeError(said) from RuntimeError(where)
                tokens, digests[row["number"]] = tokens + row["tokens"], row["digest"]
                encoded += row["rows"] * row["written"]
                found += row["rows"] * (not row["written"])
                bar.set_postfix({"tokens/s": f"{tokens / (time.perf_counter() - start):,.0f}"})
                bar.update(row["rows"])
        except RayError as error:
            lines = (str(error).strip() or type(error).__name__).splitlines()
            reason = lines[-1] if isinstance(error, RayTaskError) else " ".join(map(str.strip, lines))
            raise RuntimeError(f"Ray: {reason}; the same again goes on from the shards there") from error
    close_corpus(output, [digests[number] for number in sorted(digests)], encoded + found)
    return CorpusResult(encoded, found, tokens, time.perf_counter() - start, len(digests))


READER_CPUS = 0.5


class Worker:
    """A model in a process of its own."""

    def __init__(self, load: Callable[[], SentenceTransformer], output: Path, settings: CorpusSettings):
        self.output, self.failure = output, []
        try:
            self.encoder = load()
            self.settings = settings
            # a manifest is written with the first rows, and not for an input that cannot be read
            self.opened = open_corpus(self.encoder, output, settings) if digest_of_manifest(output) else None
        except Exception as error:
            self.failure = _failure(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode and write a shard, if it is still to be written; hand on what failed."""
        rows = list(zip(batch["ids"][0], batch["texts"][0], strict=True))
        failure, tokens = self.failure or list(batch["failure"][0]), 0
        if rows and not failure:
            try:
                self.opened = self.opened or open_corpus(self.encoder, self.output, self.settings)
                tokens = encode_shard(self.encoder, rows, self.output, int(batch["number"][0]), *self.opened)
            except Exception as error:
                failure = _failure(error)
        told = {name: batch[name] for name in ("number", "rows", "digest")}
        counts = {"tokens": np.array([tokens]), "written": np.array([bool(rows)])}
        return {**told, **counts, "failure": _column(failure)}


def _failure(error: Exception) -> list[str]:
    """What an exception says, with its name where that is no sentence, and where it was raised."""
    worded = isinstance(error, ValueError | OSError | NotImplementedError | RuntimeError | ImportError)
    said = f"{error}" if worded else f"{type(error).__name__}: {error}"
    return [said, "".join(traceback.format_exception(error))]


def _shard_row(
    number: int,
    rows: int,
    ids: Sequence[str] = (),
    texts: Sequence[str] = (),
    failure: Sequence[str] = (),
    digest: str = "",
) -> dict[str, np.ndarray]:
    """A shard on its way to a worker; without ids and texts where it is done."""
    lists = {"ids": ids, "texts": texts, "failure": failure}
    columns = {name: _column(list(values)) for name, values in lists.items()}
    facts = {"number": number, "rows": rows, "digest": digest}
    return {**{name: np.array([value]) for name, value in facts.items()}, **columns}


def _column(values: list[str]) -> np.ndarray:
    """One row that is a list."""
    column = np.empty(1, dtype=object)
    column[0] = values
    return column
