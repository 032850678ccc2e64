"""Reading texts and pairs: every format, and for every kind of damage an error that names file and line."""

import gzip
import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from uncausal.encoder.data.pairs import class_triplets, read_pairs, text_columns
from uncausal.encoder.data.rows import DataError, read_rows
from uncausal.encoder.data.texts import read_texts, sentences

NEGATIVES = ("negative_1", "negative_2", "negative_3")
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
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: JSON nested too deep"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: Exceeds the limit \(4300 digits\)"),
        ("a.csv", b'id,text\n1,"one\n', r"a\.csv:2: malformed CSV"),
        ("a.txt.gz", gzip.compress(b"one\n" * 9999, mtime=0)[:-30], r"a\.txt\.gz:\d+: damaged gzip"),
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


def test_a_pattern_is_its_files_in_order_of_their_names(tmp_path):
    for name, texts in (("b.txt", ["three"]), ("a.jsonl.gz", ["one", "two"]), ("deep/c.txt", ["four"])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_format(tmp_path / name, texts)
    write_format(tmp_path / "of[1].txt", ["the file of that name"])
    assert list(read_texts(tmp_path / "[ab].*")) == ["one", "two", "three"]
    assert list(read_texts(tmp_path / "**" / "c*.txt")) == ["four"]
    assert list(read_texts(tmp_path / "of[1].txt")) == ["the file of that name"]
    with pytest.raises(FileNotFoundError, match=r"no file fits .*none\*\.txt"):
        list(read_texts(tmp_path / "none*.txt"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub_may_stream(monkeypatch, streaming):
    asked = {}

    def load_dataset(path, configuration, **options):
        asked.update(options, path=path, configuration=configuration)
        columns = {"sentence": TEXTS, "number": range(len(TEXTS))}
        if "one" in path:
            columns.pop("number" if "text" in path else "sentence")
        dataset = Dataset.from_dict(columns)
        return dataset.to_iterable_dataset() if options["streaming"] else dataset

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = read_rows("wiki/dump:en@train[:9]", streaming=streaming)
    assert next(rows) == ("wiki/dump:en@train[:9]: row 1", {"sentence": TEXTS[0], "number": 0})
    known = {"path": "wiki/dump", "configuration": "en", "split": "train[:9]"}
    assert asked == {**known, "streaming": streaming}
    assert next(read_texts("wiki/one-text")) == TEXTS[0]  # whatever its only column is called
    with pytest.raises(DataError, match="wiki/one-number: row 1: no field 'text'; there is 'number'"):
        next(read_texts("wiki/one-number"))


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


ROW = {"anchor": "a", "positive": "b", "negative": "c"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([ROW, ROW], {"anchor": ["a"] * 2, "positive": ["b"] * 2, "negative": ["c"] * 2}),
        ({"negative": ["c"], "anchor": ["a"], "positive": ["b"]}, {k: [v] for k, v in ROW.items()}),
        (Dataset.from_dict({k: [v] for k, v in ROW.items()}), {k: [v] for k, v in ROW.items()}),
        ([("a", "b")], {"anchor": ["a"], "positive": ["b"]}),
        ([("a", "b", "c", "d", "e")], dict(zip(("anchor", "positive", *NEGATIVES), "abcde", strict=True))),
        (
            [{"query": "a", "positive": "b", "negative_2": "d", "negative_10": "e", "negative_1": "c"}],
            dict(zip(("anchor", "positive", *NEGATIVES), "abcde", strict=True)),
        ),
        ([{"question": "a", "answer": "b", "negative": ["c"]}], {k: [v] for k, v in ROW.items()}),
    ],
    ids=["dicts", "columns", "Dataset", "pair", "5-tuple", "numbered", "listed"],
)
def test_read_pairs_every_form(rows, expected):
    """A list of dicts gave its keys as texts, a 5-tuple lost two negatives, negative_1 to 7 were dropped."""
    found = read_pairs(rows)
    wanted = {name: list(values) for name, values in expected.items()}
    assert found.column_names == list(wanted) and found.to_dict() == wanted
    assert text_columns(found) == found.column_names


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_read_pairs_reads_negatives_from_every_format(tmp_path, suffix):
    frame = pa.table({"anchor": ["a", "d"], "positive": ["b", "e"], "negative_1": ["c", "f"]})
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(frame, file)
    elif suffix == "csv":
        file.write_text("anchor,positive,negative_1\na,b,c\nd,e,f\n")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in frame.to_pylist()))
    assert read_pairs(file).to_dict() == {
        "anchor": ["a", "d"],
        "positive": ["b", "e"],
        "negative": ["c", "f"],
    }


def test_read_pairs_takes_so_many_negatives():
    rows = [("a", "b", "c", "d"), ("e", "f", "g")]
    assert read_pairs(rows, negatives=1)["negative"] == ["c", "g"]
    assert read_pairs(rows, negatives=0).column_names == ["anchor", "positive"]
    named = [{"p": "a", "h": "b", "n": "c"}]
    assert read_pairs(named, columns=("p", "h", "n")).to_dict() == {k: [v] for k, v in ROW.items()}


