"""The command: what a user types, what a program reads, what is said of bad input."""

import dataclasses
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import typing

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from uncausal.encoder.cli import main as command_line
from uncausal.encoder.cli.main import COMMANDS, main
from uncausal.encoder.cli.options import Loading
from uncausal.encoder.model import Encoder
from uncausal.encoder.pooling import PoolingName
from uncausal.encoder.training.stages.registry import STAGES

TEXTS = ["A man is playing a guitar.", "Plants make energy from sunlight.", "The dog runs on the beach."]
PAIRS = [
    ("A man plays guitar.", "Someone is playing a guitar."),
    ("A dog runs.", "The dog is running outside."),
] * 4
SCORED = [
    (TEXTS[0], TEXTS[0], 5.0),
    (TEXTS[1], TEXTS[1] + " Yes", 3.5),
    (TEXTS[2], "12345", 1.0),
    ("x", "Plants", 0),
]
MODEL_COMMANDS = ["convert", "prune", "eval", "encode", "search", *(f"train {kind}" for kind in STAGES)]
RUN = [sys.executable, "-c", "import sys; from uncausal.encoder.cli.main import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def folder(byte_llama, tmp_path_factory):
    """An encoder folder made by the command itself, and files of texts and pairs."""
    folder = tmp_path_factory.mktemp("cli")
    assert main(["convert", str(byte_llama), str(folder / "encoder"), "--num-layers", "2"]) == 0
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"anchor": a, "positive": p}) + "\n" for a, p in PAIRS)
    )
    lines = [f"g\tf\ty\t{i}\t{score}\t{a}\t{b}" for i, (a, b, score) in enumerate(SCORED)]
    (folder / "sts-dev.csv").write_text("\n".join(lines) + "\n")
    return folder


def run(capsys, *arguments, status=0):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    if status:
        assert captured.err.startswith("uncausal: ") and captured.err.count("\n") == 1, captured.err
        assert "Traceback" not in captured.err
    return captured.out if status == 0 else captured.err


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


@pytest.mark.parametrize("command", [*COMMANDS, *(f"train {kind}" for kind in STAGES)])
def test_help_names_every_argument(command, capsys, monkeypatch):
    """Regression: the test asked for --debug alone, and passed without any option of the command."""
    if command == "train":
        listed = run(capsys, "train", "--help")
        assert all(f"  {kind}" in listed for kind in STAGES)
        return
    expected = {
        "convert": {"MODEL", "OUTPUT", "--json"},
        "prune": {"MODEL", "OUTPUT", "--pairs", "--keep", "--drop", "--limit", "--json"},
        "run": {
            "RECIPE",
            "OUTPUT",
            "--list",
            "--variant",
            "--model",
            "--data",
            "--data-dir",
            "--plan",
            "--json",
        },
        "eval": {"MODEL", "DATA", "--split", "--json"},
        "encode": {"MODEL", "INPUT", "OUTPUT", "--column", "--prompt", "--batch-tokens", "--int8"},
        "search": {"MODEL", "CORPUS", "QUERY", "--column", "--prompt", "--top-k", "--json"},
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
    "words", [[], ["--help"], ["encode", "--help"], ["eval", "--help"], ["prune", "--help"]]
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


def test_prune_by_the_curve(byte_llama, folder, tmp_path, capsys):
    """Regression: the command's default was `large` here and `small` there; it is that of `Pruning`."""
    out = run(capsys, "prune", byte_llama, tmp_path / "p", "--pairs", folder / "pairs.jsonl", "--json")
    facts = json.loads(out)
    assert len(facts["losses"]) == facts["layers_before"] == 4
    assert facts["layers"] == facts["large"] == int(np.argmin(facts["losses"][2:])) + 3
    assert (tmp_path / "p" / "layer_losses.png").stat().st_size > 1000
    assert Encoder.from_pretrained(tmp_path / "p").num_layers == facts["layers"]
    arguments = ["--pairs", folder / "pairs.jsonl", "--keep", "small", "--json"]
    facts = json.loads(run(capsys, "prune", byte_llama, tmp_path / "p", *arguments))
    assert facts["layers"] == facts["small"] == int(np.argmin(facts["losses"][:2])) + 1


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
    ],
)
def test_prune_refuses(folder, tmp_path, capsys, extra, message):
    assert message in run(capsys, "prune", folder / "encoder", tmp_path / "p", *extra, status=1)


def test_encode_writes_npy_and_parquet(folder, tmp_path, capsys):
    expected = Encoder.from_pretrained(folder / "encoder", dtype="float32").encode(TEXTS)
    for suffix in ("npy", "parquet"):
        output = tmp_path / f"vectors.{suffix}"
        run(capsys, "encode", folder / "encoder", folder / "texts.txt", output, "--dtype", "float32")
        if suffix == "npy":
            got = np.load(output)
        else:
            table = pq.read_table(output)
            assert table["text"].to_pylist() == TEXTS
            got = np.array(table["embedding"].to_pylist())
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert [file.suffix for file in sorted(tmp_path.iterdir())] == [".npy", ".parquet"]


