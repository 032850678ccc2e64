"""Commands that train: one of a stage each, and run, which follows a recipe."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from accelerate import PartialState
from tyro.conf import FlagConversionOff, Positional, UseAppendAction

from uncausal.encoder.cli.encoding import read
from uncausal.encoder.cli.options import Json, Loading, check_writable, facts, report
from uncausal.encoder.data.local import VARIABLE
from uncausal.encoder.data.rows import check_source, named
from uncausal.encoder.evaluation.sts import evaluate_sts, read_sts
from uncausal.encoder.files import check_replaceable
from uncausal.encoder.training import run as training
from uncausal.encoder.training.follow import run_recipe
from uncausal.encoder.training.plan import plan_recipe, plan_table
from uncausal.encoder.training.ranks import together
from uncausal.encoder.training.recipes import TRAINED_IN, list_recipes, load_recipe
from uncausal.encoder.training.stages.contrastive import Contrastive
from uncausal.encoder.training.stages.registry import STAGES


def train_command(kind: str) -> Callable[..., None]:
    """The command `uncausal train KIND`; the stage's fields and its docstring are the options."""
    cls = STAGES[kind]

    def command(
        model: Positional[str],
        data: Positional[str],
        output: Positional[Path],
        /,
        *,
        column: str = "text",
        no_resume: bool = False,
        stage: Annotated[cls, FlagConversionOff],  # pyright: ignore[reportInvalidTypeForm]
        loading: Loading = Loading(),
        as_json: Json = False,
    ) -> None:
        """Placeholder.

        Weights are float32 unless --dtype says otherwise; products are in bfloat16 where the hardware has it.

        Args:
            model: encoder folder, or anything `convert` takes.
            data: text, JSONL, CSV, TSV or Parquet file, or a dataset's name.
            output: folder to write; an interrupted run resumes from it.
            column: field that holds the text.
            no_resume: start again even if checkpoints are there.
        """
        if column != "text" and issubclass(cls, Contrastive):
            raise ValueError("--column is the field of texts; the fields of pairs are --columns")
        check_writable(output, folder=True)
        check_replaceable(output)
        check_source(data)
        dtype: Any = TRAINED_IN if loading.dtype == "auto" else loading.dtype
        encoder = replace(loading, dtype=dtype).load(model)
        source = data if issubclass(cls, Contrastive) else read(data, column)
        with named(data):
            training.train(encoder, stage, source, output / "training", resume=not no_resume)
        with together():  # all processes have the same encoder
            if PartialState().is_main_process:
                encoder.save_pretrained(str(output))
                report(facts(encoder, output), as_json)

    summary = (cls.__doc__ or "").strip().splitlines()[0]
    command.__doc__ = (command.__doc__ or "").replace("Placeholder.", summary)
    return command


TRAIN = {kind: train_command(kind) for kind in STAGES}


def run(
    recipe: Positional[str | None] = None,
    output: Positional[Path | None] = None,
    /,
    *,
    list: bool = False,
    variant: str | None = None,
    model: str | None = None,
    data: UseAppendAction[tuple[str, ...]] = (),
    data_dir: Path | None = None,
    sts: Path | None = None,
    plan: bool = False,
    no_resume: bool = False,
    seed: int | None = None,
    as_json: Json = False,
) -> None:
    """Run every step of a recipe.

    Args:
        recipe: name of one that comes with the package (see --list), or of a variant (code-mini), or a file
        output: folder to write; an interrupted run resumes from it.
        list: print the recipes that come with the package and their variants.
        variant: one of the recipe's variants, or several as mini+no_mntp; by default the first.
        model: instead of the recipe's own model.
        data: data of a stage, as STAGE=FILE.
        data_dir: folder of the recipe's sources local:NAME; by default UNCAUSAL_DATA.
        sts: STS Benchmark file, or folder of sts-dev.csv, to score the encoder on after every stage, for its
            model card; by default stsbenchmark/ of the data directory, where it is.
        plan: train nothing; time a step of every stage and print steps, tokens, memory and hours.
        no_resume: start afresh and remove what an earlier run left in OUTPUT.
        seed: of every step, instead of the recipe's own; three of them tell luck from gain.
    """
    if list:
        if as_json:
            print(json.dumps(list_recipes()))
            return
        for name, variants in list_recipes().items():
            print(f"{name}: {', '.join(variants)}")
        return
    if recipe is None or output is None and not plan:
        raise ValueError(
            "uncausal run takes a RECIPE and an OUTPUT folder; uncausal run --list names the recipes"
        )
    sources = dict(item.split("=", 1) for item in data if "=" in item)
    if len(sources) != len(data):
        raise ValueError("--data takes STAGE=FILE, for example --data mntp=text.txt")
    loaded = load_recipe(recipe, variant)
    if seed is not None:
        loaded = loaded.with_seed(seed)
    options: dict[str, Any] = {"model": model, "data": sources, "data_dir": data_dir}
    if plan:
        planned = plan_recipe(loaded, output, **options)
        print(json.dumps(planned) if as_json else plan_table(planned))
        return
    assert output is not None
    check_writable(output, folder=True)
    check_replaceable(output)
    encoder = run_recipe(loaded, output, eval=scorer(sts, data_dir), resume=not no_resume, **options)
    if PartialState().is_main_process:
        report(facts(encoder, output), as_json)


def scorer(sts: Path | None, data_dir: Path | None) -> Callable[[Any], dict[str, float]] | None:
    """What scores an encoder on pairs of sentences: those given, or those of the data directory, if any."""
    if sts is None:
        root = data_dir or os.environ.get(VARIABLE)
        sts = Path(root, "stsbenchmark") if root else None
        if sts is None or not sts.is_dir():
            return None
    pairs = read_sts(sts, "dev" if sts.is_dir() else None)
    if len(pairs) < 2:
        raise ValueError(f"{sts}: a correlation needs at least 2 scored pairs, and there are {len(pairs)}")
    return lambda encoder: {"sts_dev_spearman": round(evaluate_sts(encoder, pairs).spearman, 2)}