def test_what_python_has_no_form_of_is_told_by_file_and_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"text": pa.chunked_array([pa.array(["fine"]), bad])}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: a row behind 0 is not readable"):
        list(read_texts(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text('{"": 5}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'text'; there is ''"):
        list(read_texts(tmp_path / "a.jsonl"))


def test_read_pairs_filters_by_score(tmp_path):
    """Pairs scored 0 were positives."""
    rows = [("0", "a", "b", "4.5"), ("1", "c", "d", "0"), ("2", "e", 'f "g', "4.0")]
    body = "id\tsentence1\tsentence2\tscore\n" + "".join("\t".join(row) + "\n" for row in rows)
    (tmp_path / "a.tsv").write_text(body)
    found = read_pairs(tmp_path / "a.tsv", min_score=4)
    assert found.to_dict() == {"anchor": ["a", "e"], "positive": ["b", 'f "g'], "label": [0, 1]}
    assert read_pairs(tmp_path / "a.tsv", scored=True)["score"] == [4.5, 0.0, 4.0]
    with pytest.raises(DataError, match=r"a\.tsv:2: the field 'score' would be ignored .*choose min_score"):
        read_pairs(tmp_path / "a.tsv")
    with pytest.raises(DataError, match="row 1: the field 'label' would be ignored"):
        read_pairs([{"sentence1": "a", "sentence2": "b", "label": 0}])


def test_read_pairs_takes_what_it_returned():
    """Regression: the score was missed, and two classes taken for right and wrong positives."""
    scored = read_pairs([{**ROW, "score": 5.0}, {**ROW, "score": 1.0}], min_score=4)
    for options in ({}, {"min_score": 4}):
        assert read_pairs(scored, **options) is scored
    with pytest.raises(DataError, match="no field 'score'"):
        read_pairs(scored, min_score=5)
    classes = [{"text": f"{label} {n}", "label": label} for n in range(3) for label in "ab"]
    found = read_pairs({"two": classes, "three": [*classes, *({**row, "label": "c"} for row in classes[:2])]})
    again = read_pairs(found)
    assert again.keys() == found.keys() and all(again[name] is found[name] for name in found)
    plain = read_pairs([("a", "b"), ("c", "d")])
    swapped = plain.rename_columns({"anchor": "positive", "positive": "anchor"})
    assert read_pairs(swapped).to_dict() == {"anchor": ["b", "d"], "positive": ["a", "c"]}
    assert read_pairs(swapped).column_names == ["anchor", "positive"]
    with pytest.raises(DataError, match="the field 'label' is 0 or 1"):  # one's own are read as ever
        read_pairs([{**ROW, "label": n} for n in (0, 1)])


def test_read_pairs_sets_tasks_and_ids(caplog):
    """A dict of sources, or a field `task`, makes sets; equal ids, equal numbers; what is unused is said."""
    data = {
        "x": [("a", "b")],
        "y": [{**ROW, "task": "t", "id": "7", "url": "u"}, {**ROW, "task": "s", "id": "7"}],
    }
    found = read_pairs(data)
    assert list(found) == ["x", "y/t", "y/s"] and found["y/t"]["label"] == [0]
    assert [r.getMessage() for r in caplog.records if "not used" in r.getMessage()] == ["y: not used: 'url'"]
    assert read_pairs([{**ROW, "label": x} for x in "pqp"])["label"] == [0, 1, 0]
    assert read_pairs([{**ROW, "instruction": "find"}] * 2)["instruction"] == ["find", "find"]
    both = read_pairs([{**ROW, "instruction": "find", "document_instruction": "read"}])
    assert (both["instruction"], both["document_instruction"]) == (["find"], ["read"])
    assert "document_instruction" not in read_pairs([{**ROW, "instruction": "find"}]).column_names
    classes = [{"text": f"text {i}", "label": i % 2, "instruction": "sort"} for i in range(4)]
    assert read_pairs(classes)["document_instruction"] == ["sort"] * 4  # both sides are of one kind
    assert read_pairs([ROW, {**ROW, "instruction": "find"}])["instruction"] == ["", "find"]
    assert read_pairs([{**ROW, "instruction": ""}, {**ROW, "instruction": "find"}])["instruction"] == [
        "",
        "find",
    ]
    assert "label" not in read_pairs([{**ROW, "id": "", "task": ""}] * 2).column_names


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"x": "a", "y": "b"}], {}, r":1: no pair among the fields \['x', 'y'\]"),
        ([{"anchor": "a", "positive": " "}], {}, r":1: the field 'positive' is empty"),
        ([ROW, {"anchor": "a", "positive": 3}], {}, r":2: the field 'positive' holds int 3, not text"),
        ([ROW, {"anchor": "a"}], {}, r":2: no field 'positive'"),
        ([{"anchor": "a", "positive": "b"}, ROW], {}, r":1: no field 'negative', and other rows have 1"),
        ([{**ROW, "negative_2": "d"}, ROW], {}, r":2: no field 'negative_2', and other rows have 2"),
        ([ROW, {**ROW, "negative": "b"}], {}, r":2: the field 'negative' equals the field 'positive': 'b'"),
        ([{**ROW, "score": "high"}], {"min_score": 1}, r":1: .*no number: 'high'"),
        ([{**ROW, "score": "nan"}], {"min_score": 1}, r":1: .*no number: 'nan'"),
        ([{**ROW, "score": 0}], {"min_score": 1}, r"no pair with score >= 1"),
        ([{**ROW, "score": 1}, ROW], {"min_score": 1}, r":2: no field 'score'"),
        ([ROW], {"columns": ("anchor", "other")}, r":1: no field 'other'"),
        ([ROW], {"columns": ("anchor", "positive", "n")}, r":1: no field 'n'"),
        ([{**ROW, "id": 1}, ROW], {}, r":2: some rows of the set have an id or a label, and some have none"),
        ([], {}, r"a\.jsonl holds no rows"),
        ([{**ROW, "label": 1}, {**ROW, "label": 0}], {}, r":1: the field 'label' is 0 or 1 .*name it score"),
        ([{**ROW, "id": [1]}], {}, r":1: an id or a label is a name or a number; found \[1\]"),
        ([{"text": "a", "label": {}}], {}, r":1: an id or a label is a name or a number; found {}"),
        ([{"text": "a", "label": 1}, {"text": "b"}], {}, r":2: no field 'label'"),
        ([{"text": t, "label": t == "c"} for t in "abc"], {}, r":3: the label True has one example only"),
        ([{"text": t, "label": 1} for t in "ab"], {}, r":1: all rows have the label 1"),
    ],
)
def test_read_pairs_errors_name_file_row_and_field(tmp_path, rows, options, message):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        read_pairs(tmp_path / "a.jsonl", **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ("a", "b")], "row 2: dicts and tuples are mixed"),
        ([("a", "b"), "a b"], "row 2: expected a dict or a tuple, found str 'a b'"),
        ([("a",)], "row 1: a tuple holds anchor, positive and negatives"),
        ({"anchor": ["a"], "positive": ["b", "c"]}, "columns of unequal length"),
        ({"x": [ROW], "y": [{"anchor": "a"}]}, "y: row 1: no pair among the fields"),
        ({}, "the data hold no set"),
        ([{**ROW, "task": "t"}, ROW], "row 2: no field 'task', and other rows have one"),
        ({"a": [{**ROW, "task": "b"}], "a/b": [ROW]}, "two sets have the name 'a/b'"),
    ],
)
def test_read_pairs_errors_in_memory(rows, message):
    with pytest.raises(DataError, match=message):
        read_pairs(rows)


