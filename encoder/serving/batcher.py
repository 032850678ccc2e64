"""Batches by token budget across requests, in arrival order, for one model in one thread.

A text waits in a queue as its tokens. The thread takes texts from the front for as long as they fit the
budget, runs them packed, and answers each on its own. Who has left (a cancelled future) is never computed.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device

logger = logging.getLogger(__name__)


class ClosedError(RuntimeError):
    """The server is stopping."""


class QueueFullError(RuntimeError):
    """There is no room in the queue."""


class Job(NamedTuple):
    """A text that waits."""

    ids: Sequence[int]
    prompt_length: int
    future: Future[np.ndarray]
    arrived: float


class Batch(NamedTuple):
    """What a batch cost, for whoever watches."""

    texts: int
    tokens: int
    seconds: float
    longest_wait: float


class Batcher:
    """Runs an encoder on what is submitted.

    Args:
        encoder: an `Encoder` that is packed.
        batch_tokens: tokens a batch at most; a longer text runs alone.
        alone: the length beyond which a text runs alone in any case (`elementwise.alone_beyond`).
        max_waiting: texts in the queue at most.
        watch: called with every `Batch`, in the model's thread.
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        *,
        batch_tokens: int,
        max_waiting: int,
        alone: int | None = None,
        watch: Callable[[Batch], None] = lambda batch: None,
    ):
        self.encoder: Any = encoder.eval()
        self.batch_tokens, self.max_waiting, self.watch = batch_tokens, max_waiting, watch
        self.alone = sys.maxsize if alone is None else alone
        self.jobs: deque[Job] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.tokens_per_second = 0.0  # of the last batch; the queue's length in seconds follows from it
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self.jobs)

    def submit(
        self, texts: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None
    ) -> list[Future[np.ndarray]]:
        """Queue the texts of one request, all or none, and return a future (d,) float32 for each.

        Args:
            texts: token ids, at least one that is not the prompt's.
            prompt_lengths: leading tokens of each that are attended but not pooled; none by default.

        Raises:
            QueueFullError: no room for all of them.
            ClosedError: the batcher is closed.
        """
        now = time.monotonic()
        with self.changed:
            if self.closing:
                raise ClosedError("the server is stopping")
            if not self.has_room(len(texts)):
                raise QueueFullError("the queue is full")
            lengths = prompt_lengths or [0] * len(texts)
            jobs = [Job(ids, length, Future(), now) for ids, length in zip(texts, lengths, strict=True)]
            self.jobs.extend(jobs)
            self.changed.notify()
        return [job.future for job in jobs]

    def has_room(self, count: int) -> bool:
        """Whether so many texts more may wait, once those of whoever has left are dropped."""
        if len(self.jobs) + count > self.max_waiting:
            with self.changed:
                staying = [job for job in self.jobs if not job.future.cancelled()]
                self.jobs.clear()
                self.jobs.extend(staying)
        return len(self.jobs) + count <= self.max_waiting

    def seconds_left(self) -> int:
        """How long the queue will take, at the last batch's pace; 1 before there was one."""
        tokens = sum(len(job.ids) for job in [*self.jobs])
        return max(1, round(tokens / self.tokens_per_second)) if self.tokens_per_second else 1

    def close(self) -> None:
        """Answer what was accepted, then stop the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def _take(self) -> list[Job]:
        """Wait for texts, and take those at the front that fit one batch; none when closed and done."""
        with self.changed:
            while not self.jobs and not self.closing:
                self.changed.wait()
            taken: list[Job] = []
            room = self.batch_tokens
            while self.jobs and (not taken or len(self.jobs[0].ids) <= min(room, self.alone)):
                job = self.jobs.popleft()
                if job.future.set_running_or_notify_cancel():
                    taken.append(job)
                    room = room - len(job.ids) if len(job.ids) <= self.alone else 0
            return taken

    def _work(self) -> None:
        while True:
            jobs = self._take()
            if not jobs:
                with self.changed:
                    if self.closing and not self.jobs:
                        return
                continue
            start = time.monotonic()
            self._answer(jobs)
            seconds, tokens = time.monotonic() - start, sum(len(job.ids) for job in jobs)
            self.tokens_per_second = tokens / max(seconds, 1e-6)
            self.watch(Batch(len(jobs), tokens, seconds, start - min(job.arrived for job in jobs)))

    def _answer(self, jobs: list[Job]) -> None:
        """Run jobs together; where that fails, run halves, so that one bad text fails alone."""
        try:
            vectors = self._vectors(jobs)
        except Exception as error:  # whatever the model raises belongs to the request, not to the thread
            # Its traceback holds what the batch had allocated.
            failure, memory = error.with_traceback(None), isinstance(error, torch.OutOfMemoryError)
        else:
            for job, vector in zip(jobs, vectors, strict=True):
                if np.isfinite(vector).all():
                    job.future.set_result(vector)
                else:
                    job.future.set_exception(ValueError("the vector is not finite"))
            return
        if len(jobs) == 1:
            jobs[0].future.set_exception(failure)
            return
        logger.warning("a batch of %d texts failed (%s): trying its halves", len(jobs), failure)
        if memory:
            torch.cuda.empty_cache()
        self._answer(jobs[: len(jobs) // 2])
        self._answer(jobs[len(jobs) // 2 :])

    @torch.inference_mode()
    def _vectors(self, jobs: list[Job]) -> np.ndarray:
        prompts = [job.prompt_length for job in jobs]
        features = self.encoder[0].collate([job.ids for job in jobs], prompts if any(prompts) else None)
        vectors = self.encoder(batch_to_device(features, self.encoder.device))["sentence_embedding"]
        return vectors.float().cpu().numpy()
