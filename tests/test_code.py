"""Pairs from source: what is cut out, what is left out, where it comes from."""

import ast
import errno
import inspect
import json
import os
import subprocess
import sysconfig
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from uncausal.encoder.data.code import code_pairs, commit_pairs, decode, definitions, summary
from uncausal.encoder.data.pairs import read_pairs
from uncausal.encoder.data.rows import write_rows
from uncausal.encoder.data.sources import HELD_OUT, distribution_files, environment_files, source_files

STDLIB = Path(sysconfig.get_path("stdlib"))

MODULE = '''"""Adds things up."""
import math


@staticmethod
def add(a, b):  # two
    """Return the sum of two numbers.

    Args:
        a: one.
    """  # noqa

    total = a + b
    # carry the sign
    sign = math.copysign(1, total)
    return total * sign


class Sum:
    """Collects numbers one by one.

    More.
    """

    start = 0

    @property
    def value(self):
        """Say what the numbers come to."""
        start = self.start
        return start + sum(self.numbers)

    def stub(self): "Holds nothing but text."

    def short(self): "Compute a line of it."; x = 1; return x
'''


def package(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_definitions_cuts_docstrings_and_bodies():
    module, add, total, value, stub, short = definitions(MODULE)
    assert [d.name for d in (module, add, total, value)] == ["", "add", "Sum", "Sum.value"]
    assert (add.line, add.end_line, value.line, value.end_line) == (5, 16, 27, 31)
    assert add.header == "@staticmethod\ndef add(a, b):  # two"
    assert add.code == (
        "@staticmethod\ndef add(a, b):  # two\n    total = a + b\n    # carry the sign\n"
        "    sign = math.copysign(1, total)\n    return total * sign"
    )
    assert value.code.startswith("@property\ndef value(self):\n    start = self.start\n")
    assert total.code == (
        "class Sum:\n    start = 0\n\n    @property\n    def value(self):\n        ...\n\n"
        "    def stub(self): ...\n\n    def short(self): ..."
    )
    assert module.code.startswith(
        "import math\n\n\n@staticmethod\ndef add(a, b):  # two\n    ...\n\n\nclass Sum:"
    )
    assert "carry" not in module.code and "start" not in module.code
    assert short.code == "def short(self): x = 1; return x"
    assert not stub.has_body and short.has_body


@pytest.mark.parametrize("name", ["argparse", "typing", "dataclasses", "turtle", "ast", "socket"])
def test_definitions_code_is_the_function_without_its_docstring(name):
    """On whole modules: the text that is left parses to the tree that is left."""
    text = decode((STDLIB / f"{name}.py").read_bytes())
    functions = (
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    nodes = {(n.name, min([n.lineno, *(d.lineno for d in n.decorator_list)])): n for n in functions}
    compared = 0
    for found in definitions(text):
        if found.kind != "function" or not found.has_body:
            continue
        node = nodes[found.name.rpartition(".")[2], found.line]
        node.body = node.body[ast.get_docstring(node) is not None :]
        if not any(isinstance(n, ast.Constant) and "\n" in str(n.value) for n in ast.walk(node)):
            assert ast.dump(ast.parse(found.code).body[0]) == ast.dump(node), found.name
            compared += 1
    assert compared > 30


def test_definitions_outline_of_a_class_parses():
    for found in definitions(inspect.getsource(argparse_module())):
        if found.kind != "function" and found.has_body:
            assert len(found.code) < 60_000 and ast.parse(found.code)


def argparse_module():
    import argparse

    return argparse


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("One line\nand its end.\n\nMore.", "One line and its end."),
        ("Like :func:`~os.path.join` and ``this``.", "Like os.path.join and this."),
        ("Return :class:`the item <Item>` of it.", "Return the item of it."),
        ("Adds.\nArgs:\n  a: b", "Adds."),
        (">>> f()", ""),
        ("x (`int` of shape 3): the x", ""),
    ],
)
def test_summary(doc, expected):
    assert summary(doc) == expected


