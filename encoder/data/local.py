"""Training data without internet: pairs and texts of a data directory (`--data-dir` or UNCAUSAL_DATA).

In a recipe a name such as `local:nli` stands for the pairs of one of SETS, or the texts of one of TEXTS, and
`local:nli[:5000]` for 5,000 of them. No pairs hold a sentence of the STS Benchmark's test split, and none are
an evaluation set of the mini suite.
"""

import csv
import gzip
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from uncausal.encoder.data.code import code_pairs
from uncausal.encoder.data.rows import DataError, readable
from uncausal.encoder.data.sources import environment_files
from uncausal.encoder.data.texts import sentences

PREFIX = "local:"
VARIABLE = "UNCAUSAL_DATA"


def data_dir(path: str | Path | None = None) -> Path:
    """Return the data directory: the one given, or that of UNCAUSAL_DATA.

    Raises:
        FileNotFoundError: neither names a folder.
    """
    found = path or os.environ.get(VARIABLE)
    if not found:
        raise FileNotFoundError(f"no data directory: pass --data-dir DIR or set {VARIABLE}")
    if not Path(found).is_dir():
        raise FileNotFoundError(f"no such data directory: {found}")
    return Path(found)


def check_local(name: str, root: str | Path | None = None) -> Path:
    """Return the data directory of one of SETS or TEXTS, or raise as `local_rows` and `data_dir` do.

    Args:
        name: one of SETS or TEXTS, with or without the prefix and a slice.
        root: the data directory; by default that of UNCAUSAL_DATA. "code" needs none.
    """
    name, _ = split_name(name)
    if name not in SETS and name not in TEXTS:
        there = ", ".join(PREFIX + known for known in (*SETS, *TEXTS))
        raise DataError(f"{PREFIX}{name}: no such set; there is {there}")
    if name == "wordnet":
        wordnet_dir()
    return Path() if name == "code" else data_dir(root)


def local_rows(name: str, root: str | Path | None = None, seed: int = 0) -> list[Any]:
    """Return the rows of one of SETS or the texts of one of TEXTS, in a random order.

    Args:
        name, root: as in `check_local`.
        seed: of the order, and of what a set draws.

    Raises:
        DataError: no set of that name; the message lists them.
        FileNotFoundError: no data directory.
    """
    folder, (name, count) = check_local(name, root), split_name(name)
    draw = random.Random(f"{name}-{seed}")
    found: Iterator[Any] = SETS[name](folder, draw) if name in SETS else TEXTS[name](folder)
    with readable(f"{PREFIX}{name} in {folder}"):
        rows = list(islice(found, count) if name == "code" else found)
    draw.shuffle(rows)
    return rows[:count]


def split_name(name: str) -> tuple[str, int | None]:
    """Return what a name is of, and how many rows its slice takes: "local:nli[:9]" is ("nli", 9)."""
    found = re.fullmatch(r"(.*?)(?:\[:(\d+)\])?", name.removeprefix(PREFIX))
    assert found
    return found[1], None if found[2] is None else int(found[2])


