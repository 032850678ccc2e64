"""Recipes: TOML files that say how a model becomes an encoder, from conversion to the last stage.

name = "mine"
[model]            arguments of Encoder.from_pretrained, `name` among them
[[stage]]          in order: kind = "mntp", "simcse", "contrastive", "instruction" or "distill", and fields of
                   that stage; or kind = "prune" or "whiten", and fields of Pruning or Whitening. Any may have
                   data = a file, a dataset's name, local:NAME (data/local.py), or a table of them, a set each
                   pooling = what the encoder pools with from here on; a teacher may be "self", the encoder
                   before the last prune step, or "recipe:NAME", what another recipe makes
[variant.NAME]     overrides: model.name = ..., stage.mntp.mask_probability = ... (all stages of that kind),
                   without = kinds left out. "one+other" applies two, one after another.
"""

import dataclasses
import difflib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

import uncausal
from uncausal.encoder.data.local import PREFIX, SETS, check_local, local_rows, split_name
from uncausal.encoder.data.pairs import LABEL, read_pairs
from uncausal.encoder.data.rows import check_source
from uncausal.encoder.data.texts import read_texts
from uncausal.encoder.loading import EncoderSpec
from uncausal.encoder.pooling import POOLING_MODES
from uncausal.encoder.pruning import Pruning
from uncausal.encoder.training.stages.base import Stage
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.registry import STAGES
from uncausal.encoder.whitening import Whitening

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

