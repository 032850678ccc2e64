"""Runs every benchmark and writes bench/RESULTS.md: `make bench` on a CPU, `make bench-gpu` on a GPU.

`python -m uncausal.bench.run [--gpu] [--dry] [--full] [--only attention ...]`. Each suite leaves its records,
as pytest-benchmark writes them, in bench/results/. `--dry` runs tiny shapes, on a CPU where there is no GPU,
and writes to a folder that it removes: it proves that everything runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from uncausal.bench.report import BENCH, RESULTS, render

TESTS = BENCH.parent / "tests"
SUITES = ("attention", "latent_pooling", "info_nce", "encode", "train_step")
KERNEL_TESTS = [str(TESTS / f"test_{name}.py") for name in (*SUITES[:3], "gpu")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m uncausal.bench.run", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on a CUDA device, correctness first")
    parser.add_argument("--dry", action="store_true", help="tiny shapes; keeps nothing")
    parser.add_argument("--full", action="store_true", help="the long cases as well")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES))
    options = parser.parse_args()
    device = "cuda" if options.gpu and not (options.dry and not torch.cuda.is_available()) else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device; add --dry to see on a CPU that it would run")
    if options.gpu:
        # on a CPU nothing of these can run, but they must be found
        marks = ["-m", "sanitize or gpu"] if device == "cuda" else ["--collect-only", "-k", "sanitised"]
        if failed := _run("-q", *marks, *KERNEL_TESTS):
            return failed  # a wrong answer has no speed
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.dry else BENCH / "results"
        folder.mkdir(exist_ok=True)
        flags = [f"--device={device}"] + [f"--{name}" for name in ("dry", "full") if getattr(options, name)]
        files = [str(BENCH / f"bench_{name}.py") for name in options.only]
        kind = "gpu" if options.gpu else "cpu"
        records = folder / f"{'-'.join(options.only)}-{kind}.json"
        failed = _run(*files, "-q", "-rs", *flags, f"--benchmark-json={records}")
        render(folder, Path(scratch) / RESULTS.name if options.dry else RESULTS)  # what did run is not lost
    return failed


def _run(*arguments: str) -> int:
    options = ["-p", "no:cacheprovider", "-o", "python_functions=test_* bench_*"]
    return subprocess.run([sys.executable, "-m", "pytest"] + options + list(arguments)).returncode


if __name__ == "__main__":
    sys.exit(main())
