"""Commands that say how good an encoder is: eval."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from uncausal.encoder.cli.options import Json, Loading, check_writable, report, require

if TYPE_CHECKING:
    from uncausal.encoder.evaluation.compare import Evaluation

Split = Literal["train", "dev", "test"]


def evaluate(
    model: Positional[Annotated[tuple[str, ...], arg(metavar="MODEL [MODEL ...]")]],
    /,
    *,
    suite: Literal["mini"] | None = None,
    tasks: tuple[str, ...] = (),
    mteb: tuple[str, ...] = (),
    code: bool = False,
    dimensions: tuple[int, ...] = (),
    words: bool = False,
    shift: bool = False,
    limit: int | None = None,
    cache_dir: Path | None = None,
    split: Split | None = None,
    data_dir: Path | None = None,
    instruct: bool = False,
    plot: Path | None = None,
    out: Annotated[Path | None, arg(metavar="FILE.json")] = None,
    loading: Loading = Loading(),
    as_json: Json = False,
) -> None:
    """Score models on a suite of tasks, or one on an STS set: eval MODEL STS_FILE.

    Args:
        model: encoder folders, or anything `convert` takes; of several, every two are compared. Without
            --suite, --mteb or --words: one model, and an STS Benchmark file or the folder of sts-SPLIT.csv.
        suite: the mini suite, eight families of tasks on the sets in --data-dir, with bootstrap intervals.
        tasks: only these tasks of the suite.
        mteb: tasks of MTEB by name, or of the suite where there is a data directory, run by MTEB.
        code: search functions of installed packages, which no recipe trains on, by their docstrings, beside
            BM25; needs no data.
        dimensions: with --code: keep the first so many numbers of every vector, as float32 and as int8.
        words: part of speech and entities, by a linear probe on the token states.
        shift: with --words: take a token's state from the position before it, as MNTP predicts it.
        limit: with --words: sentences that the probe learns on; 4000 by default.
        cache_dir: with --words: folder that keeps the token states.
        split: dev to choose by, which is the default, or test to report; of MTEB's own tasks by default all
            that MTEB scores.
        data_dir: folder with a folder for each set; by default the environment's UNCAUSAL_DATA.
        instruct: put each task's instruction before its queries.
        plot: draw scores and intervals; the suffix is the format.
        out: file to write the scores to, as JSON.
    """
    data_dir = data_dir or (Path(os.environ["UNCAUSAL_DATA"]) if os.environ.get("UNCAUSAL_DATA") else None)
    chosen = [
        name for name, given in (("suite", suite), ("mteb", mteb), ("code", code), ("words", words)) if given
    ]
    if len(chosen) > 1:
        raise ValueError(f"give one of {' and '.join('--' + name for name in chosen)} at a time")
    kind = chosen[0] if chosen else "STS file"
    refuse_unused(
        kind,
        {
            "tasks": (tasks, ["suite"]),
            "instruct": (instruct, ["suite", "mteb"]),
            "dimensions": (dimensions, ["code"]),
            "shift": (shift, ["words"]),
            "limit": (limit, ["words"]),
            "cache-dir": (cache_dir, ["words"]),
            "plot": (plot, ["suite", "words"]),
            "out": (out, ["suite", "words", "code"]),
        },
    )
    if kind == "STS file":
        if len(model) != 2:
            raise ValueError("uncausal eval takes MODEL STS_FILE, or MODEL ... with --suite mini")
        evaluate_sts_file(model[0], Path(model[1]), split, loading, as_json)
        return
    if not model:
        raise ValueError("name a model, and others to compare it with")
    from uncausal.encoder.loading import check_model

    for one in model:  # not found out once those before it have been scored
        check_model(one)
    for path in (plot, out):
        if path is not None:
            check_writable(path)
    if plot is not None:
        from uncausal.encoder.evaluation.report import check_format

        check_format(plot)
    if kind == "mteb":
        evaluate_by_mteb(model, mteb, split, data_dir, instruct, loading, as_json)
        return
    split = split or "dev"
    if kind == "code":
        evaluate_code(model, split, dimensions, out, loading, as_json)
        return
    if data_dir is None:
        raise ValueError("the data are missing: --data-dir (or UNCAUSAL_DATA) names their folder")
    if split == "train":
        raise ValueError("the splits are dev and test, not 'train'")
    if kind == "words":
        from uncausal.encoder.evaluation.words import evaluate_words, word_tasks

        of_words = word_tasks(data_dir, split, 4000 if limit is None else limit)
        options = loading.options(*model)
        result = evaluate_words(model, of_words, shift=shift, cache_dir=cache_dir, load_options=options)
    else:
        from uncausal.encoder.evaluation.compare import INSTRUCT, evaluate_models
        from uncausal.encoder.evaluation.suite import choose_tasks

        result = evaluate_models(
            model,
            choose_tasks(data_dir, split, tasks),
            instruct=INSTRUCT if instruct else None,
            load_options=loading.options(*model),
            encode_options={"show_progress_bar": sys.stderr.isatty()},
        )
    show(result, plot, out, as_json)


def refuse_unused(kind: str, options: dict[str, tuple[Any, list[str]]]) -> None:
    """Raise for the first option that was given and means nothing to this kind of evaluation."""
    for name, (given, kinds) in options.items():
        if given not in (None, False, ()) and kind not in kinds:
            raise ValueError(f"--{name} goes with {' or '.join('--' + one for one in kinds)}")


def evaluate_sts_file(model: str, data: Path, split: Split | None, loading: Loading, as_json: bool) -> None:
    """Print the Spearman correlation on an STS set, and tokens a second."""
    from uncausal.encoder.evaluation.sts import evaluate_sts, read_sts

    try:
        pairs = read_sts(data, split or ("dev" if data.is_dir() else None))
    except UnicodeDecodeError as error:
        raise ValueError(f"{data}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    if len(pairs) < 2:
        raise ValueError(f"{data}: a correlation needs at least 2 scored pairs, and there are {len(pairs)}")
    result = evaluate_sts(loading.load(model), pairs, show_progress_bar=sys.stderr.isatty())
    figures = {"spearman": round(result.spearman, 2), "tokens_per_second": round(result.tokens_per_second, 1)}
    report({**figures, "pairs": len(pairs)}, as_json)


def evaluate_code(
    models: tuple[str, ...],
    split: Split,
    dimensions: tuple[int, ...],
    out: Path | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Print MRR@10 of code search for BM25 and every model, at every size of its vectors."""
    from uncausal.encoder.data.sources import HELD_OUT_DEV, HELD_OUT_TEST
    from uncausal.encoder.evaluation.code import bm25_scores, code_search_set, evaluate_sizes, search_metrics
    from uncausal.encoder.files import staged_file
    from uncausal.encoder.loading import load_model

    if split == "train":
        raise ValueError("the splits are dev and test, not 'train'")
    found = code_search_set(HELD_OUT_DEV if split == "dev" else HELD_OUT_TEST)
    rows: list[dict[str, Any]] = [{"model": "BM25", **search_metrics(bm25_scores(found))}]
    options = loading.options(*models)
    for model in models:
        encoder = load_model(model, **options)
        sizes = evaluate_sizes(encoder, found, dimensions=dimensions, show_progress_bar=sys.stderr.isatty())
        rows += [{"model": model, **row} for row in sizes if dimensions or not row["int8"]]
    if out is not None:
        with staged_file(out) as file:
            file.write(json.dumps(rows, indent=2).encode() + b"\n")
    if as_json:
        print(json.dumps(rows))
        return
    width = max(len(row["model"]) for row in rows)
    print(f"{'':{width}}  numbers     bytes  ms a query  MRR@10 (95 %)       recall@10")
    for row in rows:
        size = f"{row['dimension']} {'int8' if row['int8'] else 'fp32'}" if "ms" in row else ""
        cost = f"{row['bytes']:8,}  {row['ms']:10.1f}" if "ms" in row else " " * 20
        score = f"{row['mrr@10']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
        print(f"{row['model']:{width}}  {size:9}{cost}  {score:19} {row['recall@10']:.1f}")


