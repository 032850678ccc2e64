"""Runs the benchmark suites one after another and writes what they print into bench/RESULTS.md.

`python -m uncausal.bench.run` takes the CPU suites, `--gpu` those of a CUDA device after the kernels' tests
on it, `--only NAME ...` a few of them. Every suite is a module of its own, with more options.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
KERNEL_TESTS = ["tests/test_attention.py", "tests/test_latent_pooling.py", "tests/test_info_nce.py"]
SUITES = {
    "attention": ["bench_attention"],
    "latent pooling": ["bench_latent_pooling"],
    "InfoNCE": ["bench_info_nce"],
}
GPU = ["--device", "cuda", "--dtype", "bfloat16"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m uncausal.bench.run", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on a CUDA device, correctness first")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES))
    options = parser.parse_args()
    if options.gpu:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "sanitize or gpu", *KERNEL_TESTS], check=True
        )
    for name in options.only:
        module, *arguments = SUITES[name]
        command = [f"uncausal.bench.{module}", *arguments, *(GPU if options.gpu else [])]
        print(f"== python -m {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout)
        title = f"{name}, {'GPU' if options.gpu else 'CPU'}"
        write_section(
            title, f"`python -m {' '.join(command)}`, {environment(options.gpu)}\n\n```\n{done.stdout}```"
        )


def environment(gpu: bool) -> str:
    """Return device and versions in one line."""
    import torch

    device = (
        torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "triton", "transformers"))
    return f"{device}, {versions}"


def write_section(title: str, body: str, path: Path = RESULTS) -> None:
    """Replace the section of that title, or add it at the end."""
    text = path.read_text() if path.exists() else "# Results\n"
    section = f"<!-- {title} -->\n## {title[0].upper()}{title[1:]}\n\n{body}\n<!-- /{title} -->"
    pattern = re.compile(rf"<!-- {re.escape(title)} -->.*?<!-- /{re.escape(title)} -->", re.DOTALL)
    if pattern.search(text):
        text = pattern.sub(lambda _: section, text)
    else:
        text = text.rstrip() + "\n\n" + section + "\n"
    path.write_text(text)


if __name__ == "__main__":
    main()