def nli(root: Path, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Premise, entailed and contradicted hypothesis of SNLI, MultiNLI and QNLI (supervised SimCSE)."""
    held_out = set(map(words_of, _sts_sentences(root, "test")))
    for file in ("snli_dev", "mnli_dev", "qnli_dev"):
        for anchor, positive, negative in _tsv(root / "nli_triples" / f"{file}_triples.tsv.gz"):
            if held_out.isdisjoint(map(words_of, (anchor, positive, negative))):
                yield {"anchor": anchor, "positive": positive, "negative": negative}


def wiki_pairs(root: Path, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Two sentences of one Wikipedia article, at most four pairs an article."""
    articles: dict[str, list[str]] = defaultdict(list)
    for file in sorted((root / "wiki_sentences").glob("train-*.tsv.gz")):
        for article, sentence in _tsv(file):
            articles[article].append(sentence)
    for found in articles.values():
        draw.shuffle(found)
        for first, second in zip(found[0:8:2], found[1:8:2], strict=False):
            yield {"anchor": first, "positive": second}


def wiki_crops(root: Path, draw: random.Random) -> Iterator[dict[str, Any]]:
    """A sentence of a Wikipedia paragraph against the rest of it (inverse cloze, arXiv 1906.00300)."""
    for file in sorted((root / "wiki_paragraphs").glob("train-*.tsv.gz")):
        for _, paragraph in _tsv(file):
            parts = list(sentences(paragraph))
            usable = [i for i, part in enumerate(parts) if len(part.split()) >= 5]
            if len(parts) >= 3 and usable:
                chosen = draw.choice(usable)
                rest = " ".join(parts[:chosen] + parts[chosen + 1 :])
                yield {"anchor": parts[chosen], "positive": rest}


def medquad(root: Path, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Question, its answer, and the answer that the same document gives to a question of another type."""
    for source in ("1_cancergov", "2_gard", "3_ghr", "4_mplus_health_topics"):
        documents: dict[str, list[dict[str, str]]] = defaultdict(list)
        with gzip.open(root / "medquad" / f"{source}.jsonl.gz", "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                documents[row["doc"]].append(row)
        for rows in documents.values():
            for row in rows:
                others = [r["answer"] for r in rows if r["qtype"] != row["qtype"]]
                others = [answer for answer in others if answer.strip() not in ("", row["answer"].strip())]
                if others and row["answer"].strip():
                    negative = draw.choice(others)
                    yield {"anchor": row["question"], "positive": row["answer"], "negative": negative}


def clinc(root: Path, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Utterances of CLINC150's train split with their intent, as (text, label)."""
    with gzip.open(root / "clinc150" / "data_full.json.gz", "rt", encoding="utf-8") as file:
        for text, label in json.load(file)["train"]:
            yield {"text": text, "label": label}


def code(root: Path, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Docstring and function of the environment's packages, without those that evaluate code search.

    The files come in a random order: reading them all takes minutes, and a slice stops early.
    """
    files = list(environment_files())
    for row in code_pairs(draw.sample(files, len(files))):
        yield {"anchor": row["anchor"], "positive": row["positive"]}


def wiki_texts(root: Path) -> Iterator[str]:
    """Running text: paragraphs of Wikipedia, and whole articles."""
    for file in sorted((root / "wiki_paragraphs").glob("train-*.tsv.gz")):
        for _, paragraph in _tsv(file):
            yield paragraph
    for file in sorted((root / "wiki_articles").glob("*.txt.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            article: list[str] = []
            for line in map(str.strip, lines):
                if line == "</doc>":
                    yield "\n".join(article[1:])  # the first line is the title
                article = [] if line.startswith("<doc ") else [*article, line] if line else article


def wiki_sentences(root: Path) -> Iterator[str]:
    """Sentences of Wikipedia."""
    for file in sorted((root / "wiki_sentences").glob("train-*.tsv.gz")):
        for _, sentence in _tsv(file):
            yield sentence


def web_sentences(root: Path) -> Iterator[str]:
    """Sentences of blogs, newsgroups, emails, reviews and answers: the English Web Treebank's train split."""
    with gzip.open(root / "ud_english_ewt" / "en_ewt-ud-train.conllu.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("# text = "):
                yield line.removeprefix("# text = ").strip()


def wordnet(root: Path) -> Iterator[str]:
    """Words of every field: WordNet's synonyms, definition and examples, as "glow, gleam: a steady light".

    The database is WNSEARCHDIR, WordNet's own variable, or that of Debian's package wordnet-base. Definitions
    that STS tasks ask about (OnWN, FNWN) are left out.
    """
    held_out = {words_of(field) for file in (root / "semeval_sts").rglob("*.tsv") for field in _fields(file)}
    for kind in ("noun", "verb", "adj", "adv"):
        with open(wordnet_dir() / f"data.{kind}", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("  "):  # the licence
                    continue
                record, gloss = line.rstrip().split(" | ", 1)
                fields = record.split()
                names = [re.sub(r"\(\w+\)$", "", name) for name in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
                definition = gloss.split('; "')[0]
                if held_out.isdisjoint(map(words_of, (gloss, definition, *definition.split(";")))):
                    yield f"{', '.join(names).replace('_', ' ')}: {gloss}"


def wordnet_dir() -> Path:
    """Return the folder of WordNet's database.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(os.environ.get("WNSEARCHDIR", "/usr/share/wordnet"))
    if not (folder / "data.noun").is_file():
        raise FileNotFoundError(
            f"no WordNet in {folder}: install it (apt install wordnet-base), "
            "or set WNSEARCHDIR to the folder that holds data.noun"
        )
    return folder


SETS: dict[str, Callable[[Path, random.Random], Iterator[dict[str, Any]]]] = {
    "nli": nli,
    "wiki_pairs": wiki_pairs,
    "wiki_crops": wiki_crops,
    "medquad": medquad,
    "clinc": clinc,
    "code": code,
}
TEXTS: dict[str, Callable[[Path], Iterator[str]]] = {
    "wiki_texts": wiki_texts,
    "wiki_sentences": wiki_sentences,
    "web_sentences": web_sentences,
    "wordnet": wordnet,
}


def _tsv(path: Path) -> Iterator[list[str]]:
    """The rows of a gzipped TSV file whose fields all hold text."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            fields = [field.strip() for field in row]
            if fields and all(fields):
                yield fields


def _fields(path: Path) -> Iterator[str]:
    return (field for line in path.read_text(encoding="utf-8").splitlines() for field in line.split("\t"))


def words_of(text: str) -> str:
    """Words alone, in lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _sts_sentences(root: Path, split: str) -> set[str]:
    with open(root / "stsbenchmark" / f"sts-{split}.csv", encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {sentence.strip() for row in rows for sentence in row[5:7]}