def evaluate_by_mteb(
    models: tuple[str, ...],
    names: tuple[str, ...],
    split: Split | None,
    data_dir: Path | None,
    instruct: bool,
    loading: Loading,
    as_json: bool,
) -> None:
    """Print the main score of MTEB's tasks for every model."""
    require("mteb", "mteb", "--mteb needs a package")
    from uncausal.encoder.evaluation.compare import INSTRUCT
    from uncausal.encoder.evaluation.mteb import evaluate_mteb, find_task, main_scores
    from uncausal.encoder.evaluation.suite import mini_suite
    from uncausal.encoder.loading import load_model

    own, unknown = [], {}
    for name in names:
        try:
            find_task(name, split)
        except KeyError as error:
            unknown[name] = str(error.args[0]).removeprefix("KeyError: ")
    if unknown and data_dir is not None and split != "train":
        own = mini_suite(data_dir, split or "dev")
    for name in unknown.keys() - {task.name for task in own}:
        raise ValueError(f"--mteb: {unknown[name]}")
    options, scores = loading.options(*models), {}
    for model in models:
        encoder = load_model(model, **options)
        shown = {"show_progress_bar": sys.stderr.isatty(), "instruct": INSTRUCT if instruct else None}
        result = evaluate_mteb(encoder, names, own, split=split, **shown)
        scores[model] = main_scores(result)
    if as_json:
        print(json.dumps(scores))
        return
    for model, of_model in scores.items():
        print(model)
        print("\n".join(f"  {name:30}{score:6.1f}" for name, score in of_model.items()))


def show(result: Evaluation, plot: Path | None, out: Path | None, as_json: bool) -> None:
    """Print an evaluation and write the files that were asked for."""
    from uncausal.encoder.evaluation import report as reporting

    if out is not None:
        reporting.write_json(result, out)
    if plot is not None:
        reporting.plot(result, plot)
    print(json.dumps(result.to_json()) if as_json else reporting.format_table(result))
