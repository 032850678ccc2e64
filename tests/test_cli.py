"""The command: what a user types, what a program reads, what is said of bad input."""

import gzip
import io
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from uncausal.encoder.cli.main import main
from uncausal.encoder.model import Encoder

TEXTS = ["A man is playing a guitar.", "Plants make energy from sunlight.", "The dog runs on the beach."]
PAIRS = [
    ("A man plays guitar.", "Someone is playing a guitar."),
    ("A dog runs.", "The dog is running outside."),
] * 4


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    """An encoder folder made by the command itself, and files of texts and pairs."""
    folder = tmp_path_factory.mktemp("cli")
    arguments = ["convert", str(smollm2), str(folder / "encoder"), "--num-layers", "2", "--dtype", "float32"]
    assert main(arguments) == 0
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"anchor": a, "positive": p}) + "\n" for a, p in PAIRS)
    )
    lines = [
        f"g\tf\ty\t{i}\t{5 - i}\t{a}\t{b}" for i, (a, b) in enumerate([*PAIRS[:2], (TEXTS[0], TEXTS[1])])
    ]
    (folder / "sts-dev.csv").write_text("\n".join(lines) + "\n")
    return folder


def run(capsys, *arguments, status=0):
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    return captured.out if status == 0 else captured.err


@pytest.mark.parametrize(
    "command", ["convert", "prune", "eval", "encode", "search", "demo", "run", "train mntp"]
)
def test_help_names_every_argument(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_help_is_quick():
    code = "import sys; from uncausal.encoder.cli.main import build_parser as b; b(False).format_help(); "
    code += "print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_convert_reports_what_it_saved(smollm2, tmp_path, capsys):
    out = run(capsys, "convert", smollm2, tmp_path / "e", "--num-layers", 1, "--causal", "--json")
    facts = json.loads(out)
    assert (facts["layers"], facts["attention"], facts["pooling"]) == (1, "causal", "mean")
    assert facts["dimension"] == 576


def test_prune_by_the_curve(smollm2, folder, tmp_path, capsys):
    out = run(capsys, "prune", smollm2, tmp_path / "p", "--pairs", folder / "pairs.jsonl", "--json")
    facts = json.loads(out)
    assert len(facts["losses"]) == facts["layers_before"] == 6
    assert facts["layers"] == facts["small"] == int(np.argmin(facts["losses"][:3])) + 1
    assert (tmp_path / "p" / "layer_losses.png").stat().st_size > 1000
    assert len(Encoder.from_pretrained(tmp_path / "p").backbone.layers) == facts["layers"]


def test_prune_by_fraction(smollm2, tmp_path, capsys):
    facts = json.loads(run(capsys, "prune", smollm2, tmp_path / "p", "--drop", 0.5, "--json"))
    assert facts["layers"] == 3


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


def test_encode_int8(folder, tmp_path, capsys):
    vectors = []
    for name, flags in (("plain.npy", []), ("int8.npy", ["--int8"])):
        paths = folder / "encoder", folder / "texts.txt", tmp_path / name
        run(capsys, "encode", *paths, "--dtype", "float32", "--device", "cpu", *flags)
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
    assert f"{file}{message}" in said or message in said
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
        (["encode", "encoder", "texts.txt", "out.csv"], "not '.csv'"),
        (["encode", "encoder", "missing.txt", "out.npy"], "no such file: missing.txt"),
        (["search", "encoder", "texts.txt.gz", "query"], "damaged gzip"),
        (["run", "missing.toml", "out"], "missing.toml"),
        (["train", "mntp", "encoder", "texts.txt", "out", "--max-steps", "0"], "MNTP.max_steps is 0"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    (folder / "texts.txt.gz").write_bytes(gzip.compress(b"some text\n" * 50)[:-12])
    said = run(capsys, *arguments, status=1)
    assert message in said and said.startswith("uncausal: ") and "Traceback" not in said


def test_eval_reports_spearman_and_speed(folder, capsys):
    facts = json.loads(run(capsys, "eval", folder / "encoder", folder, "--json"))
    assert facts["pairs"] == 3 and facts["tokens_per_second"] > 0
    assert facts["spearman"] in (100.0, 50.0, -50.0, -100.0)


def test_eval_names_a_malformed_line(folder, tmp_path, capsys):
    (tmp_path / "sts.csv").write_text("a\tb\n")
    assert "sts.csv:1: not an STS Benchmark line" in run(
        capsys, "eval", folder / "encoder", tmp_path / "sts.csv", status=1
    )


def test_search_finds_the_text_itself(folder, capsys):
    results = json.loads(run(capsys, "search", folder / "encoder", folder / "texts.txt", *TEXTS, "--json"))
    assert [result["hits"][0]["text"] for result in results] == TEXTS
    assert all(result["hits"][0]["score"] > 0.99 for result in results)


def test_train_changes_the_encoder_and_can_be_repeated(folder, tmp_path, capsys):
    options = ["--max-steps", 2, "--batch-size", 4, "--learning-rate", 1e-3, "--bf16", "false", "--json"]
    arguments = [
        "train",
        "contrastive",
        folder / "encoder",
        folder / "pairs.jsonl",
        tmp_path / "out",
        *options,
    ]
    facts = json.loads(run(capsys, *arguments, "--warmup-steps", 0).splitlines()[-1])
    trained = Encoder.from_pretrained(facts["saved"], dtype="float32").encode(TEXTS)
    before = Encoder.from_pretrained(folder / "encoder", dtype="float32").encode(TEXTS)
    assert np.abs(trained - before).max() > 1e-4
    run(capsys, *arguments, "--warmup-steps", 0)
    again = Encoder.from_pretrained(facts["saved"], dtype="float32").encode(TEXTS)
    np.testing.assert_allclose(again, trained, atol=1e-5)


def test_interrupt_is_not_a_traceback(folder, capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "from_pretrained", interrupted)
    assert "interrupted" in run(capsys, "eval", folder / "encoder", folder, status=130)
