"""The server under load: 64 clients for two minutes, beside one client, `encode`, and a plain FastAPI server.

`python -m uncausal.bench.trials.serve MODEL --data-dir DIR [--clients 64] [--seconds 120] [--dtype float32]`
prints texts a second, latencies and statuses as a table, or with `--json`. Each request holds one sentence of
Wikipedia. The peer is what people write first: sentence-transformers' encode behind a FastAPI route.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import numpy as np

from uncausal.encoder.data.local import local_rows
from uncausal.encoder.model import Encoder

OURS = "import sys; from uncausal.encoder.cli.main import main; sys.exit(main())"
PEER = """
import sys, threading, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu", model_kwargs={"dtype": sys.argv[3]})
lock, app = threading.Lock(), FastAPI()
class Request(BaseModel):
    input: str
@app.get("/health")
def health():
    return "ok"
@app.post("/v1/embeddings")
def embeddings(request: Request):
    with lock:
        return {"data": [{"embedding": model.encode(request.input).tolist()}]}
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts = local_rows("local:wiki_sentences[:20000]", options.data_dir)
    encoder = Encoder.from_pretrained(options.model, dtype=options.dtype)
    expected = encoder.encode(texts[:2000])
    start = time.perf_counter()
    encoder.encode(texts[:2000])
    found: dict[str, Any] = {"encode": {"texts_per_second": 2000 / (time.perf_counter() - start)}}
    quick = min(options.seconds, 30)
    serve = ["serve", options.model, "--dtype", options.dtype, "--port"]
    with running([sys.executable, "-c", OURS, *serve, "PORT"]) as url:
        found["one client"], _ = asyncio.run(load(url, texts, 1, quick))
        found[f"{options.clients} clients"], vectors = asyncio.run(
            load(url, texts, options.clients, options.seconds)
        )
    equal = [np.array_equal(vector, expected[i]) for i, vector in vectors.items() if i < len(expected)]
    found[f"{options.clients} clients"] |= {"vectors_equal_to_encode": f"{sum(equal)} of {len(equal)}"}
    with running([sys.executable, "-c", PEER, options.model, "PORT", options.dtype]) as url:
        found[f"FastAPI around encode, {options.clients} clients"], _ = asyncio.run(
            load(url, texts, options.clients, quick, base64_answers=False)
        )
    print(json.dumps(found) if options.json else table(found))


@contextmanager
def running(command: list[str]) -> Iterator[str]:
    """A server in a process of its own, once it is healthy; PORT in its command is a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    process = subprocess.Popen([port if word == "PORT" else word for word in command])
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health"):  # noqa: S310
                    break
            except OSError:  # not yet there, or 503
                pass
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {command[:4]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


async def load(
    url: str, texts: list[str], clients: int, seconds: float, base64_answers: bool = True
) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """Let so many clients ask one text after another; return the figures, and a vector a text."""
    end, statuses, latencies = time.perf_counter() + seconds, Counter(), []
    vectors: dict[int, np.ndarray] = {}
    numbers = iter(range(10**9))

    async def client(http: aiohttp.ClientSession) -> None:
        while time.perf_counter() < end:
            number = next(numbers) % len(texts)
            body = {"input": texts[number]} | ({"encoding_format": "base64"} if base64_answers else {})
            start = time.perf_counter()
            async with http.post(f"{url}/v1/embeddings", json=body) as answer:
                content = await answer.read()
            latencies.append(time.perf_counter() - start)
            statuses[answer.status] += 1
            if answer.status == 200 and base64_answers:
                raw = base64.b64decode(json.loads(content)["data"][0]["embedding"])
                vectors[number] = np.frombuffer(raw, np.float32)

    # which costs a machine that the server shares less than httpx does
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients)) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    half, most = np.percentile(latencies, [50, 99])
    figures = {"texts_per_second": statuses[200] / seconds, "p50_ms": 1e3 * half, "p99_ms": 1e3 * most}
    return {**figures, "statuses": dict(statuses)}, vectors


def table(found: dict[str, Any]) -> str:
    lines = ["| | texts/s | p50 ms | p99 ms | statuses | |", "|---|---|---|---|---|---|"]
    for name, row in found.items():
        cells = [f"{row[key]:.1f}" if key in row else "" for key in ("texts_per_second", "p50_ms", "p99_ms")]
        more = [str(row.get("statuses", "")), row.get("vectors_equal_to_encode", "")]
        lines.append(f"| {' | '.join([name, *cells, *more])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
