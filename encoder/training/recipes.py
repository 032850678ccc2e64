"""Recipes: TOML files that say how a model becomes an encoder, from conversion to the last stage.

name = "mine"
[model]                 arguments of Encoder.from_pretrained, `name` among them
[pruning]               optional: keep = "small", "large" or a number, or drop = a fraction
[[stage]]               in order: kind = "mntp", "simcse" or "contrastive", data, and fields of that stage
[variant.NAME]          overrides: model.name = ..., pruning.keep = ..., stage.mntp.mask_probability = ...
"""

import dataclasses
import difflib
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uncausal
from uncausal.encoder.pruning import Pruning
from uncausal.encoder.training.stages.base import Stage
from uncausal.encoder.training.stages.registry import STAGES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)
INCLUDED = Path(uncausal.__file__).parent / "recipes"
SECTIONS = ("name", "model", "pruning", "stage", "variant")
MODEL_KEYS = ("bidirectional", "pooling", "num_layers", "attention", "dtype", "normalize", "max_seq_length")


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the file and the key."""


@dataclass
class Recipe:
    """A recipe with one variant applied.

    Attributes:
        name: of the recipe. variant: the one applied, or None where there is none.
        model: Hugging Face id or path. options: further arguments of `Encoder.from_pretrained`.
        pruning: or None.
        stages: in order. data: one source per stage, or None where the caller must give it.
    """

    name: str
    variant: str | None
    model: str
    options: dict[str, Any]
    pruning: Pruning | None
    stages: list[Stage]
    data: list[Any] = field(default_factory=list)


def list_recipes() -> dict[str, list[str]]:
    """Return the recipes that come with the package, each with its variants."""
    files = sorted(INCLUDED.glob("*.toml"))
    return {file.stem: list(tomllib.loads(file.read_text("utf-8")).get("variant", {})) for file in files}


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe, given as a path or by the name of one that comes with the package.

    Raises:
        FileNotFoundError: there is neither; the message lists the names.
    """
    for path in (Path(name), INCLUDED / f"{name}.toml"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no recipe {str(name)!r}: give a TOML file or one of {', '.join(list_recipes())}"
    )


def load_recipe(path: str | Path, variant: str | None = None) -> Recipe:
    """Read a recipe and check every key.

    Args:
        path: TOML file, or the name of a recipe that comes with the package.
        variant: one of the file's; the first by default.

    Raises:
        FileNotFoundError: no such file.
        RecipeError: malformed TOML, an unknown key (the nearest valid one is named) or an impossible value.
    """
    path = find_recipe(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    _check_keys(content, SECTIONS, str(path))
    variants = content.pop("variant", {})
    if variant is None:
        variant = next(iter(variants), None)
    elif variant not in variants:
        raise RecipeError(f"{path}: no variant {variant!r}{_nearest(variant, variants)}")
    stages = content.get("stage", [])
    if not isinstance(stages, list) or not isinstance(content.get("model"), dict):
        raise RecipeError(f"{path}: needs a table [model] and stages as [[stage]]")
    if variant is not None:
        _override(content, stages, variants[variant], f"{path}: [variant.{variant}]")
    model = dict(content["model"])
    if "name" not in model:
        raise RecipeError(f"{path}: [model] has no name")
    _check_keys(model, ("name", *MODEL_KEYS), f"{path}: [model]")
    pruning = None
    if "pruning" in content:
        pruning = _build(Pruning, content["pruning"], f"{path}: [pruning]")
    built, data = [], []
    for number, table in enumerate(stages, 1):
        table, where = dict(table), f"{path}: stage {number}"
        kind = table.pop("kind", None)
        if kind not in STAGES:
            raise RecipeError(f"{where}: kind is {kind!r}{_nearest(str(kind), STAGES)}")
        data.append(table.pop("data", None))
        built.append(_build(STAGES[kind], table, f"{where} ({kind})", extra=("kind", "data")))
    name = content.get("name", path.stem)
    return Recipe(name, variant, model.pop("name"), model, pruning, built, data)


def run_recipe(
    recipe: Recipe,
    output: str | Path,
    *,
    model: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    resume: bool = True,
    eval: Callable[[Any], Mapping[str, float]] | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Convert, prune, train every stage and save.

    Args:
        recipe: from `load_recipe`.
        output: the encoder is saved here, and the stages leave their adapters in `stages/` inside. The same
            call after an interruption goes on where it stopped.
        model: instead of the recipe's.
        data: kind of stage -> data as `train` takes it, instead of the recipe's. Pruning by losses uses that
            of "pruning", else of "contrastive".
        resume: False starts every stage afresh.
        eval: as in `train`, after every stage.
        options: override the recipe's arguments of `Encoder.from_pretrained`.

    Returns:
        The encoder.

    Raises:
        RecipeError: a stage has no data.
    """
    from uncausal.encoder.model import Encoder
    from uncausal.encoder.training.run import train

    given = dict(data or {})
    kinds = [stage.name for stage in recipe.stages]
    unknown = sorted(given.keys() - {*kinds, "pruning"})
    if unknown:
        raise RecipeError(f"recipe {recipe.name!r} has no stage {unknown[0]!r}{_nearest(unknown[0], kinds)}")
    sources = [given.get(k, source) for k, source in zip(kinds, recipe.data, strict=True)]
    missing = [kind for kind, source in zip(kinds, sources, strict=True) if source is None]
    triplets = given.get("pruning", dict(zip(kinds, sources, strict=True)).get("contrastive"))
    if recipe.pruning is not None and recipe.pruning.needs_data and triplets is None:
        missing.insert(0, "pruning")
    if missing:
        raise RecipeError(
            f"recipe {recipe.name!r} needs data for {', '.join(missing)}: "
            f"data={{{missing[0]!r}: ...}}, or --data {missing[0]}=FILE"
        )
    encoder: Any = Encoder.from_pretrained(model or recipe.model, **{**recipe.options, **options})
    if recipe.pruning is not None:
        choice = recipe.pruning.choose(encoder, triplets, show_progress_bar=progress)
        logger.info("pruning: %s", choice)
        encoder.prune(choice.kept)
    for number, (stage, source) in enumerate(zip(recipe.stages, sources, strict=True), 1):
        folder = Path(output) / "stages" / f"{number}-{stage.name}"
        result = train(encoder, stage, source, folder, resume, eval, progress=progress)
        logger.info(
            "%s: %d steps, %.0f tokens/s %s",
            stage.name,
            result.steps,
            result.tokens_per_second,
            result.metrics,
        )
    encoder.save_pretrained(str(output))
    return encoder


def _override(content: dict[str, Any], stages: list[dict], changes: dict[str, Any], where: str) -> None:
    _check_keys(changes, ("model", "pruning", "stage"), where)
    for section in ("model", "pruning"):
        if section in changes:
            content[section] = {**content.get(section, {}), **changes[section]}
    for kind, fields in changes.get("stage", {}).items():
        matching = [stage for stage in stages if stage.get("kind") == kind]
        if not matching:
            raise RecipeError(
                f"{where}: no stage {kind!r}{_nearest(kind, [s.get('kind', '') for s in stages])}"
            )
        for stage in matching:
            stage.update(fields)


def _build(cls: Any, table: Mapping[str, Any], where: str, extra: Sequence[str] = ()) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    _check_keys(table, (*names, *extra), where)
    try:
        return cls(**table)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from None


def _check_keys(table: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    for key in table:
        if key not in set(valid):
            raise RecipeError(f"{where}: unknown key {key!r}{_nearest(key, valid)}")


def _nearest(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(valid) or 'none'}"
