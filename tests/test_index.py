"""The index of a folder: what it finds, and that it always holds what one made from scratch holds."""

import errno
import itertools
import json
import os
import shutil
import sqlite3
import string
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from uncausal.encoder.data.passages import MAX_CODE, MAX_PROSE, passages
from uncausal.encoder.model import Encoder
from uncausal.encoder.serving import index as indexing
from uncausal.encoder.serving.index import Index, MadeWith, is_index, made_with, update_index

SUM = 'def add(a, b):\n    """Add two numbers."""\n    return a + b\n'
READ = (
    'class File:\n    """A file on disk."""\n\n    def read(self):\n        return open(self.path).read()\n'
)


def save_checkpoint(path: Path, seed: int) -> Path:
    """A model of random weights that reads characters, so that no two texts look alike to it."""
    vocabulary = {c: i for i, c in enumerate(["<unk>", "<pad>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(vocabulary), initializer_range=0.3, **sizes)  # pyright: ignore
    LlamaModel(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> list[Encoder]:
    folders = [save_checkpoint(tmp_path_factory.mktemp(f"model{seed}"), seed) for seed in (0, 1)]
    options = {"dtype": "float32", "device": "cpu", "max_seq_length": 256}
    return [Encoder.from_pretrained(folder, **options) for folder in folders]


@pytest.fixture(scope="module")
def encoder(encoders) -> Encoder:
    return encoders[0]


def write(folder: Path, **files: str | bytes) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_py", ".py").replace("_md", ".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def contents(path: Path) -> tuple[list, np.ndarray]:
    """Everything in an index but its vectors, in order, and the vectors."""
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT * FROM passages ORDER BY path, number").fetchall()
        files = database.execute("SELECT * FROM files ORDER BY path").fetchall()
    vectors = np.array([np.frombuffer(row[-1], np.float32) for row in rows])
    return [files, [row[:-1] for row in rows]], vectors


def test_of_two_models_that_begin_an_index_one_is_refused(encoders, tmp_path, monkeypatch):
    """Regression: the one that came later wrote its name over the vectors of the other."""
    folder = write(tmp_path / "code", a_py=SUM)
    check = indexing._document_prompt

    def meanwhile(encoder):  # between the look at the index and what is written into it
        monkeypatch.setattr(indexing, "_document_prompt", check)
        update_index(tmp_path / "x.db", folder, encoders[1])
        return check(encoder)

    monkeypatch.setattr(indexing, "_document_prompt", meanwhile)
    with pytest.raises(ValueError, match="another process began this index meanwhile: run the same again"):
        update_index(tmp_path / "x.db", folder, encoders[0])
    with pytest.raises(ValueError, match="another model"):
        update_index(tmp_path / "x.db", folder, encoders[0])
    assert Index(tmp_path / "x.db").search(encoders[1], ["add"])


def test_passages_of_python():
    found = passages("a.py", f"import os\n\n\n{SUM}\n\n{READ}".encode())
    assert [(p.name, p.line, p.end_line) for p in found] == [
        ("", 1, 13),
        ("add", 4, 6),
        ("File", 9, 13),
        ("File.read", 12, 13),
    ]
    assert found[1].text == "Add two numbers.\ndef add(a, b):\n    return a + b"
    assert found[2].text == "A file on disk.\nclass File:\n    def read(self):\n        ..."


def test_passages_of_a_long_function_each_have_its_header():
    lines = [f"    value_{i} = source[{i}] + offset" for i in range(400)]
    found = [p for p in passages("a.py", "\n".join(["def f(source):", *lines]).encode()) if p.name == "f"]
    assert len(found) > 2 and all(p.text.startswith("def f(source):\n") for p in found)
    assert max(len(p.text) for p in found) <= MAX_CODE + 20
    assert [line for p in found for line in p.text.split("\n")[1:]] == lines


def test_passages_of_a_long_function_have_their_own_lines():
    """Regression: a hit in the last piece pointed at the first line."""
    lines = [f"    value_{i} = source[{i}] + offset" for i in range(400)]
    text = "\n".join(["import os", "", "@cached", "def f(source):", '    """Say."""', *lines])
    found = [p for p in passages("a.py", text.encode()) if p.name == "f"]
    assert found[0].line == 3 and found[-1].end_line == 405
    for one, next_one in itertools.pairwise(found):
        assert next_one.line == one.end_line + 1
    for passage in found[1:]:
        own = text.split("\n")[passage.line - 1 : passage.end_line]
        assert passage.text.split("\n")[-len(own) :] == own


def test_passages_of_markdown():
    text = (
        "Before.\n\n# First #\n\nOne\ntwo.\n\nThree.\n\n```\n# no heading\n```\n\n## Second\n" + "word " * 300
    )
    found = passages("a.md", text.encode())
    assert [(p.name, p.line, p.end_line) for p in found] == [("", 1, 1), ("First", 3, 12), ("Second", 14, 15)]
    assert found[1].text.startswith("# First #\n\nOne\ntwo.\n\nThree.") and "no heading" in found[1].text


def test_code_on_one_line_opens_no_fence():
    text = "# A\n\n```pip install x```\n\n## B\n\nText.\n\n````sh\n# no heading\n````\n"
    assert [(p.name, p.line, p.end_line) for p in passages("a.md", text.encode())] == [
        ("A", 1, 3),
        ("B", 5, 11),
    ]


def test_a_line_of_blanks_is_no_line_of_a_passage():
    assert [(p.line, p.end_line, p.text) for p in passages("a.txt", b"   \nHello\n")] == [(2, 2, "Hello")]


def test_passages_of_text_are_whole_paragraphs_with_their_lines():
    paragraphs = [f"Paragraph {i}\n" + "word " * (i * 7) for i in range(40)]
    text = "\n\n".join(paragraphs)
    found = passages("a.txt", text.encode())
    assert len(found) > 5 and max(len(p.text) for p in found) < 1.5 * MAX_PROSE
    lines = text.split("\n")
    for passage in found:
        assert passage.text.startswith("Paragraph")
        assert passage.text.split("\n") == [
            line if n < passage.end_line else line.rstrip()
            for n, line in enumerate(lines[passage.line - 1 : passage.end_line], passage.line)
        ]
    assert " ".join(p.text for p in found).split() == text.split()


def test_search_finds_the_passage_with_its_place(tmp_path, encoder):
    folder = write(tmp_path / "src", a__sums_py=SUM, files_py=READ, notes_md="# Notes\n\nNothing of note.\n")
    seen = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    report = update_index(tmp_path / "code.index", folder, encoder, model="m", progress=progress)
    assert seen == [(done, seen[0][1]) for done in range(len(seen))] and seen[-1][0] == seen[-1][1] > 1
    assert (report.added, report.passages, report.skipped) == (3, 6, {})
    index = Index(tmp_path / "code.index")
    assert (index.model, index.folder) == ("m", folder.resolve())
    texts = ["Add two numbers.\ndef add(a, b):\n    return a + b", "# Notes\n\nNothing of note."]
    [[first, second], [note, _]] = index.search(encoder, texts, top_k=2)
    assert first[1:5] == ("a/sums.py", 1, 3, "add") and first.score == pytest.approx(1, abs=1e-4)
    assert note[1:5] == ("notes.md", 1, 3, "Notes") and second.score < first.score
    [only_notes] = index.search(encoder, texts[:1], within="*.md")
    assert {hit.path for hit in only_notes} == {"notes.md"}


def test_update_encodes_only_what_changed(tmp_path, encoder, monkeypatch):
    folder = write(tmp_path / "src", a_py=SUM, b_py=READ, c_md="Text.")
    update_index(tmp_path / "i", folder, encoder)
    encoded = []
    original = encoder.encode_document
    monkeypatch.setattr(encoder, "encode_document", lambda t, **k: (encoded.extend(t), original(t, **k))[1])
    write(folder, c_md="Other text.")
    (folder / "b.py").unlink()
    report = update_index(tmp_path / "i", folder, encoder)
    assert (report.added, report.changed, report.deleted, report.unchanged) == (0, 1, 1, 1)
    assert encoded == [indexing.PROBE, "Other text."]


class Stop(KeyboardInterrupt):
    pass


class StoppingConnection(sqlite3.Connection):
    """Interrupted before its last statement."""

    left = 0

    def count(self) -> None:
        type(self).left -= 1
        if type(self).left == 0:
            raise Stop

    def execute(self, *arguments):
        self.count()
        return super().execute(*arguments)

    def executemany(self, *arguments):
        self.count()
        return super().executemany(*arguments)


FILES = st.sampled_from(["a.py", "b.py", "sub/c.py", "d.md"])
BODIES = st.sampled_from([SUM, READ, SUM + READ, "# Title\n\nText.\n", "", "def broken(:", "x = 1\n" * 3])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), FILES, BODIES),
        st.tuples(st.just("delete"), FILES, st.none()),
        st.tuples(st.just("update"), st.none(), st.integers(1, 4)),
        st.tuples(st.just("kill"), st.none(), st.integers(4, 24)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_index_equals_one_made_from_scratch(tmp_path_factory, encoder, steps):
    """Whatever is written, deleted and interrupted: after an update, rows are the same and vectors equal.

    "update" is interrupted as it encodes for the nth time, "kill" at its nth statement of SQL.
    """
    base = tmp_path_factory.mktemp("property")
    folder = write(base / "src", a_py=SUM, d_md="First text.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "GROUP", 2)
        update_index(base / "kept", folder, encoder)
        for step, name, value in steps:
            if step == "write":
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(value)
            elif step == "delete":
                (folder / name).unlink(missing_ok=True)
            else:
                with patch.context() as interrupt:
                    if step == "update":
                        interrupt.setattr(
                            encoder, "encode_document", stopping(encoder.encode_document, value)
                        )
                    else:
                        connect = partial(sqlite3.connect, factory=StoppingConnection)
                        interrupt.setattr(StoppingConnection, "left", value)
                        interrupt.setattr(indexing.sqlite3, "connect", connect)
                    try:
                        update_index(base / "kept", folder, encoder)
                    except Stop:
                        pass
        update_index(base / "kept", folder, encoder)
        update_index(base / "fresh", folder, encoder)
    rows, vectors = contents(base / "kept")
    broken = ("def broken(:", "# Title\n\nText.\n")  # as Python
    whole = [p for p in folder.rglob("*.*") if p.suffix == ".md" or p.read_text() not in broken]
    assert [name for name, _ in rows[0]] == sorted(p.relative_to(folder).as_posix() for p in whole)
    fresh_rows, fresh_vectors = contents(base / "fresh")
    assert rows == fresh_rows
    np.testing.assert_allclose(vectors, fresh_vectors, atol=1e-5)
    shutil.rmtree(base)


def stopping(function, after: int):
    """The function, interrupted at its call number `after`."""
    calls = 0

    def call(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop
        return function(*arguments, **options)

    return call


def test_update_interrupted_at_any_statement_goes_on(tmp_path, encoder, monkeypatch):
    """A file's hash never stands without its passages."""
    first = write(tmp_path / "src", a_py=SUM, b_py=READ, d_md="Text.")
    update_index(tmp_path / "first", first, encoder)
    write(first, a_py=READ, c_py=SUM)
    (first / "d.md").unlink()
    update_index(tmp_path / "fresh", first, encoder)
    rows, number, stopped = contents(tmp_path / "fresh")[0], 0, True
    while stopped:
        number += 1
        shutil.copy(tmp_path / "first", tmp_path / "kept")
        with monkeypatch.context() as interrupt:
            interrupt.setattr(StoppingConnection, "left", number)
            interrupt.setattr(
                indexing.sqlite3, "connect", partial(sqlite3.connect, factory=StoppingConnection)
            )
            try:
                update_index(tmp_path / "kept", first, encoder)
                stopped = False
            except Stop:
                pass
        update_index(tmp_path / "kept", first, encoder)
        assert contents(tmp_path / "kept")[0] == rows, f"interrupted before statement {number}"
    assert number > 12


@pytest.mark.parametrize(("options", "bytes_each"), [({"dimension": 8}, 32), ({"int8": True}, 32), ({}, 128)])
def test_dimension_and_int8(tmp_path, encoder, options, bytes_each):
    folder = write(tmp_path / "src", a_py=SUM, b_py=READ)
    update_index(tmp_path / "i", folder, encoder, **options)
    with sqlite3.connect(tmp_path / "i") as database:
        assert {len(blob) for (blob,) in database.execute("SELECT vector FROM passages")} == {bytes_each}
    index = Index(tmp_path / "i")
    exact = encoder.encode([p[4] for p in index.passages], truncate_dim=options.get("dimension"))
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    assert (exact * index.vectors).sum(1).min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(index.vectors, axis=1), 1, atol=1e-5)
    assert index.search(encoder, [index.passages[1][4]], top_k=1)[0][0].name == index.passages[1][3]
    report = update_index(tmp_path / "i", folder, encoder)
    assert report.unchanged == 2
    with pytest.raises(ValueError, match="was made with dimension .*, not 4: name another file"):
        update_index(tmp_path / "i", folder, encoder, dimension=4)


def test_bad_files_are_counted(tmp_path, encoder):
    folder = write(tmp_path / "src", good_py=SUM, old_py="print 'x'\n", wide_md=b"x" * 1_000_000)
    write(folder, turned_py="# coding: rot13\n" + SUM)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.py")).write_text(SUM)
    write(
        folder, latin_md="é".encode("latin-1"), zero_md=b"a\0b", empty_py="", utf16_md="text".encode("utf-16")
    )
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere.py").symlink_to(folder / "missing")
    (folder / ".venv").mkdir()
    write(folder / ".venv", hidden_py=SUM)
    with open(folder / "huge.txt", "wb") as file:
        file.truncate(1 << 42)  # four terabytes, of which nothing may be read
    report = update_index(tmp_path / "i", folder, encoder)
    skipped = {"not Python 3": 2, "too long": 2, "not UTF-8": 2, "not text": 1, "name not UTF-8": 1}
    assert report.skipped == skipped
    assert {passage[0] for passage in Index(tmp_path / "i").passages} == {"good.py"}


def test_what_a_closed_folder_holds_is_not_forgotten(tmp_path, encoder, monkeypatch):
    """Regression: a folder that could not be listed for a moment lost its passages."""
    folder = write(tmp_path / "src", a_py=SUM, closed__b_py=READ, closed2__c_md="Text.")
    update_index(tmp_path / "i", folder, encoder)
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    (folder / "closed2" / "c.md").unlink()
    monkeypatch.setattr(os, "scandir", scandir)
    report = update_index(tmp_path / "i", folder, encoder)
    assert (report.deleted, report.unchanged, report.skipped) == (1, 1, {"unreadable": 1})
    assert {passage[0] for passage in Index(tmp_path / "i").passages} == {"a.py", "closed/b.py"}


@pytest.mark.parametrize("dimension", [0, -1, 33])
def test_impossible_dimension_is_refused_before_a_file_is_made(tmp_path, encoder, dimension):
    with pytest.raises(ValueError, match=f"dimension is {dimension}; the model's vectors have 32"):
        update_index(tmp_path / "i", write(tmp_path / "src", a_py=SUM), encoder, dimension=dimension)
    assert not (tmp_path / "i").exists()


def test_vectors_of_a_bfloat16_model_have_length_1(tmp_path, encoder, monkeypatch):
    """They were scaled in bfloat16, and searches printed cosines of 1.004."""
    encode = encoder.encode_document
    monkeypatch.setattr(encoder, "encode_document", lambda *a, **k: encode(*a, **k).bfloat16())
    update_index(tmp_path / "i", write(tmp_path / "src", a_py=SUM, b_py=READ), encoder)
    np.testing.assert_allclose(np.linalg.norm(Index(tmp_path / "i").vectors, axis=1), 1, atol=1e-6)


def test_update_keeps_the_probe_and_the_model(tmp_path, encoder, monkeypatch):
    """A probe that followed every update would let the index drift, an update at a time, to another model."""

    def stored():
        with sqlite3.connect(tmp_path / "i") as database:
            return dict(database.execute("SELECT key, value FROM meta"))

    folder = write(tmp_path / "src", a_py=SUM)
    update_index(tmp_path / "i", folder, encoder, model="first")
    before, encode = stored(), encoder.encode_document
    monkeypatch.setattr(encoder, "encode_document", lambda *a, **k: encode(*a, **k) + 1e-3)
    update_index(tmp_path / "i", folder, encoder)
    assert stored() == before and made_with(tmp_path / "i").model == "first" and json.loads(before["probe"])


def test_every_passage_is_encoded_once(tmp_path, encoder, monkeypatch):
    encoded, encode = [], encoder.encode_document
    monkeypatch.setattr(indexing, "GROUP", 2)
    monkeypatch.setattr(encoder, "encode_document", lambda t, **k: (encoded.extend(t), encode(t, **k))[1])
    files = {f"m{i}_py": SUM.replace("add", f"add{i}") for i in range(7)}
    report = update_index(tmp_path / "i", write(tmp_path / "src", **files), encoder)
    assert len(encoded) == len(set(encoded)) == 1 + report.passages > 8


def test_queries_are_encoded_as_queries(tmp_path, encoder, monkeypatch):
    update_index(tmp_path / "i", write(tmp_path / "src", a_py=SUM), encoder)
    asked, encode = [], encoder.encode_query
    monkeypatch.setattr(encoder, "encode_query", lambda t, **k: (asked.extend(t), encode(t, **k))[1])
    Index(tmp_path / "i").search(encoder, ["add two numbers"])
    assert asked == ["add two numbers"]


def test_index_of_another_model_is_refused(tmp_path, encoders):
    folder = write(tmp_path / "src", a_py=SUM)
    update_index(tmp_path / "i", folder, encoders[0], model="first")
    before = contents(tmp_path / "i")[0]
    write(folder, b_py=READ)
    message = r"i: holds vectors of another model \(first\), or of one loaded otherwise"
    with pytest.raises(ValueError, match=message):
        update_index(tmp_path / "i", folder, encoders[1])
    index = Index(tmp_path / "i")
    index.search(encoders[0], ["query"])
    with pytest.raises(ValueError, match=message):
        index.search(encoders[1], ["query"])
    assert contents(tmp_path / "i")[0] == before


def test_index_moves_with_its_folder_but_not_to_another(tmp_path, encoder):
    folder = write(tmp_path / "src", a_py=SUM)
    update_index(tmp_path / "i", folder, encoder)
    other = write(tmp_path / "other", a_py=READ)
    with pytest.raises(ValueError, match="is of the folder .*src: name another file for"):
        update_index(tmp_path / "i", other, encoder)
    folder.rename(tmp_path / "moved")
    (tmp_path / "i").rename(tmp_path / "j")
    assert update_index(tmp_path / "j", tmp_path / "moved", encoder).unchanged == 1
    assert Index(tmp_path / "j").folder == tmp_path / "moved"


def test_damaged_and_foreign_files_say_what_to_do(tmp_path, encoder):
    folder = write(
        tmp_path / "src", **{f"m{i}_py": f"def f{i}():\n" + f"    x = {i}\n" * 300 for i in range(30)}
    )
    path = tmp_path / "i"
    update_index(path, folder, encoder)
    assert is_index(path) and not is_index(folder) and not is_index(folder / "m1.py")
    half = tmp_path / "half"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="half: is damaged .*: delete it and index again"):
        Index(half)
    with pytest.raises(ValueError, match="src: is a folder, and an index is a file"):
        update_index(folder, folder, encoder)
    with pytest.raises(ValueError, match=r"m1.py: is no index"):
        update_index(folder / "m1.py", folder, encoder)
    with pytest.raises(FileNotFoundError, match="no index at .*none: `uncausal index DIR --out"):
        Index(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        update_index(path, tmp_path / "nothing", encoder)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(ValueError, match="another version"):
        Index(path)


DAMAGE = [
    "DROP TABLE passages",
    "DROP TABLE meta",
    "ALTER TABLE passages RENAME COLUMN vector TO v",
    "DELETE FROM meta WHERE key = 'folder'",
    "UPDATE meta SET value = 'x' WHERE key = 'int8'",
    "UPDATE meta SET value = '8' WHERE key = 'dimension'",
    "UPDATE meta SET value = '[1, \"x\"]' WHERE key = 'probe'",
    "UPDATE meta SET value = '7' WHERE key = 'loading'",
    "UPDATE meta SET value = '{\"num_layers\": \"x\"}' WHERE key = 'loading'",
    "UPDATE meta SET value = '{\"attention\": \"somebody/kernels:function\"}' WHERE key = 'loading'",
    "UPDATE meta SET value = '5' WHERE key = 'prompt'",
    "UPDATE passages SET vector = x'00'",
    "UPDATE passages SET vector = NULL",
    "UPDATE passages SET line = 'x'",
    "UPDATE passages SET text = CAST(x'ff' AS TEXT)",
]


def test_an_index_of_no_number_is_no_models(tmp_path, encoder):
    """Regression: NaN is below no bound, so that the index of any model was taken."""
    folder = write(tmp_path / "src", a_py=SUM)
    update_index(tmp_path / "i", folder, encoder)
    with sqlite3.connect(tmp_path / "i") as database:
        [(probe,)] = database.execute("SELECT value FROM meta WHERE key = 'probe'")
        value = json.dumps([float("nan")] * len(json.loads(probe)))
        database.execute("UPDATE meta SET value = ? WHERE key = 'probe'", (value,))
    with pytest.raises(ValueError, match="of another model|is damaged"):
        Index(tmp_path / "i").search(encoder, ["sum"])


@pytest.mark.parametrize("statement", DAMAGE)
def test_edited_index_says_what_to_do(tmp_path, encoder, statement):
    """Regression: a KeyError's traceback, or the question whether another process was indexing into it."""
    folder = write(tmp_path / "src", a_py=SUM)
    update_index(tmp_path / "i", folder, encoder)
    with sqlite3.connect(tmp_path / "i") as database:
        database.execute(statement)
    told = r"^\S*/i: is damaged \(.+\): delete it and index again$"
    with pytest.raises(ValueError, match=told):
        Index(tmp_path / "i")
    if "DROP" in statement or "meta" in statement:  # the rest an update does not read
        write(folder, a_py=READ)
        with pytest.raises(ValueError, match=told):
            update_index(tmp_path / "i", folder, encoder)


def test_index_in_use_is_not_called_damaged(tmp_path, encoder, monkeypatch):
    update_index(tmp_path / "i", write(tmp_path / "src", a_py=SUM), encoder)
    monkeypatch.setattr(indexing.sqlite3, "connect", partial(sqlite3.connect, timeout=0))
    with sqlite3.connect(tmp_path / "i") as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ValueError, match="database is locked: is another process indexing into it"):
            Index(tmp_path / "i")


def test_index_keeps_how_its_encoder_was_loaded(tmp_path, encoders):
    """Regression: a search loaded the model otherwise, and where the probe passed its ranks were others."""
    model = encoders[0].spec.name_or_path
    loading = {"pooling": "weighted_mean", "dtype": "float32", "max_seq_length": 64}
    encoder = Encoder.from_pretrained(model, device="cpu", trust_remote_code=True, **loading)
    update_index(tmp_path / "i", write(tmp_path / "src", a_py=SUM), encoder, model=model)
    assert made_with(tmp_path / "i") == Index(tmp_path / "i").made == MadeWith(model, loading)
    with sqlite3.connect(tmp_path / "i") as database:
        told = json.dumps({**loading, "trust_remote_code": True, "use_safetensors": False, "token": "x"})
        database.execute("UPDATE meta SET value = ? WHERE key = 'loading'", [told])
    assert made_with(tmp_path / "i").loading == loading, "a file must not have a model's code run"
    encoder.spec = None
    update_index(tmp_path / "i", tmp_path / "src", encoder)
    assert made_with(tmp_path / "i") == MadeWith(model, loading), "what was not named is as it was"


def test_index_keeps_the_length_that_texts_are_cut_at(tmp_path, encoder, monkeypatch):
    """Regression: the probe is short, and vectors of whole texts and of cut ones came to stand together."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("the king paints the long road home " * 9)
    update_index(tmp_path / "index", tmp_path / "docs", encoder)
    monkeypatch.setattr(encoder[0], "max_seq_length", encoder.max_seq_length - 1)
    with pytest.raises(ValueError, match=r"was made with max_seq_length \d+, not \d+: name another file"):
        update_index(tmp_path / "index", tmp_path / "docs", encoder)


def test_index_keeps_the_prompt_of_its_documents(tmp_path, encoder, monkeypatch):
    folder = write(tmp_path / "src", a_py=SUM)
    update_index(tmp_path / "i", folder, encoder, prompt="passage: ")
    write(folder, b_md="Other text.")
    monkeypatch.setattr(encoder, "prompts", {"document": "text: ", "query": ""})
    assert update_index(tmp_path / "i", folder, encoder).added == 1
    index = Index(tmp_path / "i")
    [[hit]] = index.search(encoder, ["Other text."], top_k=1, prompt="passage: ")
    assert hit.path == "b.md" and hit.score == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="was made with prompt passage: , not text: : name another file"):
        update_index(tmp_path / "i", folder, encoder, prompt_name="document")
