"""A corpus of 200,000 passages as jobs meet it: killed, shared, on Ray; the same bytes, in flat memory.

`python -m uncausal.bench.trials.corpus MODEL --data-dir DIR [--rows 200000] [--part 20000]` runs the command,
and prints what it found as a table, or with `--json`. The whole corpus is encoded twice: undisturbed, and
killed three times. The first `--part` rows are then encoded by two processes and by Ray, and timed
against a bare `encode`. `--kills 0 --part 0` is the undisturbed run alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from uncausal.encoder.data.local import local_rows
from uncausal.encoder.model import Encoder
from uncausal.encoder.serving.corpus import CorpusSettings, encode_corpus

COMMAND = [sys.executable, "-c", "import sys; from uncausal.encoder.cli.main import main; sys.exit(main())"]
SHARD = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--part", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    print(json.dumps(found) if options.json else "\n".join(f"{k}: {v}" for k, v in found.items()))


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run everything and return the figures; raises where bytes differ."""
    texts = passages(options.data_dir, options.rows)
    for name, rows in (("whole", texts), ("part", texts[: options.part])):
        lines = (json.dumps({"text": text}) + "\n" for text in rows)
        (scratch / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    run = Runs(options.model, scratch)

    start = time.perf_counter()
    memory = run.watched(run.start("whole", "whole"))
    seconds = time.perf_counter() - start
    expected = run.bytes_of("whole")
    tokens = sum(json.loads(note.read_text())["tokens"] for note in (scratch / "whole").glob("part-*.json"))
    tenth = len(memory) // 10
    found = {
        "rows": len(texts),
        "tokens": tokens,
        "tokens a second, command and start included": round(tokens / seconds),
        "MiB after a tenth, half, all": [round(memory[i] / 2**20) for i in (tenth, len(memory) // 2, -1)],
    }
    if not options.kills and not options.part:
        return found

    draw = random.Random(options.seed)
    for moment in sorted(draw.uniform(0.1, 0.9) for _ in range(options.kills)):
        process = run.start("whole", "killed")
        while len(list((scratch / "killed").glob("part-*.parquet"))) < moment * len(expected):
            time.sleep(draw.uniform(0.01, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    run.finish(run.start("whole", "killed"))
    assert run.bytes_of("killed") == expected, "a killed run wrote other bytes"

    part = {name: expected[name] for name in sorted(expected)[: -(-options.part // SHARD)]}
    run.finish(*(run.start("part", "shared", "--shard", f"{i}/2") for i in range(2)))
    assert run.bytes_of("shared") == part, "two processes wrote other bytes"
    for workers in (1, 2):
        run.finish(run.start("part", f"ray-{workers}", "--engine", "ray", "--workers", str(workers)))
        assert run.bytes_of(f"ray-{workers}") == part, f"{workers} workers of Ray wrote other bytes"

    share = share_of_encode(options.model, texts[: options.part], scratch)
    return {**found, "kills": options.kills, "share of a bare encode": round(share, 3)}


def passages(data_dir: str, count: int) -> list[str]:
    """So many sentences of Wikipedia; past their number they come again with a number of their own."""
    known = local_rows("local:wiki_sentences", data_dir)
    return [known[i % len(known)] + (f" ({i})" if i >= len(known) else "") for i in range(count)]


class Runs:
    """The command `uncausal encode`, into folders of `scratch`."""

    def __init__(self, model: str, scratch: Path):
        self.model, self.scratch = model, scratch

    def start(self, rows: str, output: str, *options: str) -> subprocess.Popen:
        paths = [str(self.scratch / f"{rows}.jsonl"), f"{self.scratch / output}/"]
        words = ["encode", self.model, *paths, "--rows-per-shard", str(SHARD), *options]
        return subprocess.Popen([*COMMAND, *words], stderr=subprocess.DEVNULL)

    def finish(self, *processes: subprocess.Popen) -> None:
        for process in processes:
            assert process.wait() == 0, process.args

    def watched(self, process: subprocess.Popen) -> list[int]:
        """Wait for a process; return its resident bytes, once a second."""
        seen, child = [], psutil.Process(process.pid)
        while process.poll() is None:
            seen.append(child.memory_info().rss)
            time.sleep(1)
        self.finish(process)
        return seen[:-1]  # the last may be of a process that ends

    def bytes_of(self, output: str) -> dict[str, str]:
        """The digest of every shard."""
        files = (self.scratch / output).glob("part-*.parquet")
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def share_of_encode(model: str, texts: list[str], scratch: Path, rounds: int = 3) -> float:
    """The speed of `encode_corpus` as a share of `encode`'s on the same texts, best of interleaved rounds."""
    encoder, rows = Encoder.from_pretrained(model), [(str(i), text) for i, text in enumerate(texts)]
    bare, corpus = [], []
    for number in range(rounds):
        start = time.perf_counter()
        encoder.encode(texts)
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        encode_corpus(encoder, rows, scratch / f"timed-{number}", CorpusSettings(rows_per_shard=SHARD))
        corpus.append(time.perf_counter() - start)
    return min(bare) / min(corpus)


if __name__ == "__main__":
    main()