def test_code_pairs_rows_carry_place_and_licence(tmp_path):
    folder = package(tmp_path / "adder", sums=MODULE)
    (tmp_path / "adder" / "pyproject.toml").write_text('[project]\nname = "adder"\nlicense = "MIT"\n')
    skipped = Counter()
    [add, value] = code_pairs(source_files(folder), min_lines=2, skipped=skipped)
    assert add["anchor"] == "Return the sum of two numbers." and "sum of two" not in add["positive"]
    assert [add[key] for key in ("path", "line", "name", "licence")] == ["adder/sums.py", 5, "add", "MIT"]
    assert value["anchor"] == "Say what the numbers come to." and value["name"] == "Sum.value"
    assert skipped == {"short or long code": 1}


def test_code_pairs_kinds(tmp_path):
    files = list(source_files(package(tmp_path / "adder", sums=MODULE)))
    rows = {kind: list(code_pairs(files, [kind], min_lines=2)) for kind in ("class", "module", "comment")}
    assert [row["anchor"] for row in rows["class"]] == ["Collects numbers one by one."]
    assert [row["anchor"] for row in rows["module"]] == ["Adds things up."]
    assert rows["module"][0]["positive"].startswith("import math")
    [comment] = rows["comment"]
    assert comment["anchor"] == "carry the sign" and comment["line"] == 14
    assert comment["positive"] == "sign = math.copysign(1, total)\nreturn total * sign"
    [add, value] = code_pairs(files, ["signature"], min_lines=2, min_words=1)
    assert add["anchor"].startswith("@staticmethod\ndef add(a, b)")
    assert add["positive"].startswith("total = a + b\n") and add["positive"].endswith("\nreturn total * sign")
    with pytest.raises(ValueError, match="'functions'"):
        list(code_pairs(files, ["functions"]))  # pyright: ignore[reportArgumentType]


def test_code_pairs_leave_out_duplicates(tmp_path):
    body = "".join(f"    value_{i} = source[{i}] * weight_{i} + offset\n" for i in range(20))
    function = 'def {}(source):\n    """{}"""\n' + body + "    return value_{}\n"
    texts = [
        function.format("first", "Weigh the source with offsets.", 3),
        # The name and one token differ:
        function.format("second", "Scale what comes in, differently said.", 4),
        'def third(a):\n    """Weigh the source with offsets"""\n    b = 1\n    while a:\n        a -= b\n',
        'def fourth(a):\n    """Count down to zero."""\n    while a > 0:\n        a -= 2\n    return -a\n',
    ]
    files = source_files(package(tmp_path / "p", m="\n".join(texts)))
    skipped = Counter()
    assert [row["name"] for row in code_pairs(files, skipped=skipped)] == ["first", "fourth"]
    assert skipped == {"duplicate": 2}


def test_code_pairs_count_bad_files(tmp_path):
    good = 'def f(a):\n    """Café of the good file."""\n    b = a\n    return b\n'
    folder = package(tmp_path / "p", good=good)
    for name, raw in {
        "python2.py": b"print 'hello'\n",
        "latin.py": b"# -*- coding: latin-1 -*-\n"
        + good.replace("good", "latin").replace("b", "d").encode("latin-1"),
        "utf8.py": b"x = '\xff'\n",
        "null.py": b"x = 1\0\n",
        "unknown.py": b"# coding: nonsense\n",
        "deep.py": b"(" * 5000 + b")" * 5000,
        "chain.py": b"if x == 0:\n    y = 0\n" + b"elif x == 1:\n    y = 1\n" * 1500,
        "line.py": b"x = '" + b"a" * 1_000_000 + b"'\n",
        "big.py": b"x = 1\n" * 200_000,
        "made.py": b"# Autogenerated, DO NOT EDIT\n" + good.encode(),
        "dos.py": good.replace("good file", "other file").replace("b", "c").replace("\n", "\r\n").encode(),
        "empty.py": b"",
    }.items():
        (folder / name).write_bytes(raw)
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere.py").symlink_to(folder / "missing")
    package(folder / "tests", inside=good)
    (folder / "test_f.py").write_text(good)
    skipped = Counter()
    rows = list(code_pairs(source_files(folder, skipped), skipped=skipped))
    assert {row["path"] for row in rows} == {"p/good.py", "p/dos.py", "p/latin.py"}
    assert {row["anchor"][:4] for row in rows} == {"Café"}
    assert not any("\r" in row["positive"] for row in rows)
    assert skipped == {"not Python 3": 6, "too long": 2, "generated": 1, "test or vendored": 2}


