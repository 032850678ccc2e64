"""Which orderings of the papers hold at 135 million parameters: small models trained and scored, a cell each.

`python -m uncausal.bench.trials.study OUT --data-dir DIR [--only NAME ...] [--tokens N] [--seeds N]` goes
through the cells of study_cells.py, the most telling first. A model is trained by a recipe of its own, kept
in OUT/models, a finished cell is a file in OUT/cells, and the same command goes on where it was stopped. What
is known so far stands in OUT/study.json, which study_report.py renders.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from uncausal.bench.trials.study_cells import Cell, Model, chain
from uncausal.bench.trials.study_results import Results, Settings, drawn, write
from uncausal.encoder.batching import release_memory
from uncausal.encoder.data.local import data_dir
from uncausal.encoder.evaluation.compare import INSTRUCT, MEAN, EncodedTexts, encode_once
from uncausal.encoder.evaluation.suite import mini_suite
from uncausal.encoder.evaluation.tasks import Task
from uncausal.encoder.evaluation.words import measure_words, word_tasks
from uncausal.encoder.model import Encoder
from uncausal.encoder.pruning import Pruning
from uncausal.encoder.training.follow import RESULT, run_recipe
from uncausal.encoder.training.plan import tokens_of_row
from uncausal.encoder.training.progress import TrainingInterrupted
from uncausal.encoder.training.recipes import Recipe, Step
from uncausal.encoder.training.stages.distill import Distill

# A core in bf16, for the estimate of the time left: layers x tokens trained a second, seconds a layer scored.
TRAINED, SCORED = 4400, 10
TRUST = 300  # seconds of work after which the pace so far counts as much as the guesses
SENTENCES = 2000  # that the probe of words learns on


def main() -> None:
    told = {
        "model": "language model, as `uncausal convert` takes it",
        "tokens": "that a stage is trained on",
        "depth": "layers kept, in all groups but B",
        "depths": "layers kept in group B, the last being all",
        "seeds": "of every training; scores are means over them",
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--data-dir", type=Path, help="by default UNCAUSAL_DATA")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cells, or groups by letter")
    for field in fields(Settings):
        form: dict[str, Any] = {"type": type(field.default)}
        if field.name == "depths":
            form = {"type": int, "nargs": "+"}
        parser.add_argument(f"--{field.name}", default=field.default, help=told[field.name], **form)
    options: dict[str, Any] = vars(parser.parse_args())
    chosen: dict[str, Any] = {name: options[name] for name in told}
    settings = Settings(**{**chosen, "depths": tuple(options["depths"])})
    try:
        study(Results(options["output"], settings), data_dir(options["data_dir"]), options["only"])
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    except TrainingInterrupted as stopped:
        parser.exit(130, f"{stopped}\n")


class Job(NamedTuple):
    """A model to train or a cell to score, with a seed, and a guess of its seconds."""

    kind: str
    name: str
    seed: int
    seconds: float


def study(results: Results, data: Path, only: Sequence[str] = ()) -> None:
    """Train and score what is not done yet, of the cells and groups named or of all; a line for each.

    Raises:
        ValueError: no cell or group of a name.
        FileNotFoundError: the data directory lacks a set of the suite.
    """
    known = {*results.cells, *(letter for cell in results.cells.values() for letter in cell.groups)}
    for name in only:
        if name not in known:
            raise ValueError(f"no cell or group {name!r}: there is {', '.join(sorted(known))}")
    chosen = [n for n, cell in results.cells.items() if not only or {n, *cell.groups} & {*only}]
    todo = [job for job in jobs(results, chosen) if not done(results, job).exists()]
    tasks = {"suite": mini_suite(data), "words": word_tasks(data, limit=SENTENCES)} if todo else {}
    guessed = spent = 0.0
    for number, job in enumerate(todo, 1):
        start, place = time.perf_counter(), f"{number}/{len(todo)} {job.kind} {job.name}"
        try:
            outcome = train(results, job, data) if job.kind == "train" else score(results, job, tasks)
        except FileNotFoundError as error:  # as a teacher that is not installed; its cells follow it
            print(f"{place}: left out: {error}", flush=True)
            continue
        gc.collect()
        release_memory()
        results.collect()
        seconds = time.perf_counter() - start
        guessed, spent = guessed + job.seconds, spent + seconds
        pace = (spent + TRUST) / (guessed + TRUST)
        left = sum(later.seconds for later in todo[number:]) * pace / 60
        print(f"{place}: {outcome}, {seconds / 60:.1f} min; {left:.0f} min left", flush=True)
    print(results.collect())


def jobs(results: Results, chosen: Sequence[str]) -> list[Job]:
    """What cells need, in their order: every model comes before its first cell."""
    found: dict[Job, None] = {}
    for name in chosen:
        cell = results.cells[name]
        for seed in results.seeds(cell.model):
            for model in chain(results.models, cell.model):
                own = seed if seed in results.seeds(model) else 0
                found[Job("train", model, own, seconds_of(results, model))] = None
            part = 0.5 if cell.tasks or cell.words else 1
            found[Job("score", name, seed, 20 + part * SCORED * results.layers(cell.model))] = None
    return list(found)


def seconds_of(results: Results, model: str) -> float:
    """A guess of what training a model takes."""
    made, seconds = results.models[model], 10.0
    for number, step in enumerate(made.steps):
        if not isinstance(step.settings, Pruning):
            pruned = any(isinstance(before.settings, Pruning) for before in made.steps[:number])
            layers = results.layers(model if pruned else made.base or model)
            seconds += 10 + results.settings.tokens * made.share(step) * layers / TRAINED
    return seconds


def done(results: Results, job: Job) -> Path:
    """The file that is there once a job is done."""
    if job.kind == "train":
        return results.folder(job.name, job.seed) / RESULT
    return results.file(job.name, job.seed)


def train(results: Results, job: Job, data: Path) -> str:
    """Make a model by a recipe of its steps, its weights in fp32; say what its last stage came to."""
    model, options = results.models[job.name], {}
    if model.bidirectional is not None:
        options["bidirectional"] = model.bidirectional
    base = results.settings.model if model.base is None else str(results.folder(model.base, job.seed))
    tokens = results.settings.tokens
    steps = [budgeted(step, model, base, tokens, job.seed, data) for step in model.steps]
    recipe = Recipe("study", job.name, base, options, steps)
    run_recipe(recipe, results.folder(job.name, job.seed), progress=False, dtype="float32")
    stages = json.loads(done(results, job).read_text())["stages"]
    outcome = stages[-1]["outcome"] if stages else {}
    return f"{outcome['steps']} steps, loss {outcome['loss']:.3f}" if "loss" in outcome else "made"


def budgeted(step: Step, model: Model, base: str, tokens: int, seed: int, data: Path) -> Step:
    """The step with its data read, and as many optimiser steps as the tokens are enough for."""
    stage: Any = step.settings
    if isinstance(stage, Pruning):
        return step
    rows: Any = step.read(data)
    if model.instructions:
        rows = {
            name: [{**row, "instruction": model.instructions[name]} for row in part]
            for name, part in rows.items()
        }
    of_row, _ = tokens_of_row(Encoder.from_pretrained(base), stage, rows)
    batch = stage.batch_size * of_row
    count = max(round(tokens * model.share(step) / batch), 1)
    if isinstance(stage, Distill):  # the teacher encodes no more than is learnt from
        rows = random.Random(seed).sample(rows, min(count * stage.batch_size, len(rows)))
    settings = replace(
        stage,
        max_steps=count,
        schedule_steps=None,
        warmup_steps=min(stage.warmup_steps, count // 5),
        logging_steps=min(2, count),  # when memory is given back
        save_steps=20,
        seed=stage.seed + seed,
    )
    return replace(step, settings=settings, data=rows)


def score(results: Results, job: Job, tasks: Mapping[str, Any]) -> str:
    """Score a cell and write its file; say the mean."""
    cell = results.cells[job.name]
    encoder = Encoder.from_pretrained(results.folder(cell.model, job.seed), pooling=cell.pooling)  # pyright: ignore[reportArgumentType]
    found = {**asdict(cell), "pooling": encoder.pooling, "layers": encoder.num_layers}
    if cell.words:
        measured = measure_words(encoder, tasks["words"], shift=cell.shift)
        draws = drawn(measured.measurements, {task.name: task.name for task in tasks["words"]})
        found |= {"texts": measured.texts, "seconds": round(measured.seconds, 1), "draws": draws}
    else:
        chosen = [task for task in tasks["suite"] if not cell.tasks or task.name in cell.tasks]
        found |= score_suite(encoder, chosen, cell)
    write(done(results, job), found)
    return f"{found['draws'][MEAN][0]:.1f}"


def score_suite(encoder: Encoder, tasks: Sequence[Task], cell: Cell) -> dict[str, Any]:
    """Encode the tasks' texts once; draws of the whole vectors and of their first so many numbers."""
    start = time.process_time()  # which other work on the machine does not lengthen
    encoded = encode_once(encoder, tasks, INSTRUCT if cell.instruct else None, show_progress_bar=False)
    core_seconds = time.process_time() - start
    texts = [(prompt or "") + text for prompt, text in encoded.rows]
    families = {task.name: task.family for task in tasks}

    def draws(vectors: EncodedTexts) -> dict[str, list[float]]:
        return drawn({task.name: task.measure(vectors.of(task)) for task in tasks}, families)

    return {
        "texts": len(texts),
        "tokens": sum(map(len, encoder.tokenizer(texts)["input_ids"])),
        "seconds": round(encoded.seconds, 1),
        "core_seconds": round(core_seconds, 1),
        "draws": draws(encoded),
        "sizes": {str(n): draws(replace(encoded, matrix=encoded.matrix[:, :n])) for n in cell.sizes},
    }


if __name__ == "__main__":
    main()
