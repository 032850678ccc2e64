"""An evaluation as a table, as JSON and as one plot."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from uncausal.encoder.evaluation.compare import Evaluation, Score
from uncausal.encoder.files import staged_file


def format_table(evaluation: Evaluation) -> str:
    """Return scores with 95 % intervals as text: a row a family, a column a model or a difference."""
    columns = {scores.model: scores.families for scores in evaluation.models}
    columns |= {f"{d.model} - {d.other}": d.families for d in evaluation.differences}
    rows = [["", *columns]]
    for family in evaluation.models[0].families:
        rows.append([family, *(_cell(families[family]) for families in columns.values())])
    rows.append(["texts", *(f"{scores.texts:,}" for scores in evaluation.models)])
    rows.append(["seconds", *(f"{scores.seconds:.0f}" for scores in evaluation.models)])
    rows = [row + [""] * (len(rows[0]) - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def write_json(evaluation: Evaluation, path: Path) -> None:
    """Write the evaluation, whole or not at all."""
    with staged_file(path) as file:
        file.write(json.dumps(evaluation.to_json(), indent=2).encode() + b"\n")


def plot(evaluation: Evaluation, path: Path) -> None:
    """Draw every family's score and interval, a colour a model; the suffix of `path` is the format."""
    families = list(evaluation.models[0].families)
    figure = Figure(figsize=(7, 0.6 + 0.45 * len(families)), layout="constrained")
    axes = figure.subplots()
    for number, scores in enumerate(evaluation.models):
        offset = 0.6 * ((number + 0.5) / len(evaluation.models) - 0.5)
        values = list(scores.families.values())
        below, above = [s.value - s.low for s in values], [s.high - s.value for s in values]
        axes.errorbar(
            [score.value for score in values],
            [row + offset for row in range(len(families))],
            xerr=[below, above],
            fmt="o",
            markersize=4,
            label=scores.model,
        )
    axes.set_yticks(range(len(families)), families)
    axes.invert_yaxis()
    axes.set_xlabel("points, with 95 % bootstrap intervals")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    with staged_file(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png", dpi=150)


def check_format(path: Path) -> None:
    """Raise ValueError for a plot whose suffix is no format of matplotlib's."""
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"{path}: a plot's suffix is its format, one of {', '.join(sorted(known))}")


def _cell(score: Score) -> str:
    return f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"