def test_encode_int8(smollm2, folder, tmp_path, capsys):
    vectors = []
    for name, flags in (("plain.npy", []), ("int8.npy", ["--int8"])):
        paths = smollm2, folder / "texts.txt", tmp_path / name
        options = ["--num-layers", 2, "--dtype", "float32", "--device", "cpu"]
        run(capsys, "encode", *paths, *options, *flags)
        vectors.append(np.load(tmp_path / name))
    plain, int8 = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    assert not np.array_equal(plain, int8)
    assert (plain * int8).sum(1).min() > 0.97


def test_encode_reads_jsonl_from_stdin(folder, tmp_path, capsys, monkeypatch):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    output = tmp_path / "v.npy"
    run(capsys, "encode", folder / "encoder", "-", output, "--column", "body", "--dtype", "float32")
    expected = Encoder.from_pretrained(folder / "encoder", dtype="float32").encode(TEXTS)
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine"}\n{"text": "broken\n', ":2: malformed JSON"),
        (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', ":2: not UTF-8"),
        (b'{"other": "fine"}\n', ":1: no field 'text'"),
        (b"", "holds no text"),
    ],
)
def test_encode_says_where_the_input_is_wrong(folder, tmp_path, capsys, content, message):
    file = tmp_path / "input.jsonl"
    file.write_bytes(content)
    said = run(capsys, "encode", folder / "encoder", file, tmp_path / "v.npy", status=1)
    assert f"{file}{message}" in said or f"{file}: {message}" in said
    assert not (tmp_path / "v.npy").exists()