def test_class_triplets_by_hand():
    """NV-Embed's rule: another example of the class as positive, examples of other classes as negatives."""
    texts, labels = ["a1", "b1", "a2", "b2", "c1", "c2"], list("ababcc")
    found = class_triplets(texts, labels, negatives=3, seed=1)
    for text, label, pair in zip(texts, labels, found, strict=True):
        (other,) = [t for t, x in zip(texts, labels, strict=True) if x == label and t != text]
        assert (pair.anchor, pair.positive, pair.id) == (text, other, label)
        assert len(set(pair.negatives)) == 3 and not any(n.startswith(label) for n in pair.negatives)
    assert found == class_triplets(texts, labels, negatives=3, seed=1)
    assert found != class_triplets(texts, labels, negatives=3, seed=2)
    rows = read_pairs([{"text": t, "label": x} for t, x in zip(texts, labels, strict=True)], negatives=2)
    assert rows.column_names == ["anchor", "positive", "negative_1", "negative_2", "label", "negative_labels"]
    assert rows["label"] == [0, 1, 0, 1, 2, 2]
    for row in rows:
        negatives = (row["negative_1"][0], row["negative_2"][0])
        assert [["a", "b", "c"].index(first) for first in negatives] == row["negative_labels"]
    scored = read_pairs([{"text": t, "label": x} for t, x in zip(texts, labels, strict=True)], scored=True)
    assert scored.column_names == ["anchor", "positive", "negative", "label"]  # another loss takes numbers


def test_class_triplets_of_one_large_class_and_of_a_text_in_two():
    """Negatives were drawn from all rows, a hundred times at most, and could be the anchor's own text."""
    texts, labels = [*(f"a{i}" for i in range(500)), "b1", "b2"], ["a"] * 500 + ["b"] * 2
    found = class_triplets(texts, labels, negatives=2)
    assert all(set(pair.negatives) == {"b1", "b2"} for pair in found[:500])
    for seed in range(20):
        for pair in class_triplets(["x", "y", "x", "z"], ["a", "a", "b", "b"], seed=seed):
            assert pair.negatives == (["z"] if pair.id == "a" else ["y"])
    with pytest.raises(DataError, match="row 1: fewer than 2 examples of other classes than 'a'"):
        class_triplets(["x", "y", "x", "z"], ["a", "a", "b", "b"], negatives=2)


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
