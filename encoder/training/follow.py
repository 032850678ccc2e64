"""Follows a recipe: every stage in order, from where an interrupted run stopped, and a record of it all."""

import dataclasses
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from glob import glob
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict

from uncausal.encoder.data.local import VARIABLE
from uncausal.encoder.data.pairs import read_pairs, text_columns
from uncausal.encoder.data.rows import named
from uncausal.encoder.files import staged, staged_file
from uncausal.encoder.loading import check_model
from uncausal.encoder.model import Encoder, is_generated_card
from uncausal.encoder.pruning import Choice, Depths, Pruning
from uncausal.encoder.training.checkpoints import FINAL, RECORD, describe_encoder, remove
from uncausal.encoder.training.ranks import only_run, process_state, together
from uncausal.encoder.training.recipes import KINDS, RECIPE, SELF, Recipe, Step, load_recipe
from uncausal.encoder.training.run import train
from uncausal.encoder.training.stages.base import Stage
from uncausal.encoder.training.stages.distill import PARTS, Distill, text_digest
from uncausal.encoder.whitening import LinearMap, Whitening, append_linear

logger = logging.getLogger(__name__)
CHOICE, MAP, TEACHER, VECTORS, RESULT = "choice.json", "map", "teacher", "vectors.npy", "recipe.json"
TEACHERS = "teachers"
OF_A_STAGE = rf"\d+-({'|'.join(KINDS)})"  # the name of its folder
# arguments of `from_pretrained` that are for teachers too
OF_LOADING = ("attention", "dtype", "device", "token", "trust_remote_code", "cache_dir", "local_files_only")
PACKAGES = ("uncausal", "torch", "transformers", "sentence-transformers", "peft", "accelerate", "datasets")


def run_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    model: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    resume: bool = True,
    eval: Callable[[Any], Mapping[str, float]] | None = None,
    progress: bool = True,
    **options: Any,
) -> Encoder:
    """Convert, go through every stage and save.

    Args:
        recipe: from `load_recipe`.
        output: the encoder is saved here, with recipe.json that says how it came about; what the stages leave
            is in `stages/` inside. The same call after an interruption goes on where it stopped.
        model: instead of the recipe's.
        data: kind of stage -> data as `train` takes it, instead of the recipe's. A prune stage without data
            takes that of the next stage of pairs.
        data_dir: where sources local:NAME are; by default UNCAUSAL_DATA.
        resume: False starts every stage afresh.
        eval: as in `train`, after every stage.
        options: override the recipe's arguments of `Encoder.from_pretrained`; by default weights are float32.

    Returns:
        The encoder.

    Raises:
        RecipeError: a stage has no data.
        DataError: a stage's data are wrong; the message names the stage, and where it is one row's fault the
            file and the row.
        ValueError: another process is at work in `output`.
    """
    steps, stages = recipe.with_data(data, data_dir), Path(output) / "stages"
    name = str(model or recipe.model)
    check_teachers(steps, stages, resume, model)
    with torch.random.fork_rng():  # new weights, as latent pooling's, are the same for the same call again
        torch.manual_seed(0)
        encoder = Encoder.from_pretrained(name, **recipe.loading(options))
    process_state(encoder.device)
    records, teacher = [], None
    with only_run(stages):
        if not resume:
            with together():
                if PartialState().is_main_process:
                    own = (path for path in stages.iterdir() if re.fullmatch(OF_A_STAGE, path.name))
                    for earlier in sorted(path for path in own if path.is_dir() and not path.is_symlink()):
                        remove(earlier)
        for number, step in enumerate(steps, 1):
            folder = stages / f"{number}-{step.kind}"
            with named(f"stage {number} ({step.kind})"):
                set_pooling(encoder, step)
                if isinstance(step.settings, Pruning):
                    teacher = folder / TEACHER
                    if _teaches(steps[number:]):
                        save_once(encoder, teacher, resume)
                    choice = choose(step, encoder, name, folder, data_dir, resume, progress)
                    encoder.prune(choice.kept)
                    outcome = choice._asdict()
                elif isinstance(step.settings, Whitening):
                    append_linear(encoder, whitening(step, encoder, folder, data_dir, resume, progress))
                    outcome = {}
                else:
                    given = {"model": model, "data_dir": data_dir, "resume": resume, "progress": progress}
                    given |= {name: options[name] for name in OF_LOADING if name in options}
                    teach = partial(made_teacher, folder / TEACHERS, **given)
                    stage = settings_of(step, teacher, folder, resume, teach)
                    result = train(
                        encoder, stage, step.read(data_dir), folder, resume, eval, progress=progress
                    )
                    outcome = {"metrics": result.metrics, **outcome_of(folder)}
                    logger.info("%s: %s", step.kind, outcome)
            records.append({**describe_step(step), "pooling": encoder.pooling, "outcome": outcome})
        save(encoder, Path(output), recipe, name, records)
    return encoder


