"""What runs of one recipe with several seeds score: `python -m uncausal.bench.trials.seeds FILE ...`.

A run's file is what the suite wrote of it, alone or with models to compare it with:

    uncausal run encoder runs/1 --seed 1 --data-dir DIR
    uncausal eval runs/1 OTHER --suite mini --data-dir DIR --split test --dtype float32 --out FILE

Two things move a score, and each has an interval of its own. Other texts: the bootstrap interval of a run,
the middle one (of two the better). Another seed: Student's interval of the runs' mean, for these texts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

LEVEL = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="what `uncausal eval --out` wrote, a file a run")
    try:
        print(table([read(file) for file in parser.parse_args().files]))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def read(file: Path) -> dict[str, Any]:
    """Read what `uncausal eval --suite mini --out` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        run = json.loads(file.read_text())
        found = rows(run)
        if not found or any(len(score) != 3 for _, score in found):
            raise ValueError("no scores")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{file}: not what `uncausal eval --suite mini --out` wrote") from None
    return run


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Lay out the scores of all runs, and their differences from the other models, as a Markdown table.

    Args:
        runs: evaluations as JSON; the first model of each is the run, the others are the same in all.

    Raises:
        ValueError: the runs were scored on other tasks, or beside other models, or two are one run.
    """
    parts = [rows(run) for run in runs]
    names = [[name for name, _ in part] for part in parts]
    tasks = [list(run["models"][0]["tasks"]) for run in runs]
    if names.count(names[0]) < len(runs) or tasks.count(tasks[0]) < len(runs):
        raise ValueError("the files are not of the same tasks and beside the same models")
    if any(parts.count(part) > 1 for part in parts):
        raise ValueError("two of the files hold the same run")
    head = ["", *(f"run {number}" for number in range(1, len(runs) + 1)), "mean", "by seeds", "by texts"]
    lines = [head, ["---"] * len(head)]
    for name, *scores in zip(names[0], *([score for _, score in part] for part in parts), strict=True):
        values = [score[0] for score in scores]
        middle = sorted(scores)[len(scores) // 2]
        seeds = "" if len(values) < 2 else span(*t_interval(values))
        lines.append([name, *(f"{v:.1f}" for v in values), f"{fmean(values):.1f}", seeds, span(*middle[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows(run: dict[str, Any]) -> list[tuple[str, Sequence[float]]]:
    """What is shown of one run: STS-B and the families, then its mean's distance from every other model."""
    model, *others = run["models"]
    found = [*model["families"].items()]
    if "stsbenchmark" in model["tasks"]:
        found.insert(0, ("STS-B", model["tasks"]["stsbenchmark"]))
    for other in others:
        [between] = [
            d for d in run["differences"] if (d["model"], d["other"]) == (model["model"], other["model"])
        ]
        found.append((f"mean, less {other['model']}'s", between["families"]["mean"]))
    return found


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of the mean of at least two values."""
    reach = t.ppf((1 + LEVEL) / 2, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return fmean(values) - reach, fmean(values) + reach


def span(low: float, high: float) -> str:
    return f"{low:.1f} to {high:.1f}"


if __name__ == "__main__":
    main()
