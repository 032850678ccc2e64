"""Commands that keep an encoder at hand: serve, over HTTP; index, for the search of a folder."""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from uncausal.encoder.cli.options import Json, Loading, check_writable, report, require


def serve(
    model: Positional[str],
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    name: str | None = None,
    api_key_file: Path | None = None,
    batch_tokens: int | None = None,
    max_waiting: int = 8192,
    max_texts: int = 2048,
    max_bytes: int = 2_000_000,
    max_waiting_bytes: int = 32_000_000,
    body_seconds: float = 30.0,
    stop_seconds: int = 30,
    auto_truncate: bool = False,
    dimensions: tuple[int, ...] = (),
    int8: bool = False,
    loading: Loading = Loading(),
) -> None:
    """Serve vectors over HTTP, as OpenAI's /v1/embeddings and text-embeddings-inference's /embed.

    Args:
        model: encoder folder, or anything `convert` takes.
        host: address to listen on; 0.0.0.0 is every one of the machine's.
        port: port to listen on; 0 takes a free one.
        name: of the model in answers; by default as it was given.
        api_key_file: file that holds the key which requests must carry; or set UNCAUSAL_API_KEY.
        batch_tokens: tokens a batch; by default as many as suit the device.
        max_waiting: texts in the queue; more are answered 429.
        max_texts: texts in one request; more are answered 413.
        max_bytes: bytes of a request's body; more are answered 413.
        max_waiting_bytes: bytes of all requests and answers on their way; more are answered 429.
        body_seconds: seconds for a body to arrive, or a client is answered 408; so many without taking a byte
            of its answer, and a client is cut off.
        stop_seconds: seconds that a stop leaves to requests which were accepted before it.
        auto_truncate: cut texts that are too long, instead of answering 422.
        dimensions: Matryoshka dimensions that may be asked for.
        int8: int8 weights, on a CPU: faster, less exact, and no two batches quite the same.
    """
    require("fastapi", "serve", "the server needs packages")
    require("uvicorn", "serve", "the server needs packages")
    import logging

    import uvicorn

    from uncausal.encoder.serving import guard, server, service

    if stop_seconds < 0:
        raise ValueError(f"stop seconds is {stop_seconds}; it must not be below 0")
    limits = service.Limits(
        batch_tokens=batch_tokens,
        max_waiting=max_waiting,
        max_texts=max_texts,
        max_bytes=max_bytes,
        max_waiting_bytes=max_waiting_bytes,
        body_seconds=body_seconds,
        auto_truncate=auto_truncate,
        api_key=read_api_key(api_key_file),
        dimensions=dimensions,
    )
    if limits.api_key is None and not is_loopback(host):
        print(
            f"warning: --host {host} may be reached from other machines, and no key is asked for: "
            "--api-key-file, or UNCAUSAL_API_KEY",
            file=sys.stderr,
        )
    failures: list[Exception] = []

    def load() -> Any:
        try:
            encoder = loading.load(model)
            limits.check(encoder, name or model)
            if int8:
                encoder.quantize()
        except Exception as error:
            failures.append(error)
            running.should_exit = True
            raise
        gc.collect()
        gc.freeze()  # what is loaded stays: walking over it took half of the event loop's time
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {model} at http://{shown}:{listening.getsockname()[1]}", file=sys.stderr, flush=True)
        return encoder

    # A failure to load ends the command, which words it in one line.
    logging.getLogger(service.__name__).addFilter(lambda record: record.exc_info is None)
    with listen(host, port) as listening:
        app = server.make_app(load, name or model, limits)
        running = uvicorn.Server(
            uvicorn.Config(
                app,
                http=guard.protocol(body_seconds),
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=stop_seconds,
            )
        )
        try:
            running.run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn has answered what it had accepted, and raises Ctrl-C again
            print("stopped", file=sys.stderr)
        finally:
            gc.unfreeze()
    if failures:
        raise failures[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_api_key(file: Path | None) -> str | None:
    """The key in a file, or that of the environment; a key on the command line would show in `ps`."""
    if file is None:
        return os.environ.get("UNCAUSAL_API_KEY") or None
    key = file.read_text(encoding="utf8").strip()
    if not key:
        raise ValueError(f"{file}: holds no API key")
    return key


def listen(host: str, port: int) -> socket.socket:
    """Open the server's socket, or say which option is wrong; uvicorn would end the process."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot listen on --host {host} --port {port}: {reason}") from None


def index(
    folder: Positional[Path],
    /,
    *,
    out: Annotated[Path, arg(metavar="INDEX")],
    model: str | None = None,
    dimension: int | None = None,
    int8: bool = False,
    batch_tokens: int | None = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Index a folder's Python, Markdown and text files for search, or bring its index up to date.

    Args:
        folder: folder to read.
        out: file of the index; one that is there is updated, and only changed files are encoded.
        model: encoder folder, or anything `convert` takes; by default the one that the index was made with,
            loaded as it was then.
        dimension: keep the first so many numbers of a vector (Matryoshka).
        int8: keep a byte a number instead of four.
        batch_tokens: tokens a batch; by default as many as suit the device.
    """
    check_writable(out)
    from tqdm import tqdm

    from uncausal.encoder.loading import absolute
    from uncausal.encoder.serving.index import MadeWith, made_with, update_index

    new = not out.exists() or out.stat().st_size == 0
    made = MadeWith() if new else made_with(out)
    if not (model or made.model):
        raise ValueError("a new index needs --model MODEL")
    encoder = loading.load_as(made, out, model)
    with tqdm(desc="Indexing", unit="file", disable=not sys.stderr.isatty()) as bar:
        done = update_index(
            out,
            folder,
            encoder,
            model=absolute(model or made.model),
            dimension=dimension,
            int8=int8 or None,
            progress=partial(advance, bar),
            batch_tokens=batch_tokens,
        )
    figures = {"index": str(out), **asdict(done), "skipped": dict(done.skipped)}
    if not as_json:
        figures["skipped"] = (
            ", ".join(f"{count} {reason}" for reason, count in done.skipped.items()) or "none"
        )
    report(figures, as_json)


def advance(bar: Any, done: int, total: int) -> None:
    """Move a bar to where the work is."""
    bar.total = total
    bar.update(done - bar.n)
