"""What stands behind the server's routes: the encoder, its tokeniser's thread, its queue, its counters.

Tokenisation, inference and serialisation do not wait for one another: one thread tokenises, one runs the
model, the event loop does the rest.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from fastapi import Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from uncausal.encoder.elementwise import alone_beyond
from uncausal.encoder.inputs import own_prompt
from uncausal.encoder.serving.batcher import Batch, Batcher, ClosedError, QueueFullError

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Limits:
    """What the server takes.

    Args:
        batch_tokens: tokens a batch; 1,024 by default on a CPU, 16,384 elsewhere.
        max_waiting: texts in the queue; more are answered 429.
        max_texts: in one request; more are answered 413.
        max_bytes: of a request's body; more are answered 413.
        max_waiting_bytes: of all requests and answers on their way; more are answered 429. A body that was
            parsed may take up to 30 times as much.
        body_seconds: for a body to arrive, or a client is answered 408.
        auto_truncate: cut texts that are too long, and say so in the header `X-Truncated-Texts`, instead of
            answering 422.
        api_key: if given, requests must carry `Authorization: Bearer <key>`.
        dimensions: Matryoshka dimensions that may be asked for; others are answered 400.
    """

    batch_tokens: int | None = None
    max_waiting: int = 8192
    max_texts: int = 2048
    max_bytes: int = 2_000_000
    max_waiting_bytes: int = 32_000_000
    body_seconds: float = 30.0
    auto_truncate: bool = False
    api_key: str | None = None
    dimensions: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.api_key is not None:
            self.api_key = self.api_key.strip()  # no header could carry the line's end
            if not self.api_key:
                raise ValueError("the API key is empty")
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name.replace('_', ' ')} is {value}; it must be above 0")
        if self.max_waiting_bytes < self.max_bytes:
            told = f"{self.max_waiting_bytes}; it must not be below max bytes, {self.max_bytes}"
            raise ValueError(f"max waiting bytes is {told}")

    @property
    def most_texts(self) -> int:
        """In one request, all of which must find room in the queue."""
        return min(self.max_texts, self.max_waiting)

    def check(self, encoder: Any, name: str) -> None:
        """Refuse, with ValueError, an encoder that cannot be served so."""
        if not getattr(encoder, "packed", False):
            raise ValueError(f"{name} does not run packed, which the server's batches are")
        width = encoder.get_embedding_dimension()
        for dimension in self.dimensions:
            if not 1 <= dimension <= width:
                raise ValueError(f"dimension {dimension} is none that {name} has: 1 to {width}")


class Refused(Exception):
    """A request that cannot be answered; carries the status and what the client is told."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class Encoded(NamedTuple):
    """The vectors (n, d) float32 of a request, and what they were made of."""

    vectors: np.ndarray
    tokens: int
    truncated: int


