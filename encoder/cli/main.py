"""The `uncausal` command. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import uncausal


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (0 done, 1 failed, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser(train_options="train" in argv).parse_args(argv)
    if not arguments.debug:
        # The libraries below warn of what a user of this command can neither see nor change.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", module="peft")
    try:
        arguments.command(arguments)
    except KeyboardInterrupt as stop:  # training leaves a checkpoint and says how to go on
        print(f"uncausal: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
        if arguments.debug:
            raise
        print(f"uncausal: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser(train_options: bool = True) -> argparse.ArgumentParser:
    """Return the parser; the options of `train` come from the stages, whose import takes seconds."""
    parser = argparse.ArgumentParser(
        prog="uncausal",
        description="Turn any decoder-only language model into a strong, fast text encoder.",
        epilog="Every command answers to --help. `uncausal demo` shows the whole way in about ten minutes.",
    )
    parser.add_argument("--version", action="version", version=f"uncausal {uncausal.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    add = _adder(commands)
    command = add("convert", convert, "turn a causal checkpoint into an encoder folder", "ENCODER")
    command.add_argument("model", help="Hugging Face id, model folder or .gguf file")
    command.add_argument("output", type=Path, help="folder to write")
    _model_options(command)

    command = add("prune", prune, "keep the first layers, as many as L3Prune says", "ENCODER")
    command.add_argument("model", help="encoder folder, or anything `convert` takes")
    command.add_argument(
        "output", type=Path, help="folder to write; the curve is saved in it as layer_losses.png"
    )
    command.add_argument("--pairs", help="file of pairs or triplets for the loss of every layer")
    command.add_argument(
        "--keep", default="large", help="small, large, or a number of layers (default: large)"
    )
    command.add_argument("--drop", type=float, metavar="P", help="drop this fraction of the layers instead")
    command.add_argument("--limit", type=int, default=6400, help="read at most so many pairs (default: 6400)")
    _model_options(command, layers=False)

    command = add("train", None, "train one stage: mntp, simcse or contrastive")
    stages = command.add_subparsers(title="stages", required=True, metavar="STAGE")
    for stage, text in (
        ("mntp", "masked next token prediction on running text"),
        ("simcse", "contrastive: a sentence against itself under dropout"),
        ("contrastive", "contrastive: pairs or triplets"),
    ):
        command = _adder(stages)(stage, train, text, "ENCODER")
        command.set_defaults(stage=stage)
        command.add_argument("model", help="encoder folder, or anything `convert` takes")
        command.add_argument("data", help="text, JSONL, CSV, TSV or Parquet file, or a dataset's name")
        command.add_argument("output", type=Path, help="folder to write; an interrupted run resumes from it")
        command.add_argument("--column", default="text", help="field that holds the text (default: text)")
        command.add_argument(
            "--no-resume", action="store_true", help="start again even if checkpoints are there"
        )
        _model_options(command)
        if train_options:
            _stage_options(command, stage)

    command = add("eval", evaluate, "Spearman correlation on an STS set, and tokens a second", "FIGURES")
    command.add_argument("model", help="encoder folder, or anything `convert` takes")
    command.add_argument(
        "data", type=Path, help="STS Benchmark file, or the folder that holds sts-<split>.csv"
    )
    command.add_argument("--split", default="dev", help="train, dev (default) or test")
    _model_options(command)

    command = add("encode", encode, "write one vector per text")
    command.add_argument("model", help="encoder folder, or anything `convert` takes")
    command.add_argument("input", help="text, JSONL, CSV, TSV or Parquet file; - is stdin")
    command.add_argument(
        "output", type=Path, help="file to write: .npy, or .parquet with the texts beside them"
    )
    command.add_argument("--column", default="text", help="field that holds the text (default: text)")
    command.add_argument("--prompt", help="instruction put before every text; attended, not pooled")
    command.add_argument("--batch-tokens", type=int, help="tokens a batch")
    command.add_argument("--int8", action="store_true", help="int8 weights, on a CPU: faster, less exact")
    _model_options(command)

    command = add("search", search, "find the texts nearest to a query", "HITS")
    command.add_argument("model", help="encoder folder, or anything `convert` takes")
    command.add_argument("corpus", help="text, JSONL, CSV, TSV or Parquet file; - is stdin")
    command.add_argument("query", nargs="+", help="one or more queries")
    command.add_argument("--column", default="text", help="field that holds the text (default: text)")
    command.add_argument("--prompt", help="instruction put before the queries")
    command.add_argument("--top-k", type=int, default=5, help="hits a query (default: 5)")
    _model_options(command)

    command = add(
        "demo", demo, "SmolLM2-135M from language model to encoder, on real text, offline", "REPORT"
    )
    command.add_argument("output", type=Path, nargs="?", default=Path("demo"), help="folder (default: demo)")
    command.add_argument(
        "--quick", action="store_true", help="a few steps of everything, to see that it runs"
    )

    command = add("run", run, "run every step of a recipe (a TOML file; see recipes/)", "ENCODER")
    command.add_argument("recipe", type=Path, help="recipe file")
    command.add_argument("output", type=Path, help="folder to write; an interrupted run resumes from it")
    command.add_argument("--variant", help="one of the recipe's variants (default: the first)")
    command.add_argument("--model", help="instead of the recipe's own model")
    command.add_argument("--data", action="append", default=[], metavar="STAGE=FILE", help="data of a stage")
    return parser


def _adder(commands: Any) -> Any:
    def add(name: str, function: Any, text: str, json_of: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(command=function)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if json_of:
            command.add_argument(
                "--json", action="store_true", help=f"print one JSON object: {json_of.lower()}"
            )
        return command

    return add


def _model_options(command: argparse.ArgumentParser, layers: bool = True) -> None:
    group = command.add_argument_group("loading the model")
    group.add_argument("--pooling", choices=("mean", "weighted_mean", "last_token", "latent"))
    group.add_argument("--causal", action="store_true", help="keep causal attention")
    if layers:
        group.add_argument("--num-layers", type=int, metavar="N", help="keep the first N layers")
    group.add_argument("--attention", default="auto", help="auto (packed), sdpa or eager")
    group.add_argument("--gguf-file", help="GGUF file inside the model's folder")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    group.add_argument("--max-seq-length", type=int, metavar="N", help="cut texts after N tokens")


def _stage_options(command: argparse.ArgumentParser, name: str) -> None:
    """Offer every field of the stage as an option that takes a JSON value or plain text."""
    from uncausal.encoder.training.stages.registry import STAGES

    group = command.add_argument_group(
        "hyperparameters", "the papers' values by default; see `uncausal.encoder.training.stages`"
    )
    for field in fields(STAGES[name]):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, type=_value, metavar="VALUE", help=f"default: {json.dumps(default)}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _load(arguments: argparse.Namespace, **fixed: Any) -> Any:
    from uncausal.encoder.model import Encoder

    names = ("pooling", "num_layers", "attention", "gguf_file", "dtype", "device", "max_seq_length")
    options = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    if getattr(arguments, "causal", False):
        options["bidirectional"] = False
    return Encoder.from_pretrained(arguments.model, **{**options, **fixed})


def _report(arguments: argparse.Namespace, facts: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()))


def _facts(encoder: Any, output: Path) -> dict[str, Any]:
    config = encoder.backbone.config
    return {
        "saved": str(output),
        "layers": encoder.num_layers,
        "attention": "causal" if getattr(config, "is_causal", True) else "bidirectional",
        "pooling": encoder.pooling,
        "dimension": encoder.get_embedding_dimension(),
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }


def convert(arguments: argparse.Namespace) -> None:
    encoder = _load(arguments)
    encoder.save_pretrained(str(arguments.output))
    _report(arguments, _facts(encoder, arguments.output))


def prune(arguments: argparse.Namespace) -> None:
    from uncausal.encoder.pruning import Pruning, plot_layer_losses

    keep = arguments.keep
    if keep not in ("small", "large") and not keep.isdigit():
        raise ValueError(f"--keep takes small, large or a number of layers, not {keep!r}")
    pruning = Pruning(
        keep=int(keep) if keep.isdigit() else keep, drop=arguments.drop, triplets=arguments.limit
    )
    if pruning.needs_data and arguments.pairs is None:
        raise ValueError("L3Prune needs --pairs FILE to choose a depth; or give --keep N or --drop P")
    encoder = _load(arguments)
    depth = encoder.num_layers
    choice = pruning.choose(encoder, arguments.pairs)
    encoder.prune(choice.kept)
    encoder.save_pretrained(str(arguments.output))
    facts = {**_facts(encoder, arguments.output), "layers_before": depth}
    if choice.losses is not None and choice.depths is not None:
        plot = arguments.output / "layer_losses.png"
        plot_layer_losses(choice.losses, choice.depths, plot, choice.kept)
        facts |= {**choice.depths._asdict(), "plot": str(plot)}
        if arguments.json:
            facts["losses"] = choice.losses
    _report(arguments, facts)


def train(arguments: argparse.Namespace) -> None:
    from uncausal.encoder.data.texts import read_texts
    from uncausal.encoder.training import run as training
    from uncausal.encoder.training.stages.registry import STAGES

    names = [field.name for field in fields(STAGES[arguments.stage])]
    stage = STAGES[arguments.stage](
        **{name: value for name in names if (value := getattr(arguments, name)) is not None}
    )
    encoder = _load(arguments)
    data = (
        arguments.data
        if arguments.stage == "contrastive"
        else list(read_texts(arguments.data, arguments.column))
    )
    training.train(encoder, stage, data, arguments.output / "training", resume=not arguments.no_resume)
    encoder.save_pretrained(str(arguments.output))
    _report(arguments, _facts(encoder, arguments.output))


def evaluate(arguments: argparse.Namespace) -> None:
    from uncausal.encoder.evaluation.sts import evaluate_sts, read_sts

    pairs = read_sts(arguments.data, arguments.split)
    result = evaluate_sts(_load(arguments), pairs, show_progress_bar=sys.stderr.isatty())
    facts = {"spearman": round(result.spearman, 2), "tokens_per_second": round(result.tokens_per_second, 1)}
    _report(arguments, {**facts, "pairs": len(pairs)})


def encode(arguments: argparse.Namespace) -> None:
    import numpy as np

    from uncausal.encoder.data.texts import read_texts
    from uncausal.encoder.files import staged_file

    if arguments.output.suffix not in (".npy", ".parquet"):
        raise ValueError(
            f"{arguments.output}: the output is .npy or .parquet, not {arguments.output.suffix!r}"
        )
    texts = list(read_texts(arguments.input, arguments.column))
    if not texts:
        raise ValueError(f"{arguments.input}: holds no text")
    options = {"prompt": arguments.prompt, "batch_tokens": arguments.batch_tokens}
    encoder = _load(arguments)
    if arguments.int8:
        encoder.quantize()
    vectors = encoder.encode(texts, show_progress_bar=sys.stderr.isatty(), **options)
    with staged_file(arguments.output) as file:
        if arguments.output.suffix == ".npy":
            np.save(file, vectors)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
            pq.write_table(pa.table({"text": texts, "embedding": embedding}), file)
    print(f"{arguments.output}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers", file=sys.stderr)


def search(arguments: argparse.Namespace) -> None:
    from sentence_transformers.util import semantic_search

    from uncausal.encoder.data.texts import read_texts

    texts = list(read_texts(arguments.corpus, arguments.column))
    if not texts:
        raise ValueError(f"{arguments.corpus}: holds no text")
    encoder = _load(arguments)
    corpus = encoder.encode(texts, convert_to_tensor=True, show_progress_bar=sys.stderr.isatty())
    queries = encoder.encode(arguments.query, prompt=arguments.prompt, convert_to_tensor=True)
    found = semantic_search(queries, corpus, top_k=arguments.top_k)
    results = [
        {
            "query": query,
            "hits": [{"score": round(h["score"], 4), "text": texts[int(h["corpus_id"])]} for h in hits],
        }
        for query, hits in zip(arguments.query, found, strict=True)
    ]
    if arguments.json:
        print(json.dumps(results))
        return
    for result in results:
        print(result["query"])
        for hit in result["hits"]:
            print(f"  {hit['score']:.3f}  {hit['text']}")


def demo(arguments: argparse.Namespace) -> None:
    from uncausal.encoder.cli.demo import run_demo

    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        report = run_demo(arguments.output, quick=arguments.quick)
    if arguments.json:
        print(json.dumps(report))


def run(arguments: argparse.Namespace) -> None:
    from uncausal.encoder.training.recipes import load_recipe, run_recipe

    data = dict(item.split("=", 1) for item in arguments.data if "=" in item)
    if len(data) != len(arguments.data):
        raise ValueError("--data takes STAGE=FILE, for example --data mntp=text.txt")
    recipe = load_recipe(arguments.recipe, arguments.variant)
    encoder = run_recipe(recipe, arguments.output, model=arguments.model, data=data)
    _report(arguments, _facts(encoder, arguments.output))
