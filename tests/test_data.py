"""Reading texts and pairs: every format, and for every kind of damage an error that names file and line."""

import gzip
import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from uncausal.encoder.data.pairs import read_pairs
from uncausal.encoder.data.rows import DataError
from uncausal.encoder.data.texts import read_texts, sentences

TEXTS = ["Héllo wörld", 'a "quoted" text, with a comma', "日本語 の テキスト"]


def write_format(path, texts):
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    suffix = [s for s in path.suffixes if s != ".gz"][-1]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    body = {
        ".txt": lambda: "\n".join(texts) + "\n\n",
        ".jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows),
        ".csv": lambda: (
            "id,text\n" + "".join('{},"{}"\n'.format(r["id"], r["text"].replace('"', '""')) for r in rows)
        ),
        ".tsv": lambda: "id\ttext\n" + "".join("{id}\t{text}\n".format(**r) for r in rows),
    }[suffix]().encode()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.tsv.gz", "a.parquet"]
)
def test_read_texts_every_format(tmp_path, name):
    write_format(tmp_path / name, TEXTS)
    assert list(read_texts(tmp_path / name)) == TEXTS
    assert list(read_texts(str(tmp_path / name), limit=2)) == TEXTS[:2]


def test_read_texts_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\n')
    assert list(read_texts(tmp_path / "a.jsonl")) == ["one"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [(b"one\r\n\ntwo\n", ["one", "two"]), (b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]), (b"", [])],
    ids=["text", "jsonl", "empty"],
)
def test_read_texts_stdin(monkeypatch, body, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(body)))
    assert list(read_texts("-")) == expected


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"\n', r"a\.jsonl:2: malformed JSON at column 1[56]"),
        ("a.jsonl", b'{"text": "one"}\n\n["two"]\n', r"a\.jsonl:3: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n', r"a\.jsonl:2: no field 'text'; there is 'body'"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: the field 'text' holds int 7, not text"),
        ("a.jsonl", b'{"text": "1"}\n{"text": "caf\xe9"}\n', r"a\.jsonl:2: not UTF-8: byte 0xe9 at byte 14"),
        ("a.txt", b"one\ntwo\nthr\xff\n", r"a\.txt:3: not UTF-8: byte 0xff at byte 4"),
        ("a.csv", b"id,text\n1,one\n2,two,three\n", r"a\.csv:3: 3 fields, but the header has 2"),
        ("a.csv", b'id,text\n1,"one\n', r"a\.csv:2: malformed CSV"),
        ("a.txt.gz", gzip.compress(b"one\n" * 9999)[:-30], r"a\.txt\.gz:\d+: damaged gzip"),
        ("a.txt.gz", b"plain text", r"a\.txt\.gz:1: damaged gzip"),
        ("a.parquet", b"PAR1 but no more", r"a\.parquet: not readable as Parquet"),
        ("a.docx", b"one", r"the suffix '\.docx' is none of"),
    ],
)  # fmt: skip
def test_read_texts_names_the_place_of_damage(tmp_path, name, body, message):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError, match=message):
        list(read_texts(tmp_path / name))


def test_read_texts_missing_file_is_not_taken_for_a_dataset(tmp_path):
    for name in (tmp_path / "none.txt", "./none", "none.jsonl.gz"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            list(read_texts(name))
    with pytest.raises(DataError, match="is a folder"):
        list(read_texts(tmp_path))


def test_read_texts_csv_field_longer_than_the_csv_default(tmp_path):
    """Python's csv refuses fields over 128 KiB unless told otherwise; whole articles are longer."""
    write_format(tmp_path / "a.csv", ["word " * 40_000 + "end"])
    assert [len(text) for text in read_texts(tmp_path / "a.csv")] == [200_003]


def test_read_texts_reads_lines_before_the_damage(tmp_path):
    """A stream is not read whole first: the good lines come out before the error does."""
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\n")
    texts = read_texts(tmp_path / "a.txt")
    assert next(texts) == "one"
    with pytest.raises(DataError):
        next(texts)


def test_read_pairs_finds_the_columns_and_filters_by_score(tmp_path):
    rows = [("0", "a", "b", "4.5"), ("1", "c", "d", "3.9"), ("2", "e", 'f "g', "4.0")]
    body = "id\tsentence1\tsentence2\tscore\n" + "".join("\t".join(row) + "\n" for row in rows)
    (tmp_path / "a.tsv").write_text(body)
    assert read_pairs(tmp_path / "a.tsv", min_score=4) == {
        "sentence1": ["a", "e"],
        "sentence2": ["b", 'f "g'],
    }
    assert read_pairs(tmp_path / "a.tsv", ("sentence2", "sentence1"))["sentence2"] == ["b", "d", 'f "g']


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        ('{"x": "a", "y": "b"}\n', {}, r":1: no pair among the fields \['x', 'y'\]"),
        ('{"anchor": "a", "positive": " "}\n', {}, r":1: the field 'positive' is empty"),
        ('{"anchor": "a", "positive": "b", "score": "high"}\n', {"min_score": 1}, r":1: .*no number: 'high'"),
        ('{"anchor": "a", "positive": "b", "score": 0}\n', {"min_score": 1}, r"no pair with score >= 1"),
        ('{"anchor": "a", "positive": "b"}\n', {"columns": ("anchor", "other")}, r":1: no field 'other'"),
    ],
)
def test_read_pairs_errors(tmp_path, body, options, message):
    (tmp_path / "a.jsonl").write_text(body)
    with pytest.raises(DataError, match=message):
        read_pairs(tmp_path / "a.jsonl", **options)


def test_read_pairs_prefers_triplets(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"negative": "c", "anchor": "a", "positive": "b"}\n')
    assert read_pairs(tmp_path / "a.jsonl") == {"anchor": ["a"], "positive": ["b"], "negative": ["c"]}


def test_sentences():
    text = (
        "Dr. J. R. Smith met Mrs. Jones, e.g. in the U.S. in No. 7. Was it 3.5 km away? "
        'Yes! "It was." He left.\nA new line begins\n\nFin.'
    )
    assert list(sentences(text)) == [
        "Dr. J. R. Smith met Mrs. Jones, e.g. in the U.S. in No. 7.",
        "Was it 3.5 km away?",
        "Yes!",
        '"It was."',
        "He left.",
        "A new line begins",
        "Fin.",
    ]
    assert list(sentences(text, min_words=3, max_words=6)) == ["Was it 3.5 km away?", "A new line begins"]
