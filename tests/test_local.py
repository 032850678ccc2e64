"""The sets of a data directory: their forms, and what they must not hold."""

import gzip
import json

import pytest

from uncausal.encoder.data import local
from uncausal.encoder.data.local import SETS, TEXTS, data_dir, local_rows
from uncausal.encoder.data.rows import DataError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode())) if path.suffix == ".gz" else path.write_text(text)


@pytest.fixture
def root(tmp_path):
    """A data directory with a few rows of every set."""
    sts = "\t".join(["g", "f", "y", "1", "5.0", "A man sings.", "Someone is singing."])
    write(tmp_path / "stsbenchmark" / "sts-test.csv", sts + "\n")
    for name in ("snli", "mnli", "qnli"):
        rows = f"{name} premise\t{name} entailed\t{name} contradicted\n"
        if name == "mnli":
            rows += "A cat sleeps.\tA man sings.\tA dog runs.\n" + "no\tnegative\t\n"
        write(tmp_path / "nli_triples" / f"{name}_dev_triples.tsv.gz", rows)
    write(tmp_path / "wiki_sentences" / "train-00.tsv.gz", "".join(f"7\tfact {i}\n" for i in range(11)))
    paragraph = "The first sentence of it is here. Another one of five words. And a third sentence ends it."
    articles = '<doc id="1" title="Ants">\nAnts\n\nThey dig.\n\nThey eat.\n</doc>\n'
    articles += '<doc id="2" title="Bees">\nBees\n\nThey fly.\n</doc>\n'
    write(tmp_path / "wiki_articles" / "wiki_00.txt.gz", articles)
    write(tmp_path / "wiki_paragraphs" / "train-00.tsv.gz", f"7\t{paragraph}\n8\tToo short. Yes.\n")
    answers = [
        {"doc": "1", "qtype": kind, "question": f"{kind}?", "answer": text}
        for kind, text in [("cause", "A gene."), ("care", "Rest."), ("sign", " "), ("copy", "A gene.")]
    ]
    text = "".join(json.dumps(row) + "\n" for row in answers)
    for source in ("1_cancergov", "2_gard", "3_ghr", "4_mplus_health_topics"):
        write(tmp_path / "medquad" / f"{source}.jsonl.gz", text)
    clinc = {"train": [["hi", "greet"], ["bye", "leave"]], "test": [["yo", "greet"]]}
    write(tmp_path / "clinc150" / "data_full.json.gz", json.dumps(clinc))
    trees = "# sent_id = 1\n# text = Don't go!\n1\tDo\tdo\tAUX\n\n# text = It works.\n1\tIt\tit\tPRON\n"
    write(tmp_path / "ud_english_ewt" / "en_ewt-ud-train.conllu.gz", trees)
    write(tmp_path / "semeval_sts" / "2013" / "OnWN.tsv", "4.0\tA thin, light wood\tSomething else.\n")
    senses = {
        "noun": '00001 03 n 02 spiral_galaxy 0 coil 1 001 @ 00002 n 0000 | a galaxy; "Ours is one"\n'
        "00002 03 n 0a " + " ".join(f"name{i} 0" for i in range(10)) + " 000 | ten names\n"
        '00003 03 n 01 balsa 0 000 | a thin light wood; of a tree; "a raft of balsa"\n',
        "verb": "",
        "adj": "00004 00 a 01 near(a) 0 000 | close by\n",
        "adv": "",
    }
    for kind, text in senses.items():
        write(tmp_path / "dict" / f"data.{kind}", "  1 This software and database\n" + text)
    return tmp_path


def test_wordnet_is_names_and_definitions(root, monkeypatch):
    """Counts of names are hexadecimal, an adjective's marker is none of its name, STS definitions are out."""
    monkeypatch.setenv("WNSEARCHDIR", str(root / "dict"))
    assert sorted(local_rows("local:wordnet", root)) == [
        ", ".join(f"name{i}" for i in range(10)) + ": ten names",
        "near: close by",
        'spiral galaxy, coil: a galaxy; "Ours is one"',
    ]
    monkeypatch.setenv("WNSEARCHDIR", str(root))
    with pytest.raises(FileNotFoundError, match="apt install wordnet-base"):
        local_rows("local:wordnet", root)


