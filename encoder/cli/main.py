"""The `uncausal` command: finds the command by its name, has its options parsed, runs it, words its errors.

A command is a function in a file beside this one and a line of COMMANDS. Its signature and docstring say what
it takes (tyro reads both), so that nothing heavy is imported for `uncausal --help`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import io
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import uncausal

COMMANDS = {  # name: (where it is, what it does); where a mapping is, its keys are the next word
    "convert": ("models.convert", "turn a causal checkpoint into an encoder folder"),
    "prune": ("models.prune", "keep the first layers, as many as L3Prune says"),
    "train": ("training.TRAIN", "train one stage: uncausal train STAGE"),
    "run": ("training.run", "run every step of a recipe"),
    "eval": ("evaluation.evaluate", "score models on a suite of tasks, MTEB, words or an STS set"),
    "encode": ("encoding.encode", "write one vector per text, to a file or a folder of shards"),
    "index": ("serving.index", "index a folder's code and text, or bring its index up to date"),
    "search": ("encoding.search", "find the texts or passages nearest to a query"),
    "serve": ("serving.serve", "answer requests for vectors over HTTP"),
    "pairs": ("pairs.PAIRS", "make training pairs: uncausal pairs code, uncausal pairs prose"),
    "mine": ("pairs.mine", "find hard negatives for pairs"),
    "demo": ("demo.demo", "SmolLM2-135M from language model to encoder, on real text, offline"),
}


class UsageError(Exception):
    """What was typed cannot be a command; the message says what can."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (0 done, 1 failed, 2 not understood, 130 interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        print(f"uncausal {uncausal.__version__}")
        return 0
    try:
        call = parse(words)
        if call is None:
            return 0
        if not debug:
            quiet_libraries()
        call()
        if sys.stdout is not None:
            sys.stdout.flush()  # here its failure has words, and a status
    except UsageError as error:
        print(f"uncausal: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # training leaves a checkpoint and says how to go on
        print(f"uncausal: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stdout = None
        return 1
    except (ValueError, OSError, NotImplementedError, RuntimeError, ImportError, ArithmeticError) as error:
        if debug:
            raise
        print(f"uncausal: {' '.join(str(error).split())}", file=sys.stderr)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # it was the output that failed, and would once more at the end
            sys.stdout = None
        return 1
    return 0


def help_text() -> str:
    """What `uncausal --help` prints."""
    commands = "\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: uncausal COMMAND ...\n\n"
        "Turn any decoder-only language model into a strong, fast text encoder.\n\n"
        f"{commands}\n\n"
        "Every command answers to --help, and shows the traceback of an error with --debug.\n"
        "`uncausal demo` shows the whole way in some minutes; `uncausal --version` says which this is."
    )


def parse(words: Sequence[str]) -> Callable[[], None] | None:
    """Return the call that the words ask for, or None if they asked for help, which is then printed.

    Raises:
        UsageError: no such command or option, or a value of the wrong type.
    """
    import tyro
    from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, PositionalMetavarFromFieldName

    prog, rest = f"uncausal {words[0]}", list(words[1:])
    module, _, attribute = COMMANDS[known(words[0], COMMANDS)][0].partition(".")
    command: Any = getattr(importlib.import_module(f"uncausal.encoder.cli.{module}"), attribute)
    if isinstance(command, Mapping):
        if not rest or rest[0] in ("-h", "--help"):
            lines = [f"  {name:14}{first_line(function)}" for name, function in command.items()]
            print("\n".join([f"usage: {prog} {{{','.join(command)}}} ...", "", *lines]))
            return None
        command, prog = command[known(rest[0], command)], f"{prog} {rest[0]}"
        rest = rest[1:]

    @functools.wraps(command)
    def later(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config = (OmitArgPrefixes, FlagCreatePairsOff, PositionalMetavarFromFieldName)
            return tyro.cli(later, prog=prog, args=rest, config=config, registry=booleans())
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise UsageError(one_line(complaint.getvalue(), prog)) from None


def booleans() -> Any:
    """Tyro's rules, with boolean values in any case: `--bf16 False`, `--bf16 false`."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    def read(words: list[str]) -> bool:
        if words[0].lower() not in ("true", "false"):
            raise ValueError(f"{words[0]!r} is neither true nor false")
        return words[0].lower() == "true"

    @registry.primitive_rule
    def _(info: Any) -> Any:
        if info.type is bool:
            return PrimitiveConstructorSpec(
                nargs=1,
                metavar="{true,false}",
                instance_from_str=read,
                is_instance=lambda value: isinstance(value, bool),
                str_from_instance=lambda value: [str(value).lower()],
            )
        return None

    return registry


def one_line(box: str, prog: str) -> str:
    """What tyro says of a mistake, out of its box: what stands between its title and the next rule."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", box)
    said = re.split(r"(?m)^[│ ]*(?:╭.*╮|[─-]{3,})[│ ]*$", plain)[1]
    said = said.replace("│", " ").split("Got errors:")[0].replace("(required)", "")
    return f"{' '.join(said.split()).rstrip('.')}; see {prog} --help"


def known(word: str, names: Iterable[str]) -> str:
    """Return the word if it is one of the names."""
    names = list(names)
    if word in names:
        return word
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(names)}"
    raise UsageError(f"no command {word!r}; {hint}")


def first_line(function: Callable) -> str:
    return textwrap.dedent(function.__doc__ or "").strip().splitlines()[0]


def quiet_libraries() -> None:
    """Leave the screen to our own lines and bars; downloads keep theirs."""
    import huggingface_hub.utils
    import transformers.utils.logging

    # The libraries warn of what a user of this command can neither see nor change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="peft")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()
    for name in ("transformers.modeling_gguf_pytorch_utils", "sentence_transformers.base.model_card"):
        module: Any = importlib.import_module(name)
        module.tqdm = functools.partial(module.tqdm, disable=True)