def test_encode_keeps_an_earlier_output_when_it_fails(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "v.npy"
    output.write_bytes(b"earlier")

    def full_disk(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    said = run(capsys, "encode", folder / "encoder", folder / "texts.txt", output, status=1)
    assert "No space left" in said and output.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["v.npy"]


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
            "no recipe 'missing.toml': give a TOML file or one of code, encoder, ",
        ),
        (["run", "llm2vec", "out", "--variant", "mistral"], "--data simcse=FILE"),
        (["run", "llm2vec"], "takes a RECIPE and an OUTPUT"),
        (["run", "llm2vec", "out", "--data", "x.txt"], "--data takes STAGE=FILE"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, monkeypatch, arguments, message):
    if "cuda" in arguments:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    monkeypatch.chdir(folder)
    (folder / "texts.txt.gz").write_bytes(gzip.compress(b"some text\n" * 50)[:-12])
    (folder / "empty.csv").write_bytes(b"")
    (folder / "latin.csv").write_bytes("a\tb\tc\td\t1.5\tone caf\xe9\ttwo\n".encode("latin-1"))
    assert message in run(capsys, *arguments, status=1)


@pytest.mark.parametrize("command", ["convert", "prune", "encode", "train contrastive", "run", "demo"])
def test_unwritable_output_is_found_before_any_work(folder, tmp_path, capsys, monkeypatch, command):
    def never(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Encoder, "from_pretrained", never)
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "inside.npy"
    inputs = {
        "convert": [folder / "encoder", output],
        "prune": [folder / "encoder", output, "--keep", 1],
        "encode": [folder / "encoder", folder / "texts.txt", output],
        "train contrastive": [folder / "encoder", folder / "pairs.jsonl", output],
        "run": ["llm2vec", output, "--data", f"simcse={folder / 'texts.txt'}"],
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


def test_eval_reports_spearman_and_speed(folder, capsys):
    """Regression: the figure passed with its sign turned."""
    facts = json.loads(run(capsys, "eval", folder / "encoder", folder, "--dtype", "float32", "--json"))
    plain = SentenceTransformer(str(folder / "encoder"), device="cpu")
    first, second = (plain.encode([row[i] for row in SCORED], normalize_embeddings=True) for i in (0, 1))
    expected = 100 * spearmanr((first * second).sum(1), [row[2] for row in SCORED]).statistic
    assert abs(expected) > 20
    assert facts["spearman"] == pytest.approx(expected, abs=0.01)
    assert facts["pairs"] == len(SCORED) and facts["tokens_per_second"] > 0


def test_eval_names_a_malformed_line(folder, tmp_path, capsys):
    (tmp_path / "sts.csv").write_text("a\tb\n")
    said = run(capsys, "eval", folder / "encoder", tmp_path / "sts.csv", status=1)
    assert "sts.csv:1: not an STS Benchmark line" in said


def test_search_finds_the_text_itself(folder, capsys):
    results = json.loads(run(capsys, "search", folder / "encoder", folder / "texts.txt", *TEXTS, "--json"))
    assert [result["hits"][0]["text"] for result in results] == TEXTS
    assert all(result["hits"][0]["score"] > 0.99 for result in results)


def test_train_changes_the_encoder_and_can_be_repeated(folder, tmp_path, capsys):
    options = ["--max-steps", 2, "--batch-size", 4, "--learning-rate", 1e-2, "--bf16", "False", "--json"]
    paths = folder / "encoder", folder / "pairs.jsonl", tmp_path / "out"
    arguments = ["train", "contrastive", *paths, *options, "--warmup-steps", 0]
    facts = json.loads(run(capsys, *arguments).splitlines()[-1])
    trained = Encoder.from_pretrained(facts["saved"], dtype="float32").encode(TEXTS)
    before = Encoder.from_pretrained(folder / "encoder", dtype="float32").encode(TEXTS)
    assert np.abs(trained - before).max() > 1e-4
    run(capsys, *arguments)
    again = Encoder.from_pretrained(facts["saved"], dtype="float32").encode(TEXTS)
    np.testing.assert_allclose(again, trained, atol=1e-5)


def test_run_takes_a_recipe_of_the_package_by_name(byte_llama, folder, tmp_path, capsys, monkeypatch):
    from uncausal.encoder.training import recipes

    listed = dict(line.split(": ") for line in run(capsys, "run", "--list").splitlines())
    assert "mistral" in listed["llm2vec"].split(", ") and "qwen2" in listed["l3prune"].split(", ")
    short = {"max_steps": 1, "batch_size": 2, "chunk_tokens": 16}
    load = recipes.load_recipe

    def shortened(name, variant):
        recipe = load(name, variant)
        for step in recipe.steps:
            vars(step.settings).update({k: value for k, value in short.items() if hasattr(step.settings, k)})
        return recipe

    monkeypatch.setattr("uncausal.encoder.cli.training.load_recipe", shortened)
    texts = ["--data", f"simcse={folder / 'texts.txt'}", "--data", f"mntp={folder / 'texts.txt'}"]
    options = ["--variant", "mistral", "--model", byte_llama, *texts, "--json"]
    facts = json.loads(run(capsys, "run", "llm2vec", tmp_path / "out", *options).splitlines()[-1])
    assert facts["attention"] == "bidirectional" and (tmp_path / "out" / "stages" / "2-simcse").is_dir()


def interrupted(arguments, shown, *, cwd):
    """Start the command, send Ctrl-C when it has shown something, and return its status and screen."""
    process = subprocess.Popen(
        [*RUN, *arguments], cwd=cwd, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    lines, killer = [], threading.Timer(300, process.kill)
    killer.start()
    for line in process.stderr:
        lines.append(line)
        if shown in line and len([one for one in lines if shown in one]) == 1:
            process.send_signal(signal.SIGINT)
    killer.cancel()
    process.stdout.close()
    return process.wait(), "".join(lines)


def test_interrupt_is_not_a_traceback(folder, tmp_path):
    """Regression: the message came twice, once from the trainer and once from the command."""
    options = ["--max-steps", "100000", "--batch-size", "2", "--logging-steps", "1", "--save-steps", "100000"]
    arguments = [
        "train",
        "contrastive",
        str(folder / "encoder"),
        "pairs.jsonl",
        str(tmp_path / "out"),
        *options,
    ]
    status, said = interrupted(arguments, "step 1/100000", cwd=folder)
    assert status == 130, said
    assert "Traceback" not in said and said.count("stopped at step") == 1, said
    assert re.search(
        r"^uncausal: contrastive stopped at step \d+ of 100000: the same call or command resumes ", said, re.M
    )


def test_interrupt_before_training_is_not_a_traceback(folder, capsys, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "from_pretrained", stop)
    try:
        assert run(capsys, "eval", folder / "encoder", folder, status=130) == "uncausal: interrupted\n"
    except KeyboardInterrupt:  # would end the whole run of tests
        pytest.fail("the interrupt came through")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_screen_shows_no_bars_of_the_libraries(folder, tmp_path):
    """Regression: loading, saving and the model card each drew a bar of their library's."""
    import fcntl
    import struct
    import termios

    main_end, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    options = ["--max-steps", "2", "--batch-size", "2", "--num-layers", "1"]
    arguments = ["train", "contrastive", "encoder", "pairs.jsonl", str(tmp_path / "out"), *options]
    process = subprocess.Popen([*RUN, *arguments], cwd=folder, stderr=terminal, stdout=terminal)
    os.close(terminal)
    screen, deadline = b"", time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            screen += os.read(main_end, 4096)
        except OSError:  # the other end is closed: the command is done
            break
    assert process.wait(30) == 0, screen.decode()
    os.close(main_end)
    bars = set(re.findall(r"^\s*([A-Za-z][\w ]*?)[ :.]*\s*\d+%\|", screen.decode().replace("\r", "\n"), re.M))
    assert bars == {"contrastive"}, screen.decode()
