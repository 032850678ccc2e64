"""The commands that make training data: pairs and mine."""

import dataclasses
import inspect
import json
import subprocess
import zipfile

import pytest
from commands import run
from datasets import Dataset

from uncausal.encoder.cli.pairs import mine
from uncausal.encoder.data.pairs import read_pairs
from uncausal.encoder.data.sources import HELD_OUT
from uncausal.encoder.training.mining import Mining

MODULE = '''"""Adds things up."""


def add(a, b):
    """Return the sum of two numbers."""
    # carry the sign over
    total = a + b
    return total


def short(a):
    """Return what was given."""
    return a
'''
PARAGRAPH = "The heart pumps blood. It has four chambers. Each chamber fills and empties in turn."


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_of_code(tmp_path, capsys):
    package, output = tmp_path / "package", tmp_path / "pairs.jsonl"
    package.mkdir()
    (package / "sums.py").write_text(MODULE)
    other = tmp_path / "other.py"
    other.write_text('def away(a):\n    """Take one number away."""\n    b = a - 1\n    return b\n')
    facts = json.loads(run(capsys, "pairs", "code", package, other, output, "--json"))
    assert facts == {"saved": str(output), "pairs": 2, "left_out": {"short or long code": 1}}
    rows = rows_of(output)
    assert [(row["anchor"], row["path"], row["line"]) for row in rows] == [
        ("Return the sum of two numbers.", "package/sums.py", 4),
        ("Take one number away.", "other.py", 1),
    ]
    assert rows[0]["positive"].startswith("def add(a, b):\n    # carry") and len(read_pairs(output)) == 2
    run(capsys, "pairs", "code", package, output, "--kinds", "function", "comment", "--min-lines", 2)
    assert [row["anchor"] for row in rows_of(output)] == [
        "Return the sum of two numbers.",
        "Return what was given.",
        "carry the sign over",
    ]


def test_pairs_of_commits(tmp_path, capsys):
    git = [
        "git",
        "-C",
        str(tmp_path),
        "-c",
        "user.name=n",
        "-c",
        "user.email=e@x",
        "-c",
        "commit.gpgsign=false",
    ]
    (tmp_path / "sums.py").write_text(MODULE)
    for command in (["init", "-q"], ["add", "sums.py"], ["commit", "-qm", "Add a module of sums"]):
        subprocess.run([*git, *command], check=True)
    run(capsys, "pairs", "code", tmp_path, tmp_path / "c.jsonl", "--kinds", "commit")
    [row] = rows_of(tmp_path / "c.jsonl")
    assert row["anchor"] == "Add a module of sums" and "+def add(a, b):" in row["positive"]


def test_pairs_of_the_environment_leave_out_what_is_evaluated(tmp_path, capsys, monkeypatch):
    from uncausal.encoder.data import sources

    asked = []

    def environment_files(exclude, skipped):
        asked.append(set(exclude))
        (tmp_path / "sums.py").write_text(MODULE)
        return sources.source_files(tmp_path / "sums.py", skipped)

    monkeypatch.setattr(sources, "environment_files", environment_files)
    run(capsys, "pairs", "code", tmp_path / "c.jsonl", "--environment", "--exclude", "numpy", "torch")
    assert asked == [{*HELD_OUT, "numpy", "torch"}]
    assert len(rows_of(tmp_path / "c.jsonl")) == 1


def test_pairs_of_prose(tmp_path, capsys):
    source, output = tmp_path / "articles.jsonl", tmp_path / "pairs.jsonl"
    source.write_text(json.dumps({"name": "Hearts", "body": PARAGRAPH}) + "\n")
    fields = ["--column", "body", "--title-column", "name", "--min-words", 10]
    run(capsys, "pairs", "prose", source, output, *fields)
    title, cloze = rows_of(output)
    assert (title["anchor"], title["positive"]) == ("Hearts", PARAGRAPH)
    assert cloze["anchor"] in PARAGRAPH and cloze["anchor"] not in cloze["positive"]
    run(capsys, "pairs", "prose", source, output, *fields, "--kinds", "title")
    assert rows_of(output) == [title]