def check_teachers(
    steps: Sequence[Step], stages: Path, resume: bool = True, model: str | Path | None = None
) -> None:
    """Miss an installed package that a teacher is in now, and not when its stage comes.

    `model` stands in place of those of recipes that teach, as in `run_recipe`.

    Raises:
        FileNotFoundError: there is no such package, and the stage's vectors are not there either.
    """
    for number, step in enumerate(steps, 1):
        folder = stages / f"{number}-{step.kind}"
        kept = resume and (folder / VECTORS).exists()
        if not isinstance(step.settings, Distill) or step.settings.vectors or kept:
            continue
        for place, teacher in enumerate(step.settings.teachers):
            if not teacher.startswith(RECIPE):
                check_model(teacher)
            elif not (resume and (folder / TEACHERS / str(place) / RESULT).exists()):
                taught = load_recipe(teacher.removeprefix(RECIPE))
                check_model(str(model or taught.model))
                check_teachers(taught.steps, folder / TEACHERS / str(place) / "stages", resume)


def set_pooling(encoder: Encoder, step: Step) -> None:
    """Set the pooling that a step asks for, unless the encoder has it; a rerun draws the same new weights."""
    if step.pooling not in (None, encoder.pooling):
        with torch.random.fork_rng():
            torch.manual_seed(getattr(step.settings, "seed", 0))
            encoder.set_pooling(step.pooling)  # pyright: ignore[reportArgumentType]


def settings_of(
    step: Step, teacher: Path | None, folder: Path, resume: bool, teach: Callable[[str, str, int], Path]
) -> Stage:
    """The stage of a step; for the teacher "self" the encoder before the last prune step, for others `teach`.

    A teacher encodes once: its vectors are kept beside the checkpoints, until another teaches.
    """
    stage: Any = step.settings
    if isinstance(stage, Distill) and stage.teachers:
        places = list(stage.teachers)
        for number, name in enumerate(places):
            if name == SELF:
                places[number] = str(teacher)
            elif name.startswith(RECIPE):
                places[number] = str(teach(str(number), name, stage.seed))
        stage = replace(stage, teacher=places[0] if isinstance(stage.teacher, str) else places)
    if not isinstance(stage, Distill) or stage.vectors is not None:
        return stage
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / VECTORS
    with together():
        if PartialState().is_main_process and not (resume and stage.wrote(file)):
            file.unlink(missing_ok=True)
            for parts in [] if resume else folder.glob(f".{VECTORS}.*{PARTS}"):
                shutil.rmtree(parts)
    return replace(stage, vectors=str(file))


def made_teacher(folder: Path, place: str, name: str, seed: int, **given: Any) -> Path:
    """Follow the recipe of a teacher "recipe:NAME" in `folder / place`, unless that is done.

    `given` are arguments of `run_recipe`: a teacher is made of the same model, where one is given.
    """
    recipe, output = load_recipe(name.removeprefix(RECIPE)).with_seed(seed), folder / place
    note = Path(f"{output}.json")  # which the note of its vectors quotes
    steps = [{**describe_step(step), "pooling": step.pooling, "read": _prints(step)} for step in recipe.steps]
    model, root = str(given["model"] or recipe.model), _root(given["data_dir"])
    told = {"recipe": name, "model": model, "options": recipe.options, "steps": steps, "data_dir": root}
    told |= {name: given[name] for name in ("attention", "dtype") if name in given}
    told = json.loads(json.dumps(told, default=str))
    if given["resume"] and _noted(note) == told and (output / RESULT).exists():
        return output
    logger.info("making the teacher %s", name)
    with together():
        if PartialState().is_main_process:
            note.unlink(missing_ok=True)
    run_recipe(recipe, output, **given)
    with together():
        if PartialState().is_main_process:
            with staged_file(note) as out:
                out.write(json.dumps(told).encode())
    return output