class Service:
    """What stands behind the routes: the encoder, its queue, its tokeniser's thread, its counters.

    Args:
        load: returns the encoder; called in a thread while the server already answers 503.
        name: the model's, in answers.
    """

    def __init__(self, load: Callable[[], Any], name: str, limits: Limits):
        self.load, self.name, self.limits = load, name, limits
        self.encoder: Any = None
        self.batcher: Batcher | None = None
        self.failure: Exception | None = None
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")  # tokenizers share state
        self.untokenized = 0  # texts that wait for it
        self.held_bytes = 0  # of requests that are not answered yet, and of answers that have not left
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "uncausal_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "uncausal_request_seconds", "Seconds a request took", ["route"], registry=registry
        )
        self.tokenize_seconds = Histogram(
            "uncausal_tokenization_seconds", "Seconds of tokenisation", registry=registry
        )
        self.wait_seconds = Histogram(
            "uncausal_queue_seconds", "Longest wait in the queue of a batch's texts", registry=registry
        )
        self.inference_seconds = Histogram(
            "uncausal_inference_seconds", "Seconds of a batch in the model", registry=registry
        )
        buckets = [2**n for n in range(15)]
        self.batch_texts = Histogram(
            "uncausal_batch_texts", "Texts a batch", registry=registry, buckets=buckets
        )
        self.batch_tokens = Histogram(
            "uncausal_batch_tokens", "Tokens a batch", registry=registry, buckets=buckets
        )
        waiting = Gauge("uncausal_queue_size", "Texts that wait", registry=registry)
        waiting.set_function(lambda: self.untokenized + (self.batcher.waiting if self.batcher else 0))

    def start(self) -> None:
        """Load the encoder and open the queue."""
        try:
            encoder = self.load()
            self.limits.check(encoder, self.name)
            budget = self.limits.batch_tokens or (1024 if encoder.device.type == "cpu" else 16384)
            self.encoder = encoder
            alone = alone_beyond(encoder.backbone.config)
            bounds: Any = {"batch_tokens": budget, "max_waiting": self.limits.max_waiting, "alone": alone}
            self.batcher = Batcher(encoder, **bounds, watch=self._watch)
        except Exception as error:  # told by /health until someone stops the server
            logger.exception("could not load %s", self.name)
            self.failure = error

    def stop(self) -> None:
        """Answer what was accepted."""
        if self.batcher is not None:
            self.batcher.close()
        self.tokenizing.shutdown()

    def _watch(self, batch: Batch) -> None:
        self.batch_texts.observe(batch.texts)
        self.batch_tokens.observe(batch.tokens)
        self.inference_seconds.observe(batch.seconds)
        self.wait_seconds.observe(batch.longest_wait)

    def ready(self) -> Batcher:
        if self.failure is not None:
            raise Refused(503, f"the model could not be loaded: {self.failure}")
        if self.batcher is None:
            raise Refused(503, "the model is being loaded", retry_after=1)
        if not self.batcher.thread.is_alive():
            raise Refused(503, "the model's thread has ended: restart the server")
        return self.batcher

    def overloaded(self) -> Refused:
        """What is answered while there is no room."""
        seconds = self.batcher.seconds_left() if self.batcher else 1
        return Refused(429, f"overloaded: the queue is full; try again in {seconds} s", seconds)

    async def embed(
        self, request: Request, given: Any, *, prompt: str | None = None, truncate: bool | None = None
    ) -> Encoded:
        """Tokenise, queue and await the texts or token lists of one request."""
        batcher = self.ready()
        texts = [given] if isinstance(given, str) or given and isinstance(given[0], int) else given
        if not texts:
            raise Refused(400, "the input is empty")
        if len(texts) > self.limits.most_texts:
            raise Refused(413, f"{len(texts)} texts in a request; at most {self.limits.most_texts} are taken")
        prompt = own_prompt(self.encoder, prompt)
        cut = self.limits.auto_truncate if truncate is None else truncate
        futures: list[Any] = []
        task, left = asyncio.current_task(), False

        async def watch() -> None:
            nonlocal left
            await _disconnected(request)
            left = True
            task.cancel()  # pyright: ignore[reportOptionalMemberAccess]

        gone = asyncio.ensure_future(watch())
        try:
            try:
                told = await self.in_tokenizer(len(texts), self.tokenize, texts, prompt, cut)
                ids, prompts, truncated = told
                futures = batcher.submit(ids, prompts)
                vectors = await asyncio.gather(*map(asyncio.wrap_future, futures))
            finally:
                if left:  # and the cancellation is still to come
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            if not left:
                raise
            if sys.version_info >= (3, 11):
                task.uncancel()  # pyright: ignore[reportOptionalMemberAccess]
            raise Refused(499, "the client left") from None
        except Refused:
            raise
        except QueueFullError:
            raise self.overloaded() from None
        except ClosedError as error:
            raise Refused(503, str(error)) from None
        except Exception as error:
            raise Refused(424, f"the model failed: {error}") from error
        finally:
            gone.cancel()
            for future in futures:  # the others of a request of which one failed, or whose client left
                future.cancel()
        return Encoded(np.stack(vectors)[:, : self.encoder.truncate_dim], sum(map(len, ids)), truncated)

    async def in_tokenizer(self, count: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the tokenizer's thread, if there is room in the queue for so many texts more."""
        batcher = self.ready()
        if not batcher.has_room(self.untokenized + count):
            raise self.overloaded()
        self.untokenized += count
        box = [arguments]

        def work() -> Any:
            given, start = box.pop(), time.perf_counter()
            found = function(*given)
            self.tokenize_seconds.observe(time.perf_counter() - start)
            return found

        try:
            return await asyncio.get_running_loop().run_in_executor(self.tokenizing, work)
        finally:
            self.untokenized -= count
            box.clear()  # the thread's queue keeps `work` even of a client that has left

    def tokenize(
        self, texts: Sequence[Any], prompt: str | None, cut: bool
    ) -> tuple[list[list[int]], list[int] | None, int]:
        """Token ids of every text, the length in tokens of each one's prompt, and how many texts were cut."""
        transformer, limit = self.encoder[0], self.encoder.max_seq_length
        if isinstance(texts[0], str):
            for number, text in enumerate(texts):
                if not text.strip():
                    raise Refused(400, f"text {number} is empty")
            try:
                ids, prompts, truncated = transformer.tokenize_texts(texts, prompt)
            except (ValueError, TypeError, UnicodeError) as error:
                raise Refused(422, str(error)) from None
        else:
            vocabulary = self.encoder.backbone.config.get_text_config().vocab_size
            for number, row in enumerate(texts):
                if max(row) >= vocabulary:
                    raise Refused(422, f"text {number}: token {max(row)} is not below {vocabulary}")
            try:
                ids, prompts, truncated = transformer.take_tokens(texts)
            except ValueError as error:
                raise Refused(422, str(error)) from None
        if truncated and not cut:
            raise Refused(
                422,
                f"{truncated} of {len(texts)} texts are longer than {limit} tokens, and truncation is off",
            )
        return ids, prompts, truncated

    def checked_dimensions(self, dimensions: int | None) -> int | None:
        """Refuse a dimension that the model was not trained to be cut to."""
        if dimensions is None or dimensions == self.encoder.get_embedding_dimension():
            return None
        if not self.limits.dimensions:
            width = self.encoder.get_embedding_dimension()
            raise Refused(400, f"{self.name} is no Matryoshka model: it has {width} dimensions")
        if dimensions not in self.limits.dimensions:
            raise Refused(400, f"dimensions {dimensions} is none of {sorted(self.limits.dimensions)}")
        return dimensions


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