def test_nli_leaves_out_sts_test_sentences_and_broken_rows(root):
    rows = local_rows("local:nli", root)
    assert {row["anchor"] for row in rows} == {"snli premise", "mnli premise", "qnli premise"}
    assert all(row["positive"].endswith("entailed") and row["negative"].endswith("ted") for row in rows)


def test_nli_knows_an_sts_test_sentence_by_its_words(root):
    """Regression: without its full stop it passed."""
    row = "a man sings\tSomebody makes music.\tNobody does.\nkept\tkept too\tnot kept\n"
    write(root / "nli_triples" / "snli_dev_triples.tsv.gz", row)
    assert {row["anchor"] for row in local_rows("local:nli", root)} == {
        "kept",
        "mnli premise",
        "qnli premise",
    }


def test_wiki_pairs_use_no_sentence_twice(root):
    rows = local_rows("wiki_pairs", root)
    used = [text for row in rows for text in row.values()]
    assert len(rows) == 4 and len(set(used)) == 8


def test_wiki_crop_is_missing_from_the_rest(root):
    [row] = local_rows("wiki_crops", root)
    assert row["anchor"] not in row["positive"] and len(row["positive"].split(".")) == 3


def test_medquad_negative_answers_another_question_of_the_document(root):
    rows = local_rows("medquad", root)
    assert {(row["anchor"], row["negative"]) for row in rows} == {
        ("cause?", "Rest."),
        ("care?", "A gene."),
        ("copy?", "Rest."),
    }


def test_texts_are_paragraphs_articles_and_sentences(root):
    """An article is one text, without its title and markup."""
    texts = local_rows("local:wiki_texts", root)
    assert {"They dig.\nThey eat.", "They fly.", "Too short. Yes."} < set(texts) and len(texts) == 4
    assert sorted(local_rows("wiki_sentences", root)) == sorted(f"fact {i}" for i in range(11))
    assert sorted(local_rows("web_sentences", root)) == ["Don't go!", "It works."]


def test_code_is_of_the_environment_without_what_is_held_out(monkeypatch):
    """It needs no data directory, and a slice reads no more files than it takes."""
    monkeypatch.delenv("UNCAUSAL_DATA", raising=False)
    drawn, made = [], []

    def watched(files):
        drawn.extend(file.path for file in files)
        for row in real(files):
            made.append(row)
            yield row

    real = local.code_pairs
    monkeypatch.setattr(local, "code_pairs", watched)
    rows = local_rows("local:code[:60]", seed=1)
    assert len(rows) == len(made) == 60 and rows[0].keys() == {"anchor", "positive"}
    assert len(drawn) > 5000 and not any(path.startswith(("pandas/", "networkx/", "rich/")) for path in drawn)
    assert drawn != sorted(drawn)


def test_order_is_the_seeds(root):
    assert local_rows("wiki_pairs", root, seed=1) == local_rows("wiki_pairs", root, seed=1)
    assert local_rows("wiki_pairs", root, seed=1) != local_rows("wiki_pairs", root, seed=2)


def test_slice_takes_the_first_of_the_order(root):
    assert local_rows("local:wiki_sentences[:4]", root) == local_rows("wiki_sentences", root)[:4]
    assert local_rows("wiki_sentences[:0]", root) == []
    with pytest.raises(DataError, match=r"local:nli\[4\]: no such set"):
        local_rows("local:nli[4]", root)


def test_unknown_set_and_directory_are_told(root, monkeypatch):
    monkeypatch.delenv("UNCAUSAL_DATA", raising=False)
    with pytest.raises(DataError, match="local:nil: no such set; there is local:nli"):
        local_rows("local:nil", root)
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        data_dir()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data_dir(root / "nowhere")
    monkeypatch.setenv("UNCAUSAL_DATA", str(root))
    assert data_dir() == root


@pytest.mark.parametrize("name", TEXTS)
def test_real_texts_are_many(name):
    try:
        texts = local_rows(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(texts) > 5000 and all(isinstance(text, str) and text.strip() for text in texts)
    assert not any("<doc" in text for text in texts)


@pytest.mark.parametrize("name", sorted(SETS.keys() - {"code"}))
def test_real_sets_are_of_one_form(name):
    try:
        root = data_dir()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    rows = local_rows(name, root)
    assert len(rows) > 5000 and len({tuple(row) for row in rows}) == 1
    assert all(isinstance(value, str) and value.strip() for row in rows for value in row.values())