def choose(
    step: Step, encoder: Encoder, model: str, folder: Path, data_dir: Any, resume: bool, progress: bool
) -> Choice:
    """Decide a depth, or take what an earlier run decided for the same settings, data and model."""
    pruning: Any = step.settings
    file, made_for = folder / CHOICE, _told(asked_of(step, model, data_dir), encoder)
    if resume and (found := kept_choice(file, made_for)):
        return found
    triplets = step.read(data_dir) if pruning.needs_data else None
    choice = pruning.choose(encoder, triplets, show_progress_bar=progress)
    logger.info("pruning: %s", choice)
    with together():
        if PartialState().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            with staged_file(file) as out:
                out.write(json.dumps({"made_for": made_for, **choice._asdict()}, indent=2).encode())
    return choice


def asked_of(step: Step, model: str, data_dir: Any) -> dict[str, Any]:
    """What a depth is decided by, beside what was trained before; `model` is the name of the first."""
    pruning: Any = step.settings
    told = {"settings": asdict(pruning), "begun": model}
    if pruning.needs_data:
        told |= {"data": _prints(step), "data_dir": _root(data_dir)}
    return told


def _root(data_dir: Any) -> str:
    return str(data_dir or os.environ.get(VARIABLE))


def kept_choice(file: Path, made_for: Mapping[str, Any]) -> Choice | None:
    """The depth that a file holds, if it was decided for the same; the encoder may be left out."""
    found = _noted(file) or {}
    known = found.get("made_for", {})
    if {**known, **made_for} != known:
        return None
    return Choice(found["kept"], found["depths"] and Depths(*found["depths"]), found["losses"])


def whitening(
    step: Step, encoder: Encoder, folder: Path, data_dir: Any, resume: bool, progress: bool
) -> LinearMap:
    """Fit a whitening, or take what an earlier run fitted to the same encoder and data.

    Made again, it would be another in its last bits, and no stage after it could go on.
    """
    settings: Any = step.settings
    data = step.read(data_dir)
    texts = texts_of_pairs(read_pairs(data), settings.max_texts) if step.takes_pairs else data
    settings.weigh(encoder, texts)
    made_for = _told({"settings": asdict(settings), "texts": text_digest(texts)}, encoder)
    note, weights = folder / CHOICE, folder / MAP
    if resume and _noted(note) == made_for:
        return LinearMap.load(str(weights)).requires_grad_(False)
    fitted = settings.fit(encoder, texts, progress=progress)
    with together():
        if PartialState().is_main_process:
            with staged(weights) as out:
                fitted.save(str(out))
            with staged_file(note) as out:
                out.write(json.dumps(made_for).encode())
    return fitted


def _noted(note: Path) -> Any:
    """What a note holds, None where there is none; every process has looked before one writes another."""
    found = None
    with together(), suppress(OSError, ValueError):
        found = json.loads(note.read_text())
    return found


def _told(asked: dict[str, Any], encoder: Encoder) -> dict[str, Any]:
    """What a depth or a map depends on, as JSON gives it back."""
    return json.loads(json.dumps({**asked, "encoder": describe_encoder(encoder)}, default=str))


def _prints(step: Step) -> list[Any]:
    """What tells a step's data from others; a file is told by its size and its time."""
    sources = step.data.values() if isinstance(step.data, Mapping) else [step.data]
    names = [str(Path(x).expanduser()) for x in sources if isinstance(x, str | Path)]
    names = [
        place
        for name in names
        for place in ([name] if Path(name).exists() else sorted(glob(name, recursive=True)))
    ]
    files = [Path(name).stat() for name in names if Path(name).is_file()]
    # of a Dataset the print, as its repr tells columns alone
    prints = [getattr(x, "_fingerprint", None) for x in sources]
    return [repr(step.data), repr(step.lender), prints, [[x.st_size, x.st_mtime_ns] for x in files]]


