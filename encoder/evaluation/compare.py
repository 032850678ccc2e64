"""Scores of one or several models on tasks: every text encoded once, bootstrap intervals, paired differences.

A task's units (pairs, queries, test examples) are drawn again with replacement, with the same draws for every
model, so that the interval of a difference leaves out what is hard or easy for both. A family is the mean of
its tasks, the score of a model the mean of its families.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from uncausal.encoder.evaluation.tasks import DOCUMENT, QUERY, Measurement, Task, Vectors
from uncausal.encoder.inputs import check_finite
from uncausal.encoder.loading import load_model

INSTRUCT = "Instruct: {instruction}\nQuery: "
"""NV-Embed's template; `evaluate_models(..., instruct=INSTRUCT)` puts it before queries."""

MEAN = "mean"

Models: TypeAlias = Mapping[str, SentenceTransformer | str | Path] | Sequence[str | Path] | str | Path


class Score(NamedTuple):
    """Points (0 to 100; of a difference, -100 to 100) and the bounds of their 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ModelScores:
    """What one model scored.

    Args:
        model: its name.
        families: score by family, and "mean".
        tasks: score by task.
        texts: how many texts were encoded.
        seconds: how long that took, loading left out.
    """

    model: str
    families: dict[str, Score]
    tasks: dict[str, Score]
    texts: int
    seconds: float


@dataclass(frozen=True)
class Difference:
    """`model` minus `other`, family by family and in the mean."""

    model: str
    other: str
    families: dict[str, Score]


@dataclass(frozen=True)
class Evaluation:
    """The scores of all models and, of several, the differences between every two."""

    models: list[ModelScores]
    differences: list[Difference]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain lists and dicts; a score is [value, low, high]."""
        return json.loads(json.dumps(asdict(self)))


