"""A study as tables, verdicts and two plots: `python -m uncausal.bench.trials.study_report bench/study.json`.

STUDY.md and the plots are written beside the file, which may be one of a study that is not finished.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from uncausal.encoder.files import staged_file

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "within the interval", "not measured"
POOLINGS = ("mean", "weighted_mean", "last_token", "latent")
MEAN, SHOTS = "mean", ("banking77", "polarity", "clustering")
Interval = Sequence[float]  # value, low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="study.json")
    file = parser.parse_args().study
    content = json.loads(file.read_text())
    for name, draw in (("study_pooling.png", plot_poolings), ("study_depth.png", plot_depths)):
        draw(content, file.with_name(name))
    with staged_file(file.with_name("STUDY.md")) as out:
        out.write(render(content).encode())
    print(file.with_name("STUDY.md"))


def verdict(differences: Iterable[Interval | None], margin: float = 0.0) -> str:
    """Whether an ordering holds: in every pair the better cell is better, or at most `margin` points worse.

    Args:
        differences: better minus worse, as [value, low, high]; None where a cell was not measured.
        margin: in points.

    Returns:
        HOLDS if every interval lies above -margin, FAILS if one lies below it, OPEN where one contains it.
    """
    found = list(differences)
    if any(one is None for one in found):
        return MISSING
    known = [one for one in found if one is not None]
    if any(high < -margin for _, _, high in known):
        return FAILS
    return HOLDS if all(low > -margin for _, low, _ in known) else OPEN


def render(study: dict[str, Any]) -> str:
    """Return the whole page."""
    settings, cells = study["settings"], study["cells"]
    minutes = sum(stage["minutes"] for made in study["models"].values() for stage in made["stages"])
    scoring = sum(cell["seconds"] for cell in cells.values()) / 60
    versions = ", ".join(f"{name} {version}" for name, version in study["versions"].items())
    seeds = f"{settings['seeds']} seed{'s' if settings['seeds'] > 1 else ''}"
    parts = [
        "# Which orderings of the papers hold at 135 million parameters",
        "`make study DATA=DIR`, rendered from [study.json](study.json) by "
        "`python -m uncausal.bench.trials.study_report bench/study.json`. "
        f"`{settings['model']}`, {settings['depth']} layers kept in all but B, about {settings['tokens']:,} "
        f"tokens a stage (a part of them in B and C), {seeds} of training: {len(study['models'])} models, "
        f"{minutes:.0f} minutes of training and {scoring:.0f} of encoding by the clock, pauses included, on "
        f"{study['device']} ({versions}).",
        "Scores are the means of the mini suite's eight families on the test split, with 95 % bootstrap "
        "intervals over test examples; differences are paired. The intervals say nothing of other seeds, "
        "data or budgets. The papers' models are ten to fifty times as large and saw hundreds of times the "
        "tokens. In domain are entailment, for all that is trained on NLI, and by its articles XQuAD (QNLI "
        "has other questions and paragraphs of some of them); clustering, for the instruction stage (CLINC's "
        "train split), and by its kind reranking (MedQuAD's other sources), for that and `fusion`. The "
        "instruction stage saw a quarter more tokens than the others, those of the instructions.",
        "## Verdicts",
        "An ordering holds where the interval of the difference, in all pairs, lies above zero (or above "
        "minus one point, where a cost is asked about), and does not where one lies below.",
        verdicts(study["claims"]),
        "## A: attention, training, pooling",
        pooling_table(cells, settings),
        "![Scores by pooling](study_pooling.png)",
        "By family, mean pooling, and the difference of the means from the causal model's:",
        family_table(cells),
        "## B: depth",
        "Causal attention and weighted mean, as L3Prune has it; before and after the same number of tokens "
        "of fine-tuning. The difference is from all layers, fine-tuned.",
        depth_table(cells, settings),
        "![Scores by depth](study_depth.png)",
        "## C: the recipe fusion and its parts",
        fusion_table(cells),
        "The first numbers of the vectors alone:",
        size_table(cells),
        "## D: words",
        "A linear probe on token states: accuracy of parts of speech (UD English EWT), F1 of entities "
        "(WNUT-17). Shifted: a token's state is taken from the position before it, where MNTP predicts it.",
        word_table(cells),
        "## E: instructions before queries",
        instruction_table(cells),
        "## What was trained",
        model_table(study["models"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdicts(claims: Sequence[dict[str, Any]]) -> str:
    rows = []
    for claim in claims:
        pairs = claim["differences"]
        shown = [
            f"`{pair['better']}` - `{pair['worse']}` {signed(pair['value'])}"
            for pair in pairs
            if pair["value"]
        ]
        where = "" if claim["families"] == [MEAN] else f" ({', '.join(claim['families'])})"
        found = verdict((pair["value"] for pair in pairs), claim["margin"])
        rows.append([claim["paper"], claim["text"] + where, f"**{found}**", "; ".join(shown)])
    return table(["of", "ordering", "here", "paired differences, points"], rows)


def pooling_table(cells: dict[str, Any], settings: dict[str, Any]) -> str:
    rows = []
    for method, row in by_pooling(cells).items():
        rows.append([method, *(shown(row[p]["scores"][MEAN]) if p in row else "" for p in POOLINGS)])
    return table([f"{settings['depth']} layers", *(p.replace("_", " ") for p in POOLINGS)], rows)


def by_pooling(cells: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells of group A: method -> pooling -> cell."""
    found: dict[str, dict[str, Any]] = {}
    for name, cell in cells.items():
        if "A" in cell["groups"]:
            found.setdefault(name.rsplit(".", 1)[0], {})[cell["pooling"]] = cell
    return found