def texts_of_pairs(pairs: Dataset | DatasetDict, count: int) -> list[str]:
    """About `count` texts of pairs, of every set and column alike."""
    columns = [
        (part, name)
        for part in (pairs.values() if isinstance(pairs, DatasetDict) else [pairs])
        for name in text_columns(part)
    ]
    share = -(-count // len(columns))
    return [text for part, name in columns for text in part.shuffle(seed=0)[:share][name]]


def save_once(encoder: Encoder, folder: Path, resume: bool) -> None:
    """Save the encoder for a later stage to learn from, unless it is there already."""
    note, digest = folder.with_suffix(".json"), json.loads(json.dumps(describe_encoder(encoder), default=str))
    with together():
        known = resume and folder.exists() and note.exists() and json.loads(note.read_text()) == digest
        if PartialState().is_main_process and not known:
            encoder.save_pretrained(str(folder))
            with staged_file(note) as out:
                out.write(json.dumps(digest).encode())


def save(encoder: Encoder, output: Path, recipe: Recipe, model: str, records: list[dict[str, Any]]) -> None:
    """Save the encoder, recipe.json beside it, and a section of the model card that says the same."""
    record = {"recipe": recipe.name, "variant": recipe.variant, "model": model, "stages": records}
    record["versions"] = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    with together():
        if not PartialState().is_main_process:
            return
        encoder.model_card_data.tags = sorted(
            {*(encoder.model_card_data.tags or ()), "uncausal", recipe.name}
        )
        encoder.save_pretrained(str(output))
        with staged_file(output / RESULT) as out:
            out.write(json.dumps(record, indent=2, default=str).encode())
        card = output / "README.md"
        if is_generated_card(card):
            with staged_file(card) as out:
                out.write((card.read_text("utf8") + card_section(record)).encode())


def card_section(record: Mapping[str, Any]) -> str:
    """The model card's section on the recipe, in Markdown."""
    variant = f", variant `{record['variant']}`" if record["variant"] else ""
    lines = [
        "",
        "",
        "## Recipe",
        "",
        f"`{record['recipe']}` of uncausal{variant}, on `{record['model']}`.",
        "",
    ]
    lines += ["| stage | data | settings | outcome |", "|---|---|---|---|"]
    for stage in record["stages"]:
        outcome = {key: value for key, value in stage["outcome"].items() if value and key not in ("losses",)}
        cells = (_listed(stage[key]) for key in ("data", "settings"))
        lines.append(
            f"| {stage['kind']}, {stage['pooling']} pooling | {' | '.join(cells)} | {_listed(outcome)} |"
        )
    lines += ["", f"Versions: {_listed(record['versions'])}.", ""]
    return "\n".join(lines)


def describe_step(step: Step) -> dict[str, Any]:
    """What a step is: its kind, where its data come from, and the settings that are not the defaults."""
    data = step.data
    if not isinstance(data, str | Path):
        several = isinstance(data, Mapping) and all(isinstance(source, str) for source in data.values())
        data = dict(data) if several else None if data is None else f"a {type(data).__name__}"
    defaults = {f.name: f.default for f in dataclasses.fields(step.settings)}
    settings = {name: value for name, value in asdict(step.settings).items() if value != defaults[name]}
    return {
        "kind": step.kind,
        "data": data,
        "settings": {k: v for k, v in settings.items() if v not in ({}, ())},
    }


def outcome_of(folder: Path) -> dict[str, Any]:
    """What a trained stage's record says: steps, tokens and seconds of its last run, and the last loss."""
    record = json.loads((folder / FINAL / RECORD).read_text())
    losses = [line["loss"] for line in record["history"] if "loss" in line]
    kept = {name: record[name] for name in ("steps", "tokens", "seconds") if name in record}
    return {**kept, "loss": losses[-1] if losses else None}


def _teaches(steps: list[Step]) -> bool:
    """Whether a stage before the next pruning learns from the encoder as it is now."""
    for step in steps:
        if isinstance(step.settings, Pruning):
            return False
        if isinstance(step.settings, Distill) and SELF in step.settings.teachers:
            return True
    return False


def _listed(values: Any) -> str:
    if not isinstance(values, Mapping):
        return str(values or "")
    shown = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
