"""Commands that make training data: pairs, of source or prose; mine, hard negatives for pairs."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from uncausal.encoder.cli.options import Json, Loading, check_writable, report
from uncausal.encoder.data.code import PairKind

PathsAndOutput = Annotated[tuple[str, ...], arg(metavar="[PATH ...] OUT.jsonl")]


def code(
    path: Positional[PathsAndOutput],
    /,
    *,
    environment: bool = False,
    exclude: tuple[str, ...] = (),
    kinds: tuple[PairKind, ...] = ("function",),
    min_words: int = 3,
    min_lines: int = 3,
    as_json: Json = False,
) -> None:
    """Make pairs of Python source: what a docstring says, and the code that does it.

    Args:
        path: folders, .py files, wheels or zip files; the last is the .jsonl file to write.
        environment: read the standard library and every installed package too.
        exclude: packages left out of the environment, beside those that code search is evaluated on.
        kinds: what is paired: a function, class or module with its docstring, a signature with the body, a
            comment with the lines below, a commit's subject with its diff (of PATHs that are repositories).
        min_words: leave out a text with fewer words.
        min_lines: leave out code with fewer lines.
    """
    if not path or not (path[1:] or environment):
        raise ValueError("give PATH ... OUT.jsonl, or --environment and OUT.jsonl")
    *paths, output = path
    if exclude and not environment:
        raise ValueError("--exclude is for --environment: name no PATH that is to be left out")
    if "commit" in kinds and not paths:
        raise ValueError("--kinds commit reads repositories: name them as PATH")
    check_rows_file(output)
    from uncausal.encoder.data.code import code_pairs, commit_pairs
    from uncausal.encoder.data.duplicates import NearDuplicates
    from uncausal.encoder.data.sources import HELD_OUT, environment_files, source_files

    skipped: Counter[str] = Counter()
    known = NearDuplicates()

    def rows() -> Iterator[dict[str, Any]]:
        sources = [source_files(one, skipped) for one in paths]
        if environment:
            sources.append(environment_files({*HELD_OUT, *exclude}, skipped))
        files = (file for source in sources for file in source)
        limits = {"min_words": min_words, "min_lines": min_lines}
        if set(kinds) != {"commit"}:
            yield from code_pairs(files, kinds, **limits, known=known, skipped=skipped)
        for repository in paths if "commit" in kinds else ():
            yield from commit_pairs(repository, min_words=min_words, known=known)

    write(rows(), output, as_json, skipped)


def prose(
    input: Positional[str],
    output: Positional[str],
    /,
    *,
    kinds: tuple[Literal["title", "cloze"], ...] = ("title", "cloze"),
    column: str = "text",
    title_column: str = "title",
    min_words: int = 20,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Make pairs of running text: a title and a paragraph, a sentence and the rest of its paragraph.

    Args:
        input: text (a document a line), JSONL, CSV, TSV or Parquet file; - is stdin.
        output: .jsonl file to write.
        kinds: what is paired.
        column: field that holds the text; blank lines part its paragraphs, or else line ends.
        title_column: field that holds the title; a document without one makes no pair of it.
        min_words: leave out a paragraph with fewer words.
        seed: of what is drawn.
    """
    check_rows_file(output)
    from uncausal.encoder.data.prose import prose_pairs
    from uncausal.encoder.data.rows import read_rows, text_field

    documents = (
        ("" if row.get(title_column) is None else text_field(row, title_column, where),)
        + (text_field(row, column, where),)
        for where, row in read_rows(input)
    )
    write(prose_pairs(documents, kinds, min_words=min_words, seed=seed), output, as_json)


PAIRS = {"code": code, "prose": prose}


def mine(
    teacher: Positional[str],
    data: Positional[str],
    output: Positional[str],
    /,
    *,
    corpus: str | None = None,
    column: str = "text",
    min_score: float | None = None,
    num_negatives: int = 4,
    top_k: int = 10,
    rank_shift: int = 0,
    relative_margin: float | None = 0.05,
    absolute_margin: float | None = None,
    max_score: float | None = None,
    sampling: Literal["random", "top"] = "random",
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    seed: int = 42,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Find hard negatives for pairs, without those that look like positives.

    Args:
        teacher: bm25, an encoder folder, or any model of sentence-transformers.
        data: file of pairs, or a dataset's name; negatives in it are left out.
        output: .jsonl file to write.
        corpus: file of texts to find negatives in, beside the positives.
        column: field of the corpus that holds the text.
        min_score: of scored pairs, take those whose score is at least this.
        num_negatives: negatives a row; rows for which fewer are found are left out.
        top_k: candidates considered, best first, of those that may be negatives.
        rank_shift: so many of them skipped at the top.
        relative_margin: a negative scores at most (1 - this) of the positive.
        absolute_margin: a negative scores at least this much below the positive.
        max_score: a negative scores at most this.
        sampling: random draws from the candidates, top takes the best.
        query_prompt: put before the queries, for the teacher alone.
        document_prompt: put before the documents, for the teacher alone.
        seed: of the draw.
    """
    check_rows_file(output)
    from datasets import DatasetDict

    from uncausal.encoder.data.pairs import read_pairs
    from uncausal.encoder.data.texts import read_texts
    from uncausal.encoder.loading import load_model
    from uncausal.encoder.training.mining import Mining

    if teacher.lower() == "bm25" and (query_prompt or document_prompt):
        raise ValueError("--query-prompt and --document-prompt are for a model, and bm25 knows no prompts")
    mining = Mining(
        num_negatives=num_negatives,
        top_k=top_k,
        rank_shift=rank_shift,
        relative_margin=relative_margin,
        absolute_margin=absolute_margin,
        max_score=max_score,
        sampling=sampling,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        seed=seed,
    )
    found = read_pairs(data, min_score=min_score, negatives=0)
    documents = [] if corpus is None else list(read_texts(corpus, column))
    by_bm25 = teacher.lower() == "bm25"
    model: Any = "bm25" if by_bm25 else load_model(teacher, **loading.options(teacher))
    sets = found if isinstance(found, DatasetDict) else {None: found}
    mined: dict[Any, Any] = {task: mining.mine(part, model, documents) for task, part in sets.items()}
    rows = (row if task is None else {"task": task, **row} for task, part in mined.items() for row in part)
    lost = sum(map(len, sets.values())) - sum(map(len, mined.values()))
    write(rows, output, as_json, Counter({"with too few negatives": lost} if lost else {}))


def check_rows_file(output: str) -> None:
    """Raise before any work is done if rows could not be written there."""
    if Path(output).suffix != ".jsonl":
        raise ValueError(f"{output}: rows are written as .jsonl")
    check_writable(Path(output))


def write(
    rows: Iterable[dict[str, Any]], output: str, as_json: bool, skipped: Counter[str] | None = None
) -> None:
    """Write the rows under a bar, and report their number and what was left out."""
    from tqdm import tqdm

    from uncausal.encoder.data.rows import write_rows

    bar = tqdm(rows, desc="Pairs", unit="pair", disable=not sys.stderr.isatty())
    count, skipped = write_rows(bar, output), skipped or Counter()
    left_out: Any = dict(skipped)
    if not as_json:
        left_out = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common()) or "none"
    report({"saved": output, "pairs": count, "left_out": left_out}, as_json)
