"""The server under load: 64 clients for two minutes, beside one client, `encode`, and a plain FastAPI server.

`python -m uncausal.bench.trials.serve MODEL --data-dir DIR [--clients 64] [--seconds 120] [--dtype float32]`
prints texts a second, latencies and statuses as a table, or with `--json`. Each request holds one sentence of
Wikipedia; `encode` is timed before the servers and after them. One peer is what people write first:
sentence-transformers' encode behind a FastAPI route. The other, `--infinity COMMAND`, is infinity-emb's
`infinity_emb` in an environment of its own, as it needs older versions of what is used here.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
INFINITY = "v2 --host 127.0.0.1 --device cpu --engine torch --no-bettertransformer --log-level error".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--infinity", help="the command infinity_emb of another environment")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts = local_rows("local:wiki_sentences[:20000]", options.data_dir)
    encoder = Encoder.from_pretrained(options.model, dtype=options.dtype)
    expected = encoder.encode(texts[:2000])
    found: dict[str, Any] = {}
    encoded = [pace(encoder, texts[:2000])]
    quick = min(options.seconds, 30)
    many = f"{options.clients} clients"
    serve = ["serve", options.model, "--dtype", options.dtype, "--port"]
    with running([sys.executable, "-c", OURS, *serve, "PORT"]) as url:
        found["one client"], _ = asyncio.run(load(url, texts, 1, quick))
        found[many], vectors = asyncio.run(load(url, texts, options.clients, options.seconds))
    equal = [np.array_equal(vector, expected[i]) for i, vector in vectors.items() if i < len(expected)]
    found[many] |= {"vectors_equal_to_encode": f"{sum(equal)} of {len(equal)}"}
    encoded.append(pace(encoder, texts[:2000]))
    found = {"encode": {"texts_per_second": sum(encoded) / 2}, **found}
    with running([sys.executable, "-c", PEER, options.model, "PORT", options.dtype]) as url:
        found[f"FastAPI around encode, {many}"], _ = asyncio.run(
            load(url, texts, options.clients, quick, base64_answers=False)
        )
    if options.infinity:
        with tempfile.TemporaryDirectory() as folder:
            command = [options.infinity, *INFINITY, "--dtype", options.dtype, "--model-id", folder]
            as_older_versions_read(options.model, Path(folder))
            with running([*command, "--port", "PORT"]) as url:
                found[f"infinity-emb, {many}"], _ = asyncio.run(
                    load(url, texts, options.clients, quick, route="embeddings", model=Path(folder).name)
                )
    print(json.dumps(found) if options.json else table(found))


def pace(encoder: Encoder, texts: list[str]) -> float:
    """Texts a second of a bare encode."""
    start = time.perf_counter()
    encoder.encode(texts)
    return len(texts) / (time.perf_counter() - start)


def as_older_versions_read(model: str, folder: Path) -> None:
    """Copy an encoder in the format of sentence-transformers 3 and transformers 4.

    They don't read `is_causal` nor the rotary frequencies of version 5: the vectors are others, the work is
    the same.
    """
    shutil.copytree(model, folder, dirs_exist_ok=True)

    def edit(name: str, change: Callable[[Any], Any]) -> None:
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    def older(module: dict[str, Any]) -> dict[str, Any]:
        return {**module, "type": f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"}

    edit("modules.json", lambda modules: [older(module) for module in modules])
    edit("sentence_bert_config.json", lambda _: {"max_seq_length": 512})
    edit("tokenizer_config.json", lambda found: {**found, "tokenizer_class": "PreTrainedTokenizerFast"})
    for path in folder.glob("*_Pooling/config.json"):
        edit(str(path), lambda found: {"word_embedding_dimension": found["embedding_dimension"]})
    for path in folder.glob("*_LinearMap/config.json"):  # whose other fields they refuse
        edit(str(path), lambda found: {k: x for k, x in found.items() if not k.startswith("module_")})


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
    url: str,
    texts: list[str],
    clients: int,
    seconds: float,
    base64_answers: bool = True,
    route: str = "v1/embeddings",
    **fields: str,
) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """Let so many clients ask one text after another; return the figures, and a vector a text."""
    end, statuses, latencies = time.perf_counter() + seconds, Counter(), []
    vectors: dict[int, np.ndarray] = {}
    numbers = iter(range(10**9))

    async def client(http: aiohttp.ClientSession) -> None:
        while time.perf_counter() < end:
            number = next(numbers) % len(texts)
            body = {"input": texts[number], **fields}
            body |= {"encoding_format": "base64"} if base64_answers else {}
            start = time.perf_counter()
            async with http.post(f"{url}/{route}", json=body) as answer:
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
