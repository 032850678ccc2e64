"""Turns the records of benchmark runs into the tables and plots of RESULTS.md.

`python -m uncausal.bench.report` reads every `bench/results/*.json`, as pytest-benchmark wrote it, oldest
first; a later record of the same case and provider replaces the earlier one. The README's speeds are rows of
the same records, written where all of them are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from uncausal.bench.measure import OURS

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "RESULTS.md"
README = BENCH.parent / "README.md"
COLUMNS = {  # of a record: heading, scale, digits
    "tokens_per_s": ("tokens/s", 1, 0),
    "flops_per_s": ("GFLOP/s", 1e9, 1),
    "share_of_gemm": ("of the GEMM rate", 0.01, 0),
    "share_of_mm": ("of torch.mm's rate on its shapes", 0.01, 0),
    "peak_bytes": ("peak MB", 1e6, 0),
    "flops_per_token": ("MFLOP/token at d 4096", 1e6, 0),
    "sts_spearman": ("STS-B dev", 1, 1),
    "loss": ("first loss", 1, 2),
    "error": ("largest error", 1, None),
}


class Entry(NamedTuple):
    """One provider in one case."""

    benchmark: str  # file and function, as "encode, mixed"
    device: str  # "CPU" or "GPU"
    case: str
    provider: str
    record: dict[str, Any]
    command: str


def read(folder: Path) -> list[Entry]:
    """Read all records, later ones in place of earlier ones."""
    found: dict[tuple[str, ...], Entry] = {}
    files = [(json.loads(path.read_text()), path) for path in folder.glob("*.json")]
    runs = [(data, path) for data, path in files if isinstance(data, dict) and "benchmarks" in data]
    for data, path in sorted(runs, key=lambda run: run[0]["datetime"]):
        for item in data["benchmarks"]:
            record = item["extra_info"]
            suite = Path(item["fullname"].split("::")[0]).stem.removeprefix("bench_")
            function = item["name"].split("[")[0].removeprefix("bench_")
            name = suite if function == suite else f"{suite}, {function}"
            case = (item["param"] or "").removesuffix(record["provider"]).rstrip("-")
            device = "GPU" if path.stem.endswith("gpu") else "CPU"
            entry = Entry(name, device, case, record["provider"], record, record.get("command", ""))
            found[entry[:4]] = entry
    return list(found.values())


def table(entries: list[Entry]) -> str:
    """Lay out one benchmark's entries: a row a provider, times beside this package's in the same case."""
    present = [key for key in COLUMNS if any(key in e.record for e in entries)]
    named = any(e.case for e in entries)
    heads = [*(["case"] if named else []), "provider", "median", "p20 to p80", f"time / {OURS}'s"]
    heads += [COLUMNS[key][0] for key in present]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for e in entries:
        r, base = e.record, _base(entries, e.case)
        spread = f"{_time(r['p20_s'])} to {_time(r['p80_s'])}"
        cells = [*([e.case] if named else []), e.provider, _time(r["median_s"]), spread]
        cells.append(f"{r['median_s'] / base:.2f}" if base else "")
        cells += [_number(r[key], key) if key in r else "" for key in present]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _base(entries: Iterable[Entry], case: str) -> float | None:
    return next((e.record["median_s"] for e in entries if (e.case, e.provider) == (case, OURS)), None)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _number(value: float, key: str) -> str:
    heading, scale, digits = COLUMNS[key]
    text = f"{value:.1g}" if digits is None else f"{value / scale:,.{digits}f}"
    return f"{text} %" if heading.startswith("of ") else text


def section(entries: list[Entry]) -> str:
    """The body of one benchmark's section: how it was run, the table, who was missing, what was tried."""
    latest = entries[-1].record
    versions = ", ".join(f"{k} {v}" for k, v in latest["environment"]["versions"].items())
    parts = [f"`{entries[-1].command}`, {latest['environment']['device']}, {versions}", table(entries)]
    missing = {name: why for e in entries for name, why in e.record.get("missing", {}).items()}
    if missing:
        parts.append("Not run: " + "; ".join(f"{name} ({why})" for name, why in missing.items()) + ".")
    for e in entries:
        if "tried_s" in e.record:
            tried = ", ".join(f"{name} {taken:.2f} s" for name, taken in e.record["tried_s"].items())
            parts.append(f"{e.provider} runs at {e.record['setting']}; tried on a sample: {tried}.")
    return "\n\n".join(parts)