def family_table(cells: dict[str, Any]) -> str:
    chosen = {name: cell for name, cell in cells.items() if "A" in cell["groups"] and cell["pooling"] == MEAN}
    if not chosen:
        return ""
    families = list(next(iter(chosen.values()))["scores"])
    rows = [
        [name.removesuffix(".mean"), *(f"{cell['scores'][f][0]:.1f}" for f in families)]
        + [signed(cell["difference"])]
        for name, cell in chosen.items()
    ]
    return table(["", *families, "difference"], rows)


def depth_table(cells: dict[str, Any], settings: dict[str, Any]) -> str:
    rows = []
    for depth in settings["depths"]:
        before, after = cells.get(f"causal-{depth}.weighted_mean"), cells.get(f"pruned-{depth}")
        speed = f"{before['tokens'] / before['core_seconds']:,.0f}" if before else ""
        scores = [shown(cell["scores"][MEAN]) if cell else "" for cell in (before, after)]
        rows.append([str(depth), speed, *scores, signed(after["difference"]) if after else ""])
    return table(["layers", "tokens a second of a core", "before", "fine-tuned", "difference"], rows)


def fusion_table(cells: dict[str, Any]) -> str:
    chosen = {name: cell for name, cell in cells.items() if cell["groups"] == "C"}
    rows = []
    for name, cell in chosen.items():
        labelled = sum(cell["scores"][family][0] for family in SHOTS) / len(SHOTS)
        what = name.removeprefix("fusion-").replace("_", " ")
        difference = "" if name == "fusion" else signed(cell["difference"])
        rows.append([what, cell["pooling"], shown(cell["scores"][MEAN]), difference, f"{labelled:.1f}"])
    return table(["", "pooling", "mean", "difference from fusion", "classes and clusters"], rows)


def size_table(cells: dict[str, Any]) -> str:
    chosen = {name: cell for name, cell in cells.items() if cell["sizes"]}
    if not chosen:
        return ""
    sizes = list(next(iter(chosen.values()))["sizes"])
    rows = [
        [name, *(shown(cell["sizes"][size]) for size in sizes), shown(cell["scores"][MEAN])]
        for name, cell in chosen.items()
    ]
    return table(["numbers", *sizes, "all"], rows)


def word_table(cells: dict[str, Any]) -> str:
    rows = []
    for cell in cells.values():
        if cell["words"]:
            scores = [shown(cell["scores"][task]) for task in ("pos", "ner")]
            name = cell["model"] + (", shifted" if cell["shift"] else "")
            rows.append([name, *scores, signed(cell["difference"])])
    return table(["", "parts of speech", "entities", "mean, difference from causal"], rows)


def instruction_table(cells: dict[str, Any]) -> str:
    rows = []
    for cell in cells.values():
        if cell["instruct"] and (without := cells.get(cell["baseline"])):
            pairs = [f"{without['scores'][f][0]:.1f}, {cell['scores'][f][0]:.1f}" for f in SHOTS]
            rows.append([cell["model"], *pairs, signed(cell["difference"])])
    return table(["without, with", *SHOTS, "difference of the means"], rows)


def model_table(models: dict[str, Any]) -> str:
    rows = []
    for name, made in models.items():
        for stage in made["stages"]:
            settings = stage["settings"]
            steps = f"{settings['max_steps']} x {settings.get('batch_size', 'default')}"
            data = stage["data"] if isinstance(stage["data"], str) else ", ".join(stage["data"].values())
            cost = [f"{stage['tokens']:,}", f"{stage['minutes']:.1f}", f"{stage['loss']:.3f}"]
            rows.append([name, made["base"], stage["kind"], data.replace("local:", ""), steps, *cost])
    return table(["model", "from", "stage", "data", "steps x batch", "tokens", "minutes", "last loss"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; nothing without rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def shown(score: Interval) -> str:
    value, low, high = score
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def signed(difference: Interval) -> str:
    value, low, high = difference
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def plot_poolings(study: dict[str, Any], path: Path) -> None:
    """Draw the means of group A, a row a method, a colour a pooling."""
    from matplotlib.figure import Figure

    methods = by_pooling(study["cells"])
    figure = Figure(figsize=(7, 1 + 0.4 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for number, pooling in enumerate(POOLINGS):
        there = [(row, cells[pooling]) for row, cells in enumerate(methods.values()) if pooling in cells]
        places = [row + 0.15 * (number - 1.5) for row, _ in there]
        draw(axes, [cell["scores"][MEAN] for _, cell in there], places, pooling.replace("_", " "))
    axes.set_yticks(range(len(methods)), list(methods))
    axes.invert_yaxis()
    axes.set_xlabel("mean of eight families, points")
    finish(figure, axes, path)


def draw(axes: Any, scores: Sequence[Interval], places: Sequence[float], label: str) -> None:
    """Points with their intervals, beside each other."""
    values = [value for value, _, _ in scores]
    around = [[v - low for v, low, _ in scores], [high - v for v, _, high in scores]]
    axes.errorbar(values, places, xerr=around, fmt="o", markersize=4, label=label)


def plot_depths(study: dict[str, Any], path: Path) -> None:
    """Draw group B's curves: the mean over the kept layers, before and after fine-tuning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    cells = study["cells"]
    for label, form in (("before", "causal-{}.weighted_mean"), ("fine-tuned", "pruned-{}")):
        there = [(d, cells[form.format(d)]) for d in study["settings"]["depths"] if form.format(d) in cells]
        scores = [cell["scores"][MEAN] for _, cell in there]
        around = [[v - low for v, low, _ in scores], [high - v for v, _, high in scores]]
        axes.errorbar([d for d, _ in there], [s[0] for s in scores], yerr=around, marker="o", label=label)
    axes.set(xlabel="layers kept", ylabel="mean of eight families, points")
    finish(figure, axes, path)


def finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with staged_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    main()
