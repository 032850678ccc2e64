"""The mini suite: eight families of tasks on small public sets, in a development and a test split.

No text of one split is in the other. Long texts are cut to a number of words, so that every model reads the
same and full-depth SmolLM2 needs minutes. What each family uses:

| family | set | test | dev |
|---|---|---|---|
| sts | stsbenchmark | test | dev |
| sts | semeval_sts, the parts free of STS-B | 80 pairs a part | 80 other pairs a part |
| xquad | xquad_en, question to paragraph | articles 1, 2, 4, 5, 7, 8 ... | articles 3, 6, 9 ... |
| scifact | scifact, claim to abstract of 64 words | test claims, mini_doc_ids | train claims, 500 others |
| reranking | medquad NIDDK and NINDS, 48 words | documents 1, 4, 7 ... | documents 2, 5, 8 ... |
| banking77 | banking77, 8 shots of 12 a label | 8 of test a label | 8 of train a label |
| polarity | sentence_polarity, 16 shots of 80 a label | 300 a label | 150 a label |
| clustering | clinc150, by intent | 8 of test an intent | 8 of val an intent |
| pair | snli_dev_test, entailment or contradiction | 500 pairs of test | 500 pairs of dev |

Reranking orders the answers of one document. The shots of both splits come from train sets (of
sentence_polarity, which has none, from the rest), and are disjoint too.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from uncausal.encoder.data.local import words_of
from uncausal.encoder.data.rows import readable
from uncausal.encoder.evaluation.sts import ScoredPair, read_sts
from uncausal.encoder.evaluation.tasks import (
    STS,
    Classification,
    Clustering,
    PairClassification,
    Reranking,
    Retrieval,
    Task,
)

Split = Literal["dev", "test"]
Family = Callable[[Path, Split, set[str]], list["Task"]]
Row = TypeVar("Row")

SEMEVAL_PARTS = (
    *("2012/OnWN", "2012/SMTeuroparl", "2012/SMTnews", "2013/FNWN"),
    *("2013/OnWN", "2014/OnWN", "2014/tweet-news"),
)


def mini_suite(data_dir: str | Path, split: Split = "test") -> list[Task]:
    """Return the tasks of the mini suite.

    Args:
        data_dir: folder with a folder for each set (see this module's table).
        split: "dev" to choose by, "test" to report.

    Raises:
        FileNotFoundError: a set is missing; the message names the file.
        ValueError: unknown split.
    """
    if split not in ("dev", "test"):
        raise ValueError(f"the splits are dev and test, not {split!r}")
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"no folder {str(data_dir)!r}: --data-dir (or UNCAUSAL_DATA) names the data")
    test = [task for read in FAMILIES.values() for task in _read(read, data_dir, "test", set())]
    if split == "test":
        return test
    taken = all_texts(test)
    return [task for read in FAMILIES.values() for task in _read(read, data_dir, "dev", taken)]


def _read(read: Family, data_dir: Path, split: Split, taken: set[str]) -> list[Task]:
    with readable(f"{data_dir}: the set of {read.__name__.strip('_')}"):
        return read(data_dir, split, taken)


def choose_tasks(data_dir: str | Path, split: Split = "test", names: Sequence[str] = ()) -> list[Task]:
    """Return the tasks of these names, or all of the mini suite; "scifact-full" is `scifact_full`.

    Raises:
        ValueError: no task of that name; the message lists those there are.
    """
    asked = [read for of_set, read in FAMILIES.items() if {*of_set} & {*names}]
    if split == "test" and asked and {*names} <= {"scifact-full"}.union(*FAMILIES):
        # the other sets need not be there; for dev they must, as no text of it may be in any of test
        there = [task for read in asked for task in _read(read, Path(data_dir), "test", set())]
    else:
        there = mini_suite(data_dir, split)
    tasks = {task.name: task for task in there}
    if split == "test" and "scifact-full" in names:
        tasks["scifact-full"] = scifact_full(data_dir)
    unknown = [name for name in names if name not in tasks]
    if unknown:
        raise ValueError(f"no task {unknown[0]!r} in the {split} split: there are {', '.join(tasks)}")
    return [tasks[name] for name in names or tasks]


def all_texts(tasks: Iterable[Task]) -> set[str]:
    """Return every text of the tasks: what training must not see, or one split of another."""
    return {text for task in tasks for texts in task.texts().values() for text in texts}


def read_semeval(folder: Path, part: str) -> list[ScoredPair]:
    """Read the scored pairs of a part of SemEval STS, "2012/OnWN"; pairs that nobody scored are left out."""
    pairs = []
    with open(folder / f"{part}.test.tsv", encoding="utf8") as file:
        for line in file:
            score, first, second = line.rstrip("\n").split("\t")[:3]
            if score.strip():
                pairs.append(ScoredPair(first, second, float(score)))
    return pairs


def scifact_full(data_dir: str | Path) -> Retrieval:
    """Return BEIR's SciFact, whole and uncut: 300 test claims against 5,183 abstracts."""
    documents, queries, relevant = _scifact(Path(data_dir), "test")
    return Retrieval(
        name="scifact-full", family="scifact", queries=queries, documents=documents, relevant=relevant
    )


def _sts(data_dir: Path, split: Split, taken: set[str]) -> list[Task]:
    def fresh(pairs: list[ScoredPair]) -> list[ScoredPair]:
        return [pair for pair in pairs if not taken & set(pair[:2])]

    benchmark = fresh(read_sts(data_dir / "stsbenchmark", split))
    parts = {part: _sample(fresh(read_semeval(data_dir / "semeval_sts", part)), 80) for part in SEMEVAL_PARTS}
    instruction = "Retrieve semantically similar text"
    return [
        STS(name="stsbenchmark", family="sts", parts={"": benchmark}, instruction=instruction),
        STS(name="semeval", family="sts", parts=parts, instruction=instruction),
    ]


def _xquad(data_dir: Path, split: Split, taken: set[str]) -> list[Task]:
    articles = json.loads((data_dir / "xquad_en" / "xquad.en.json").read_text(encoding="utf8"))["data"]
    documents, queries, relevant = {}, {}, {}
    for number, article in enumerate(articles):
        if (number % 3 == 2) != (split == "dev"):
            continue
        for paragraph in article["paragraphs"]:
            document = f"{number}.{len(documents)}"
            documents[document] = paragraph["context"]
            for question in paragraph["qas"]:
                if question["question"] not in taken:
                    queries[question["id"]] = question["question"]
                    relevant[question["id"]] = {document}
    return [
        Retrieval(
            name="xquad",
            family="xquad",
            queries=queries,
            documents=documents,
            relevant=relevant,
            instruction="Given a question, retrieve passages that answer the question",
        )
    ]


def _scifact(data_dir: Path, split: str) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
    folder = data_dir / "scifact"
    rows = _json_lines(folder / "corpus.jsonl.gz")
    documents = {row["_id"]: f"{row['title']} {row['text']}" for row in rows}
    relevant = defaultdict(set)
    with open(folder / "qrels" / f"{split}.tsv", encoding="utf8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            relevant[row["query-id"]].add(row["corpus-id"])
    queries = {r["_id"]: r["text"] for r in _json_lines(folder / "queries.jsonl.gz") if r["_id"] in relevant}
    return documents, queries, dict(relevant)


def _scifact_mini(data_dir: Path, split: Split, taken: set[str]) -> list[Task]:
    documents, queries, relevant = _scifact(data_dir, "test" if split == "test" else "train")
    kept = set((data_dir / "scifact" / "mini_doc_ids.txt").read_text().split())
    if split == "dev":
        queries = {id: text for id, text in queries.items() if not relevant[id] & kept and text not in taken}
        judged = {document for id in queries for document in relevant[id]}
        kept = judged | set(_sample([id for id in documents if id not in judged | kept], 500 - len(judged)))
    return [
        Retrieval(
            name="scifact",
            family="scifact",
            queries=queries,
            documents={id: _cut(text, 64) for id, text in documents.items() if id in kept},
            relevant=relevant,
            instruction="Given a scientific claim, retrieve documents that support or refute the claim",
        )
    ]


def _medquad(data_dir: Path, split: Split, taken: set[str]) -> list[Task]:
    samples = []
    for name in ("5_niddk", "6_ninds"):
        asked: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for row in _json_lines(data_dir / "medquad" / f"{name}.jsonl.gz"):
            asked[row["doc"]][row["question"]].append(_cut(row["answer"], 48))
        for document in sorted(asked)[split == "dev" :: 3]:
            for question, answers in asked[document].items():
                pool = dict.fromkeys(text for texts in asked[document].values() for text in texts)
                negatives = [text for text in pool if text not in answers]
                if negatives and not taken & {question, *answers, *negatives}:
                    samples.append({"query": question, "positive": answers, "negative": negatives})
    return [
        Reranking(
            name="medquad",
            family="reranking",
            samples=samples,
            instruction="Given a medical question, retrieve passages that answer the question",
        )
    ]


def _banking77(data_dir: Path, split: Split, taken: set[str]) -> list[Task]:
    labelled = {}
    for part in ("train", "test"):
        with open(data_dir / "banking77" / f"{part}.csv", encoding="utf8", newline="") as file:
            labelled[part] = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    return [
        Classification(
            name="banking77",
            family="banking77",
            instruction="Given a online banking query, find the corresponding intents",
            **_shots_and_test(
                labelled["train"], labelled["test" if split == "test" else "train"], 12, 8, taken
            ),
        )
    ]


def _polarity(data_dir: Path, split: Split, taken: set[str]) -> list[Task]:
    rows = []
    for label in ("neg", "pos"):
        path = data_dir / "sentence_polarity" / f"rt-polarity.{label}.gz"
        with gzip.open(path, "rt", encoding="latin-1") as file:
            rows += [(line.strip(), label) for line in file]
    return [
        Classification(
            name="polarity",
            family="polarity",
            shots=16,
            instruction="Classify the sentiment expressed in the given movie review text",
            **_shots_and_test(rows, rows, 80, 300 if split == "test" else 150, taken),
        )
    ]


def _clinc150(data_dir: Path, split: Split, taken: set[str]) -> list[Task]:
    with gzip.open(data_dir / "clinc150" / "data_full.json.gz", "rt", encoding="utf8") as file:
        rows = [tuple(row) for row in json.load(file)["test" if split == "test" else "val"]]
    chosen = dict(_per_label(rows, 8, taken))
    return [
        Clustering(
            name="clinc150",
            family="clustering",
            documents=list(chosen),
            labels=list(chosen.values()),
            instruction="Identify the intent of the given utterance",
        )
    ]


def _snli(data_dir: Path, split: Split, taken: set[str]) -> list[Task]:
    pairs, known = [], set()
    triples = data_dir / "nli_triples" / "snli_dev_triples.tsv.gz"
    if split == "dev" and triples.exists():  # recipes train on them, tokenised another way
        with gzip.open(triples, "rt", encoding="utf8") as file:
            known = {words_of(line.split("\t")[0]) for line in file}
    with gzip.open(data_dir / "snli_dev_test" / f"snli_{split}.tsv.gz", "rt", encoding="utf8") as file:
        for line in file:
            label, premise, hypothesis = (field.strip() for field in line.split("\t"))
            if label not in ("entailment", "contradiction") or words_of(premise) in known:
                continue
            if not taken & {premise, hypothesis}:
                pairs.append(ScoredPair(premise, hypothesis, float(label == "entailment")))
    return [
        PairClassification(
            name="snli",
            family="pair",
            pairs=_sample(pairs, 500),
            instruction="Given a premise, retrieve a hypothesis that is entailed by the premise",
        )
    ]


FAMILIES: dict[tuple[str, ...], Family] = {  # by the names of their tasks
    ("stsbenchmark", "semeval"): _sts,
    ("xquad",): _xquad,
    ("scifact",): _scifact_mini,
    ("medquad",): _medquad,
    ("banking77",): _banking77,
    ("polarity",): _polarity,
    ("clinc150",): _clinc150,
    ("snli",): _snli,
}


def _shots_and_test(
    train: list[tuple[str, str]], test: list[tuple[str, str]], shots: int, tests: int, taken: set[str]
) -> dict[str, Any]:
    """Choose `tests` rows a label, then `shots` others to draw from, none with a text that is taken."""
    chosen = _per_label(test, tests, taken)
    return {"train": _per_label(train, shots, taken | {text for text, _ in chosen}), "test": chosen}


def _per_label(rows: Iterable[tuple[str, str]], count: int, taken: set[str]) -> list[tuple[str, str]]:
    by_label = defaultdict(dict)
    for text, label in rows:
        if text not in taken:
            by_label[label][text] = label
    return [row for label in sorted(by_label) for row in _sample(list(by_label[label].items()), count)]


def _sample(rows: list[Row], count: int) -> list[Row]:
    return random.Random(13).sample(rows, min(count, len(rows)))


def _cut(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf8") as file:
        yield from map(json.loads, file)
