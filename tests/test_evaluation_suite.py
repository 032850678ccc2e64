"""The mini suite on its data: what is in it, and that its splits share nothing."""

import csv
import gzip
import json
import os
from pathlib import Path

import pytest

from uncausal.encoder.data.local import local_rows, words_of
from uncausal.encoder.data.rows import DataError
from uncausal.encoder.evaluation.suite import all_texts, choose_tasks, mini_suite
from uncausal.encoder.evaluation.tasks import Classification, Retrieval

FAMILIES = ["sts", "xquad", "scifact", "reranking", "banking77", "polarity", "clustering", "pair"]


@pytest.fixture(scope="module")
def data_dir():
    data_dir = Path(os.environ.get("UNCAUSAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not data_dir.is_dir():
        pytest.skip("UNCAUSAL_DATA names no data folder")
    return data_dir


@pytest.fixture(scope="module")
def suites(data_dir):
    return {split: mini_suite(data_dir, split) for split in ("dev", "test")}


@pytest.mark.parametrize("split, least, most", [("test", 11_000, 12_000), ("dev", 9_500, 11_500)])
def test_suite_has_eight_families(suites, split, least, most):
    assert list(dict.fromkeys(task.family for task in suites[split])) == FAMILIES
    assert least < len(all_texts(suites[split])) < most
    assert all(task.instruction for task in suites[split])


def test_splits_share_no_text(suites):
    assert not all_texts(suites["dev"]) & all_texts(suites["test"])


def test_no_pair_is_trained_on(suites, data_dir):
    """nli_triples has SNLI's dev set tokenised, so that equal texts do not look equal."""
    rows = list(local_rows("local:nli", data_dir))
    known = {
        (words_of(row["anchor"]), words_of(row[name])) for row in rows for name in ("positive", "negative")
    }
    for split, least in (("dev", 400), ("test", 500)):
        [pairs] = [task.pairs for task in suites[split] if task.name == "snli"]
        assert len(pairs) >= least
        assert known.isdisjoint((words_of(pair.first), words_of(pair.second)) for pair in pairs)


def test_sts_benchmark_is_whole(suites):
    assert len(suites["test"][0].parts[""]) == 1379
    assert 1350 < len(suites["dev"][0].parts[""]) <= 1500


@pytest.mark.parametrize("split", ["dev", "test"])
def test_every_label_has_its_shots(suites, split):
    for task in suites[split]:
        if isinstance(task, Classification):
            labels = [label for _, label in task.train]
            assert set(labels) == {label for _, label in task.test}
            assert min(map(labels.count, set(labels))) >= task.shots


def test_retrieval_has_the_documents_of_its_test(suites):
    sizes = {t.name: (len(t.queries), len(t.documents)) for t in suites["test"] if isinstance(t, Retrieval)}
    assert sizes["scifact"] == (300, 1000)
    assert sizes["xquad"][1] == 160


def test_what_cannot_be_read_is_told_by_its_set(tmp_path):
    """Regression: an unfinished download was an EOFError, other columns a KeyError, without a file."""
    (tmp_path / "banking77").mkdir()
    for part in ("train", "test"):
        (tmp_path / "banking77" / f"{part}.csv").write_text("text,label\nhello,1\n")
    with pytest.raises(DataError, match=r"the set of banking77: cannot be read \(KeyError: 'category'\)"):
        choose_tasks(tmp_path, "test", ["banking77"])
    with pytest.raises(FileNotFoundError, match="rt-polarity"):  # of this one alone
        choose_tasks(tmp_path, "test", ["polarity"])
    (tmp_path / "sentence_polarity").mkdir()
    whole = gzip.compress(b"a text\n" * 99)
    for label in ("neg", "pos"):
        (tmp_path / "sentence_polarity" / f"rt-polarity.{label}.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"the set of polarity: cannot be read \(EOFError"):
        choose_tasks(tmp_path, "test", ["polarity"])


def test_choose_tasks_by_name(data_dir):
    chosen = choose_tasks(data_dir, names=["snli", "scifact-full"])
    assert [task.name for task in chosen] == ["snli", "scifact-full"]
    assert (len(chosen[1].queries), len(chosen[1].documents)) == (300, 5183)
    with pytest.raises(ValueError, match="no task 'sst2' in the dev split: there are stsbenchmark, "):
        choose_tasks(data_dir, "dev", ["sst2"])


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere'.*UNCAUSAL_DATA"):
        mini_suite(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="stsbenchmark"):
        mini_suite(tmp_path)
    with pytest.raises(ValueError, match="dev and test"):
        mini_suite(tmp_path, "train")


def test_each_split_is_drawn_from_its_published_one(suites, data_dir):
    """Regression of a kind: dev drawn from what is left of a published test set shares no text with test."""
    clinc = json.loads(gzip.decompress((data_dir / "clinc150" / "data_full.json.gz").read_bytes()))
    with open(data_dir / "banking77" / "test.csv", encoding="utf8", newline="") as file:
        banking_test = {row["text"] for row in csv.DictReader(file)}
    for split, published in (("dev", "val"), ("test", "test")):
        tasks = {task.name: task for task in suites[split]}
        assert set(tasks["clinc150"].documents) <= {text for text, _ in clinc[published]}
        snli = gzip.decompress((data_dir / "snli_dev_test" / f"snli_{split}.tsv.gz").read_bytes()).decode()
        lines = {tuple(field.strip() for field in line.split("\t")) for line in snli.splitlines()}
        labels = {1: "entailment", 0: "contradiction"}
        assert all((labels[p.score], p.first, p.second) in lines for p in tasks["snli"].pairs)
        qrels = data_dir / "scifact" / "qrels" / f"{'train' if split == 'dev' else 'test'}.tsv"
        judged = {line.split("\t")[0] for line in qrels.read_text().splitlines()}
        assert tasks["scifact"].queries.keys() <= judged
        assert all((text in banking_test) == (split == "test") for text, _ in tasks["banking77"].test)
        assert not banking_test & {text for text, _ in tasks["banking77"].train}