INCLUDED = Path(uncausal.__file__).parent / "recipes"
SECTIONS = ("name", "model", "stage", "variant")
MODEL_KEYS = ("bidirectional", "pooling", "template", "end_token", "num_layers", "attention", "dtype")
MODEL_KEYS += ("normalize", "max_seq_length")
STEP_KEYS = ("kind", "data", "pooling")
KINDS = {**STAGES, "prune": Pruning, "whiten": Whitening}
POOLINGS = (*POOLING_MODES, "latent")
SELF, RECIPE = "self", "recipe:"  # teachers: the encoder before pruning, and what another recipe makes
# Of weights that are trained: a step, or a small adapter when it is merged, is less than the last place of
# most bfloat16 weights. Products are in bfloat16 all the same where the hardware has it.
TRAINED_IN = "float32"


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the file and the key."""


@dataclass
class Step:
    """A stage of a recipe, a pruning or a whitening.

    Attributes:
        kind: its name in the recipe.
        settings: what it is trained with, how many layers are kept, or how its vectors are whitened.
        data: a source, or set name -> source; None where the caller must give it.
        pooling: what the encoder pools with from here on; None keeps what it has.
        lender: the later stage whose pairs the data are.
    """

    kind: str
    settings: Stage | Pruning | Whitening
    data: Any = None
    pooling: str | None = None
    lender: Any = None

    @property
    def takes_pairs(self) -> bool:
        return isinstance(self.settings, Contrastive | Pruning) or self.lender is not None

    @property
    def needs_data(self) -> bool:
        return self.settings.needs_data if isinstance(self.settings, Pruning) else True

    def read(self, folder: str | Path | None = None) -> Any:
        """Return the data as the stage takes it; `folder` is the data directory of sources local:NAME."""
        given = self.data.values() if isinstance(self.data, Mapping) else [None]
        several = all(isinstance(source, str | Path) for source in given)
        sets = {name: _read(source, folder) for name, source in self.data.items()} if several else None
        if self.takes_pairs:
            data = _read(self.data, folder) if sets is None else sets
            told = {name: getattr(self.lender, name, None) for name in ("columns", "negatives", "min_score")}
            return read_pairs(data, **told) if any(x is not None for x in told.values()) else data
        parts = [_read(self.data, folder)] if sets is None else list(sets.values())
        return [text for part in parts for text in _texts(part)]


@dataclass
class Recipe:
    """A recipe with its variants applied.

    Attributes:
        name: of the recipe. variant: what was applied, or None where there is none.
        model: Hugging Face id or path. options: further arguments of `Encoder.from_pretrained`.
        steps: in order.
    """

    name: str
    variant: str | None
    model: str
    options: dict[str, Any]
    steps: list[Step]

    def loading(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `Encoder.from_pretrained`: the caller's, the recipe's, and float32 weights."""
        return {"dtype": TRAINED_IN, **self.options, **options}

    def with_seed(self, seed: int) -> "Recipe":
        """Return the recipe with another seed in every step that draws anything."""
        drawn = [
            replace(s, settings=replace(s.settings, seed=seed)) if hasattr(s.settings, "seed") else s
            for s in self.steps
        ]
        return replace(self, steps=drawn)

    def with_data(self, data: Mapping[str, Any] | None, folder: str | Path | None = None) -> list[Step]:
        """Return the steps with the caller's data, checked as far as it goes without reading them.

        Args:
            data: kind of stage -> data, instead of the recipe's. A prune or whiten step without any takes
                that of the next stage of pairs.
            folder: the data directory of sources local:NAME.

        Raises:
            RecipeError: a stage has no data, or there is no such stage.
            DataError, FileNotFoundError: there is no such local set, no data directory, or no such file.
        """
        given, kinds = dict(data or {}), [step.kind for step in self.steps]
        for kind in given.keys() - {*kinds}:
            raise RecipeError(f"recipe {self.name!r} has no stage {kind!r}{_nearest(kind, kinds)}")
        steps = [replace(step, data=given.get(step.kind, step.data)) for step in self.steps]
        for step in steps:
            if step.kind in given and isinstance(step.settings, Contrastive) and step.settings.weights:
                step.settings = replace(step.settings, weights={})  # of sets that are gone
        for number, step in enumerate(steps):
            if step.kind in ("prune", "whiten") and step.needs_data and step.data is None:
                later = (s for s in steps[number + 1 :] if s.takes_pairs and s.data is not None)
                if lender := next(later, None):
                    step.data, step.lender = lender.data, lender.settings
        missing = list(dict.fromkeys(s.kind for s in steps if s.needs_data and s.data is None))
        if missing:
            raise RecipeError(
                f"recipe {self.name!r} needs data for {', '.join(missing)}: "
                f"data={{{missing[0]!r}: ...}}, or --data {missing[0]}=FILE"
            )
        for step in steps:
            for name in _names(step.data):
                if not name.startswith(PREFIX):
                    check_source(name)
                    continue
                check_local(name, folder)
                if step.takes_pairs and split_name(name)[0] not in SETS:
                    raise RecipeError(
                        f"recipe {self.name!r}: {name} holds texts, and {step.kind} takes pairs"
                    )
        return steps


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
        path: TOML file, or the name of a recipe that comes with the package; "code-mini" is its variant mini.
        variant: one of the file's, or several joined by "+"; the first by default.

    Raises:
        FileNotFoundError: no such file.
        RecipeError: malformed TOML, an unknown key (the nearest valid one is named) or an impossible value.
    """
    path, variant = _find_variant(path, variant)
    recipe = _parse(path, variant)
    for number, name in _recipes_that_teach(recipe):
        where, (taught, of) = f"{path}: stage {number}: teacher {RECIPE + name!r}", _find_variant(name, None)
        if taught.samefile(path):
            raise RecipeError(f"{where} is this recipe itself")
        if any(_recipes_that_teach(_parse(taught, of))):  # they could go in rings
            raise RecipeError(f"{where} is taught by a recipe in turn")
    return recipe


def _recipes_that_teach(recipe: Recipe) -> Iterator[tuple[int, str]]:
    """The stage's number and the name of every teacher "recipe:NAME"."""
    for number, step in enumerate(recipe.steps, 1):
        for teacher in getattr(step.settings, "teachers", ()):
            if teacher.startswith(RECIPE):
                yield number, teacher.removeprefix(RECIPE)


def _parse(path: Path, variant: str | None) -> Recipe:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    _check_keys(content, SECTIONS, str(path))
    _check_types({"name": content.get("name", "")}, {"name": str}, str(path))
    tables = content.get("stage", [])
    if not isinstance(tables, list) or not isinstance(content.get("model"), dict):
        raise RecipeError(f"{path}: needs a table [model] and stages as [[stage]]")
    variants = content.get("variant", {})
    if variant is None:
        variant = next(iter(variants), None)
    for name in variant.split("+") if variant else ():
        if name not in variants:
            raise RecipeError(f"{path}: no variant {name!r}{_nearest(name, variants)}")
        tables = _override(content, tables, variants[name], f"{path}: [variant.{name}]")
    model = dict(content["model"])
    if "name" not in model:
        raise RecipeError(f"{path}: [model] has no name")
    _check_keys(model, ("name", *MODEL_KEYS), f"{path}: [model]")
    _check_types(model, {"name": str, **get_type_hints(EncoderSpec)}, f"{path}: [model]")
    steps = []
    for number, table in enumerate(tables, 1):
        steps.append(_step(table, f"{path}: stage {number}"))
        for teacher in getattr(steps[-1].settings, "teachers", ()):
            if teacher == SELF and all(step.kind != "prune" for step in steps):
                raise RecipeError(f"{path}: stage {number}: teacher {SELF!r} needs a prune stage before it")
    return Recipe(content.get("name", path.stem), variant, model.pop("name"), model, steps)