def test_source_files_of_a_wheel_name_its_licence(tmp_path):
    wheel = tmp_path / "adder-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("adder/sums.py", MODULE)
        archive.writestr("adder/tests/test_sums.py", MODULE)
        archive.writestr(
            "adder-1.dist-info/METADATA",
            "Name: adder\nLicense: long\n        text\nClassifier: License :: OSI Approved :: MIT License\n",
        )
    rows = list(code_pairs(source_files(wheel)))
    assert {(row["path"], row["licence"]) for row in rows} == {("adder/sums.py", "MIT License")}


def test_a_folder_that_may_not_be_listed_is_counted(tmp_path, monkeypatch):
    """Regression: it was taken for empty; and one that may not even be entered ended the command."""
    folder = package(tmp_path / "p", good=MODULE)
    for name in ("closed", "hidden"):
        package(folder / name, inside=MODULE)
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "closed" or Path(path) == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    refused = None
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "hidden")
    skipped = Counter()
    assert {file.path for file in source_files(folder, skipped)} == {"p/good.py"}
    assert skipped["unreadable"] == 2
    refused = folder
    with pytest.raises(PermissionError, match=str(folder)):
        list(source_files(folder))


def test_source_files_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list(source_files(tmp_path / "none"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="a.txt: give a folder"):
        list(source_files(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="pip install nosuchthing"):
        list(distribution_files("nosuchthing"))


def test_environment_files_leave_out_the_held_out():
    files = list(environment_files())
    tops = {file.path.split("/")[0] for file in files}
    assert {"torch", "numpy", STDLIB.name} <= tops
    assert not tops & {*HELD_OUT, "mpl_toolkits", "pylab.py"}
    assert not [file.path for file in files if "/tests/" in file.path or "_vendor/" in file.path]
    [numpy] = {file.licence for file in files if file.path.startswith("numpy/")}
    assert "BSD" in numpy
    assert len({file.path for file in files}) == len(files)


def test_commit_pairs(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x", *arguments],
            check=True,
            capture_output=True,
        )

    with pytest.raises(ValueError, match="not a git repository"):
        list(commit_pairs(tmp_path))
    git("init", "-q")
    for number, subject in enumerate(["Start with one number", "Typo", "Add the other number"]):
        (tmp_path / "a.py").write_text(f"x = {number}\n")
        git("add", ".")
        git("commit", "-qm", subject + "\n\nBody.")
    last, first = commit_pairs(tmp_path)
    assert (last["anchor"], first["anchor"]) == ("Add the other number", "Start with one number")
    assert last["positive"].endswith("@@ -1 +1 @@\n-x = 1\n+x = 2")


def test_rows_are_training_pairs(tmp_path):
    rows = list(code_pairs(source_files(package(tmp_path / "adder", sums=MODULE)), min_lines=2))
    assert write_rows(rows, tmp_path / "pairs.jsonl") == 2
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    assert pairs["anchor"] == [row["anchor"] for row in rows]
    assert json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0]) == rows[0]
    with pytest.raises(ValueError, match="there is no row"):
        write_rows([], tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