def test_mine_repeats_the_defaults_of_mining():
    """The command's options are read without importing torch, so they repeat Mining's fields."""
    options = inspect.signature(mine).parameters
    fields = {field.name: field.default for field in dataclasses.fields(Mining)}
    assert {name: options[name].default for name in fields} == fields


@pytest.mark.parametrize("teacher", ["bm25", "encoder"])
def test_mine(cli_folder, tmp_path, capsys, monkeypatch, teacher):
    """The rows are those of Mining, by each set of tasks; negatives that the data have are replaced."""
    monkeypatch.chdir(cli_folder)
    words = ["red apple", "green pear", "blue plum", "ripe fig"]
    rows = [{"anchor": f"a {w}", "positive": f"the {w} here", "negative": "none", "task": "t"} for w in words]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [f"no {w} there" for w in words]
    (tmp_path / "corpus.txt").write_text("\n".join(corpus) + "\n")
    paths = tmp_path / "pairs.jsonl", tmp_path / "mined.jsonl"
    options = ["--corpus", tmp_path / "corpus.txt", "--num-negatives", 2, "--sampling", "top"]
    options += ["--relative-margin", "None", "--dtype", "float32"]
    facts = json.loads(run(capsys, "mine", teacher, *paths, *options, "--json"))
    assert facts == {"saved": str(paths[1]), "pairs": 4, "left_out": {}}
    from uncausal.encoder.loading import load_model

    model = "bm25" if teacher == "bm25" else load_model("encoder", dtype="float32")
    pairs = Dataset.from_list([{"anchor": row["anchor"], "positive": row["positive"]} for row in rows])
    expected = Mining(num_negatives=2, sampling="top", relative_margin=None).mine(pairs, model, corpus)
    assert rows_of(paths[1]) == [{"task": "t", **row} for row in expected.to_list()]
    assert read_pairs(paths[1])["t"].column_names == ["anchor", "positive", "negative_1", "negative_2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pairs", "code", "out.jsonl"], "give PATH ... OUT.jsonl, or --environment"),
        (["pairs", "code"], "give PATH ... OUT.jsonl, or --environment"),
        (["pairs", "code", "nowhere", "out.jsonl"], "no such file or folder: nowhere"),
        (["pairs", "code", ".", "out.txt"], "out.txt: rows are written as .jsonl"),
        (["pairs", "code", ".", "out.jsonl", "--min-words", "99"], "not written, for there is no row"),
        (["pairs", "code", ".", "out.jsonl", "--exclude", "numpy"], "--exclude is for --environment"),
        (["pairs", "code", "--environment", "--kinds", "commit", "--", "out.jsonl"], "name them as PATH"),
        (["pairs", "prose", "pairs.jsonl", "out.jsonl"], "pairs.jsonl:1: no field 'text'"),
        (["mine", "bm25", "scored.jsonl", "out.jsonl"], "choose min_score"),
        (["mine", "bm25", "pairs.jsonl", "out.txt"], "out.txt: rows are written as .jsonl"),
        (["mine", "./nowhere", "pairs.jsonl", "out.jsonl"], "no model at './nowhere'"),
        (["mine", "bm25", "pairs.jsonl", "out.jsonl", "--top-k", "2"], "cannot take 4 negatives"),
        (["mine", "bm25", "pairs.jsonl", "out.jsonl", "--query-prompt", "q: "], "bm25 knows no prompts"),
        (["pairs", "code", "bad.zip", "out.jsonl"], "bad.zip: sums.py: cannot be read (BadZipFile: "),
    ],
)
def test_what_makes_no_pairs_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.py").write_text(MODULE)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("sums.py", MODULE)
    packed = bytearray((tmp_path / "bad.zip").read_bytes())
    packed[packed.index(MODULE[:20].encode())] ^= 1  # of what it holds, whose checksum is then another
    (tmp_path / "bad.zip").write_bytes(packed)
    (tmp_path / "pairs.jsonl").write_text('{"anchor": "a", "positive": "b"}\n')
    (tmp_path / "scored.jsonl").write_text('{"anchor": "a", "positive": "b", "score": 1}\n')
    assert message in run(capsys, *arguments, status=1)
    assert not (tmp_path / "out.jsonl").exists()
