"""The README's examples run as they stand, on a small part of the real model."""

import re
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import uncausal

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_examples_run_in_order(smollm2, tmp_path, monkeypatch):
    """Only the model's name is replaced, and the thousand steps of training by two."""
    monkeypatch.chdir(tmp_path)
    text = "Plants make energy from sunlight. The process takes place in the leaves. " * 40
    (tmp_path / "articles.txt").write_text((text + "\n") * 12)
    (tmp_path / "sentences.txt").write_text("".join(f"Sentence number {i} of a text.\n" for i in range(300)))
    names = {
        "pairs": [("A man plays guitar.", "Someone plays a guitar."), ("A dog runs.", "The dog is running.")]
    }
    assert len(EXAMPLES) >= 5
    for example in EXAMPLES:
        code = example.replace('"Qwen/Qwen2.5-Coder-0.5B"', repr(str(smollm2)))
        code = code.replace("MNTP(max_steps=1000)", "MNTP(max_steps=1, batch_size=1, chunk_tokens=32)")
        code = code.replace("SimCSE(max_steps=1000)", "SimCSE(max_steps=1, batch_size=4)")
        exec(compile(code, "README.md", "exec"), names)
    assert len(names["vectors"]) == 2 and np.isfinite(names["vectors"]).all()
    assert names["out"].shape == (7, 8, 64)
    assert SentenceTransformer("my-encoder").encode("text").shape == (576,)


def test_file_tree_is_complete():
    """Every file that the tree names exists, and every module of the package is named in it."""
    tree = README.split("## Files")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    real = {file.name for folder in ("kernels", "encoder") for file in (ROOT / folder).glob("*.py")}
    assert named == real


def test_speeds_are_rows_of_the_results():
    """The table is written by `python -m uncausal.bench.report`, from the records of RESULTS.md."""
    results = (ROOT / "bench" / "RESULTS.md").read_text()
    block = README.split("<!-- speed -->")[1].split("<!-- /speed -->")[0]
    rows = [line.split("|")[2:5] for line in block.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 5
    for provider, speed, memory in rows:
        name = provider.strip().removeprefix("uncausal, ")
        figures = [f"| {figure.strip()} |" for figure in (speed, memory) if figure.strip()]
        found = [line for line in results.splitlines() if f"| {name} |" in line]
        assert any(all(figure in line for figure in figures) for line in found), (provider, figures)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"from uncausal import (.*)", README))))
def test_imported_names_are_public(name):
    assert set(name.split(", ")) <= set(uncausal.__all__)