def evaluate_models(
    models: Models,
    tasks: Sequence[Task],
    *,
    instruct: str | None = None,
    resamples: int = 1000,
    load_options: Mapping[str, Any] | None = None,
    encode_options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score models on tasks, such as `mini_suite(data_dir)`.

    Args:
        models: what `load_model` takes, or loaded models by name; those not loaded are, one after another.
        tasks: the tasks; names are unique.
        instruct: template such as `INSTRUCT`, put before queries with the task's instruction; without it, a
            model's own "query" and "document" prompts are used where it has them.
        resamples: bootstrap draws.
        load_options: of `load_model`, for models given by name.
        encode_options: of `encode`, such as {"batch_size": 64}.

    Raises:
        ValueError: no model, no task, or two tasks of one name.
    """
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        raise ValueError("evaluation needs tasks, with names of their own")

    def measure(model: SentenceTransformer) -> Measured:
        vectors = encode_once(model, tasks, instruct, **(encode_options or {}))
        measurements = {task.name: task.measure(vectors.of(task)) for task in tasks}
        return Measured(measurements, len(vectors.rows), vectors.seconds)

    families = {task.name: task.family for task in tasks}
    return compare(models, measure, families, resamples=resamples, load_options=load_options)


class Measured(NamedTuple):
    """What a model's vectors gave: a measurement a task, the texts encoded and the seconds that took."""

    measurements: dict[str, Measurement]
    texts: int
    seconds: float


def compare(
    models: Models,
    measure: Callable[[SentenceTransformer], Measured],
    families: Mapping[str, str],
    *,
    resamples: int = 1000,
    load_options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Measure models one after another, and give their scores and differences intervals.

    Args:
        models, resamples, load_options: as in `evaluate_models`.
        measure: measures all tasks on one model.
        families: the family of each task.

    Raises:
        ValueError: no model.
    """
    if isinstance(models, (str, Path)):
        models = [models]
    named = dict(models) if isinstance(models, Mapping) else {str(model): model for model in models}
    if not named:
        raise ValueError("evaluation needs at least one model")
    scored, draws = [], {}
    for name, source in named.items():
        loaded = isinstance(source, SentenceTransformer)
        measured = measure(source if loaded else load_model(source, **(load_options or {})))
        by_task = {task: bootstrap(task, m, resamples) for task, m in measured.measurements.items()}
        draws[name] = family_draws(families, by_task)
        scored.append(
            ModelScores(
                model=name,
                families={family: interval(values) for family, values in draws[name].items()},
                tasks={task: interval(values) for task, values in by_task.items()},
                texts=measured.texts,
                seconds=measured.seconds,
            )
        )
    differences = [
        Difference(a, b, {family: interval(draws[a][family] - draws[b][family]) for family in draws[a]})
        for a, b in combinations(named, 2)
    ]
    return Evaluation(scored, differences)


@dataclass(frozen=True)
class EncodedTexts:
    """What `encode_once` returns: a matrix, the row of each (prompt, text), and the seconds it took."""

    matrix: torch.Tensor
    rows: dict[tuple[str | None, str], int]
    seconds: float
    prompts: dict[str, dict[str, str | None]]

    def of(self, task: Task) -> Vectors:
        """Return the lookup to measure the task with."""

        def vectors(texts: Sequence[str], side: str = QUERY) -> torch.Tensor:
            prompt = self.prompts[task.name][side]
            return self.matrix[[self.rows[prompt, text] for text in texts]]

        return vectors


def encode_once(
    model: SentenceTransformer, tasks: Sequence[Task], instruct: str | None = None, **encode_options: Any
) -> EncodedTexts:
    """Encode the distinct texts of all tasks, in one call for each distinct prompt (one if there is none).

    Args:
        model: any sentence-transformers model.
        tasks: the tasks.
        instruct: as in `evaluate_models`.
        **encode_options: of `model.encode`.
    """
    prompts = {task.name: _prompts(model, task, instruct) for task in tasks}
    groups: dict[str | None, dict[str, None]] = {}
    for task in tasks:
        for side, texts in task.texts().items():
            groups.setdefault(prompts[task.name][side], {}).update(dict.fromkeys(texts))
    start, parts = time.perf_counter(), []
    for prompt, texts in groups.items():
        vectors: Any = model.encode(list(texts), prompt=prompt, convert_to_tensor=True, **encode_options)
        parts.append(vectors.float().cpu())
    seconds = time.perf_counter() - start
    for texts, vectors in zip(groups.values(), parts, strict=True):
        check_finite(vectors.numpy(), list(texts))
    keys = [(prompt, text) for prompt, texts in groups.items() for text in texts]
    return EncodedTexts(torch.cat(parts), {key: row for row, key in enumerate(keys)}, seconds, prompts)


def no_prompt(model: SentenceTransformer, side: str = DOCUMENT) -> str | None:
    """What `encode` is given for a side without a prompt of its own: None asks for the model's default one.

    By its name that may be the other side's, and then it is none of this one.
    """
    default = model.default_prompt_name or ""
    of_documents = any(name in default for name in (DOCUMENT, "passage", "corpus"))  # the library's names
    return "" if (of_documents if side == QUERY else QUERY in default) else None


def _prompts(model: SentenceTransformer, task: Task, instruct: str | None) -> dict[str, str | None]:
    """The prompt of each side: the instruction before queries, or the model's own if the sides differ."""
    if instruct is not None:
        return {QUERY: instruct.format(instruction=task.instruction), DOCUMENT: no_prompt(model)}
    if DOCUMENT not in task.texts():
        return {QUERY: None}
    return {side: model.prompts.get(side) or no_prompt(model, side) for side in (QUERY, DOCUMENT)}


def bootstrap(name: str, measurement: Measurement, resamples: int = 1000) -> np.ndarray:
    """The score, and then the scores of units drawn with replacement, the same draws for every model.

    Args:
        name: of the task, which alone decides the draws: those of models measured apart are paired too.
        measurement: of a model's vectors.
        resamples: how many draws.

    Returns:
        (1 + resamples,) float64, in points.
    """
    size, score = measurement
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    drawn = [score(generator.integers(size, size=size)) for _ in range(resamples)]
    return np.array([score(np.arange(size)), *drawn])


def family_draws(families: Mapping[str, str], by_task: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The means of each family's tasks, and under "mean" that of the families, draw by draw.

    Args:
        families: the family of each task.
        by_task: what `bootstrap` gives for each.
    """
    members: dict[str, list[np.ndarray]] = {}
    for task, values in by_task.items():
        members.setdefault(families[task], []).append(values)
    means = {family: np.mean(values, axis=0) for family, values in members.items()}
    return {**means, MEAN: np.mean(list(means.values()), axis=0)}


def interval(values: np.ndarray) -> Score:
    """Value and interval; the draws are centred, as repeated units favour V-measure and average precision.

    Args:
        values: (1 + resamples,) as `bootstrap` gives them, or the difference of two models'.
    """
    value, drawn = float(values[0]), values[1:]
    if not len(drawn):
        return Score(value, value, value)
    low, high = np.quantile(drawn - drawn.mean(), (0.025, 0.975))
    return Score(value, value + float(low), value + float(high))