def plot(entries: list[Entry], x: str, y: str, labels: tuple[str, str], path: Path) -> bool:
    """Draw a line a provider and device over the entries that have both figures; False if there are none."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for e in entries:
        if x in e.record and y in e.record:
            name = e.record.get("series", e.provider)
            lines.setdefault(name, []).append((e.record[x], e.record[y]))
    if not lines:
        return False
    if all(len(points) == 1 for points in lines.values()):  # the providers are points of one line
        lines = {OURS: [point for points in lines.values() for point in points]}
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    if ticks[-1] > 8 * ticks[0]:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


PLOTS: dict[str, tuple[str, str, str, tuple[str, str]]] = {  # benchmark: file, x, y, their labels
    "attention, by_length": ("attention_rate", "length", "gflops", ("tokens a sequence", "GFLOP/s")),
    "info_nce, memory": ("info_nce_memory", "batch", "extra_mb", ("batch", "MB beyond inputs and gradients")),
    "encode, by_layers": ("encode_layers", "layers", "tokens_per_s", ("layers kept", "tokens/s")),
}


def render(folder: Path = BENCH / "results", results: Path = RESULTS) -> None:
    """Write a section for every benchmark of which there are records."""
    entries = read(folder)
    for key in dict.fromkeys((e.benchmark, e.device) for e in entries):
        chosen = [e for e in entries if (e.benchmark, e.device) == key]
        body = section(chosen)
        if key[0] in PLOTS:
            name, x, y, labels = PLOTS[key[0]]
            image = results.parent / f"{name}_{key[1].lower()}.png"
            if plot(chosen, x, y, labels, image):
                body += f"\n\n![{labels[1]} against {labels[0]}]({image.name})"
        write_section(", ".join(key), body, results)
    measured = {e.benchmark for e in entries if e.device == "CPU"}
    if results == RESULTS and measured.issuperset(IN_README):
        write_block(README, "speed", readme_table(entries))


IN_README = {
    "encode, mixed": "encode, 30 layers",
    "train_step, simcse": "SimCSE step, 7 layers",
    "train_step, supervised": "Step of 64 triplets, 11 layers",
}


def readme_table(entries: list[Entry]) -> str:
    """What a newcomer asks: tokens a second of encoding and of training, on a CPU, beside the peers."""
    rows = []
    for benchmark, what in IN_README.items():
        for e in entries:
            measured = (e.benchmark, e.device) == (benchmark, "CPU") and "tokens_per_s" in e.record
            if measured and not e.provider.startswith("torch.mm"):
                memory = e.record.get("peak_bytes")
                cells = [
                    f"{what}, {e.case}" if e.case else what,
                    e.provider,
                    _number(e.record["tokens_per_s"], "tokens_per_s"),
                    _number(memory, "peak_bytes") if memory else "",
                ]
                rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(["| what | by | tokens/s | peak MB |", "|---|---|---|---|", *rows])


def write_block(path: Path, name: str, body: str) -> None:
    """Replace what stands between a file's markers of that name; a file without them stays as it is."""
    text = path.read_text()
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    path.write_text(pattern.sub(lambda _: f"<!-- {name} -->\n{body}\n<!-- /{name} -->", text))


def write_section(title: str, body: str, path: Path = RESULTS) -> None:
    """Replace the section of that title, or add it at the end."""
    text = path.read_text() if path.exists() else "# Results\n"
    heading = title[0].upper() + title[1:].replace("_", " ")
    new = f"<!-- {title} -->\n## {heading}\n\n{body}\n<!-- /{title} -->"
    pattern = re.compile(rf"<!-- {re.escape(title)} -->.*?<!-- /{re.escape(title)} -->", re.DOTALL)
    if pattern.search(text):
        text = pattern.sub(lambda _: new, text)
    else:
        text = text.rstrip() + "\n\n" + new + "\n"
    path.write_text(text)


if __name__ == "__main__":
    render()