def _find_variant(path: str | Path, variant: str | None) -> tuple[Path, str | None]:
    """The file and the variant of a recipe, where "code-mini" is code's variant mini."""
    if variant is None:
        joined = {f"{name}-{one}": (name, one) for name, names in list_recipes().items() for one in names}
        path, variant = joined.get(str(path), (path, None))
    return find_recipe(path), variant


def _step(table: Mapping[str, Any], where: str) -> Step:
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecipeError(f"{where}: kind is {kind!r}{_nearest(str(kind), KINDS)}")
    where = f"{where} ({kind})"
    pooling, data = table.get("pooling"), table.get("data")
    if pooling is not None and pooling not in POOLINGS:
        raise RecipeError(f"{where}: pooling is {pooling!r}{_nearest(str(pooling), POOLINGS)}")
    sources = data.values() if isinstance(data, dict) else [data]
    if data is not None and not all(isinstance(source, str) for source in sources):
        raise RecipeError(f"{where}: data is {data!r}; it must be a source, or a table of sources")
    names = [field.name for field in dataclasses.fields(KINDS[kind])]
    _check_keys(table, (*names, *STEP_KEYS), where)
    given = {key: value for key, value in table.items() if key not in STEP_KEYS}
    _check_types(given, get_type_hints(KINDS[kind]), where)
    try:
        settings = KINDS[kind](**given)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from None
    return Step(kind, settings, data, pooling)


def _override(
    content: dict[str, Any], tables: list[dict[str, Any]], changes: dict[str, Any], where: str
) -> list[dict[str, Any]]:
    """Apply a variant to the content's [model]; return the stages with it applied."""
    forms = {"model": dict, "stage": dict, "without": list}
    _check_keys(changes, tuple(forms), where)
    for key, value in changes.items():
        parts = value.values() if key == "stage" and isinstance(value, dict) else ()
        if not isinstance(value, forms[key]) or not all(isinstance(part, dict) for part in parts):
            wanted = "list" if key == "without" else "table"
            raise RecipeError(f"{where}: {key} is {value!r}; it must be a {wanted}")
    content["model"] = {**content["model"], **changes.get("model", {})}
    kinds = [table.get("kind", "") for table in tables]
    without = changes.get("without", [])
    for kind in (*without, *changes.get("stage", {})):
        if kind not in kinds:
            raise RecipeError(f"{where}: no stage {kind!r}{_nearest(str(kind), map(str, kinds))}")
    kept = [table for table in tables if table.get("kind") not in without]
    stages = changes.get("stage", {})
    return [{**table, **next((stages[k] for k in stages if k == table.get("kind")), {})} for table in kept]


def _read(source: Any, folder: str | Path | None) -> Any:
    local = isinstance(source, str) and source.startswith(PREFIX)
    return local_rows(source, folder) if local else source


def _texts(source: Any) -> Iterable[str]:
    """The texts of a source; a local set of pairs gives those of its rows, each once."""
    if isinstance(source, str | Path):
        return read_texts(source)
    if not isinstance(source, list) or not source or not isinstance(source[0], dict):
        return source
    return list(dict.fromkeys(text for row in source for key, text in row.items() if key != LABEL))


def _names(data: Any) -> Iterator[str]:
    """The names of files and sets among data that may be rows as well."""
    for source in data.values() if isinstance(data, Mapping) else [data]:
        if isinstance(source, str | Path):
            yield str(source)


def _check_keys(table: Mapping[str, Any], valid: Sequence[str], where: str) -> None:
    for key in table:
        if key not in valid:
            raise RecipeError(f"{where}: unknown key {key!r}{_nearest(key, valid)}")


def _check_types(table: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    for key, value in table.items():
        if key == "trainer_arguments" and isinstance(
            value, Mapping
        ):  # whose values are the Trainer's to check
            continue
        try:
            check_type(value, types[key], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            # to Python True is an int, and a str a sequence of them
            union = get_origin(types[key]) in (Union, UnionType)
            plain = get_args(types[key]) if union else (types[key],)
            if isinstance(value, bool | str) and not {type(value), Literal, Any} & {
                get_origin(t) or t for t in plain
            }:
                raise TypeCheckError(key)
        except TypeCheckError:
            wanted = inspect.formatannotation(types[key]).replace("collections.abc.", "")
            raise RecipeError(f"{where}: {key} is {value!r}; it must be {wanted}") from None


def _nearest(word: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(valid) or 'none'}"
