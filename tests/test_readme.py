"""The README's examples run as they stand, on a small part of the real model."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import uncausal
from uncausal.encoder.cli.main import main, parse
from uncausal.encoder.data.local import SETS, TEXTS
from uncausal.encoder.training.recipes import load_recipe

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
        "pairs": [("A man plays guitar.", "Someone plays a guitar."), ("A dog runs.", "The dog is running.")],
        "texts": [f"Number {i}." for i in range(600)],
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


def test_shell_lines_run_in_order(byte_llama, tmp_path, monkeypatch, capsys):
    """Regression: the line of `uncausal run` failed. A tiny model stands in for names of the hub."""
    monkeypatch.chdir(tmp_path)
    text = "Plants make energy from sunlight. The process takes place in the leaves.\n"
    (tmp_path / "articles.txt").write_text(text * 12)
    (tmp_path / "sentences.txt").write_text("".join(f"Sentence number {i}.\n" for i in range(8)))
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": f"This is text {i}. It is one of eight texts."}) + "\n" for i in range(8))
    )
    pairs = [{"anchor": f"text {i}", "positive": f"the text {i}"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "project").mkdir()
    code = 'def count(text):\n    """Count the words of a text."""\n    words = text.split()\n'
    code += "    return len(words)\n"
    (tmp_path / "project" / "words.py").write_text(code)
    (tmp_path / "stsbenchmark").mkdir()
    rows = [f"g\tf\ty\t{i}\t{i}\ttext {i}\ttext 4\n" for i in range(5)]
    (tmp_path / "stsbenchmark" / "sts-dev.csv").write_text("".join(rows))

    def small(name, variant):
        recipe = load_recipe(name, variant)
        for step in recipe.steps:
            short = {"chunk_tokens": 16} if step.kind == "mntp" else {}
            vars(step.settings).update(max_steps=1, batch_size=2, **short)
        recipe.model, recipe.steps[0].data = str(byte_llama), "articles.txt"
        return recipe

    monkeypatch.setattr("uncausal.encoder.cli.training.load_recipe", small)
    lines = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert len(lines) >= 7
    for line in lines:
        line = line.replace("Qwen/Qwen2.5-Coder-0.5B", str(byte_llama))
        line = line.replace("--max-steps 1000", "--max-steps 1 --batch-size 1 --chunk-tokens 16")
        if line.startswith("cat "):
            file, line = line.removeprefix("cat ").split(" | ")
            monkeypatch.setattr("sys.stdin", (tmp_path / file).open())
        assert main(shlex.split(line, comments=True)[1:]) == 0, (line, capsys.readouterr().err)
    assert np.load("vectors.npy").shape == (8, 32)
    assert (tmp_path / "mistral-encoder" / "modules.json").exists()
    for name in ("code", "prose", "mined"):
        assert (tmp_path / f"{name}.jsonl").stat().st_size


def test_other_shell_lines_are_understood():
    """Lines that need data or a server, which are not run here."""
    block = re.findall(r"```\n(uncausal .*?)```", README, re.DOTALL)
    lines = [line for part in block for line in part.splitlines()]
    assert len(lines) >= 4
    for line in lines:
        assert parse(shlex.split(line, comments=True)[1:]) is not None


def test_file_tree_is_complete():
    """Every file that the tree names exists, and every module of the package is named in it."""
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("## Files")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    files = [file for folder in ("kernels", "encoder") for file in (ROOT / folder).rglob("*.py")]
    assert named <= {file.name for file in files}
    rooms = {ROOT / "encoder" / name for name in ("training", "cli")}  # the tree names the chief files
    here = {file.name for file in files if not any(room in file.parents for room in rooms)}
    assert here <= named, here - named


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


def test_data_page_names_every_folder_and_set():
    page = (ROOT / "bench" / "DATA.md").read_text()
    sources = [
        ROOT / "encoder" / name for name in ("data/local.py", "evaluation/suite.py", "evaluation/words.py")
    ]
    folders = {
        f
        for s in sources
        for f in re.findall(r"(?:root|data_dir|Path\(data_dir\)) / \"(\w+)\"", s.read_text())
    }
    assert len(folders) >= 15
    assert {name for name in (*folders, *SETS, *TEXTS) if f"`{name}`" not in page} == set()
