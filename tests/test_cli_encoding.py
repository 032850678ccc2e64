"""The commands encode and search: files, folders of shards, and what is said of bad input."""

import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import TEXTS, run

from uncausal.encoder.model import Encoder
from uncausal.encoder.serving.corpus import read_corpus


def test_encode_writes_npy_and_parquet(cli_folder, tmp_path, capsys):
    expected = Encoder.from_pretrained(cli_folder / "encoder", dtype="float32").encode(TEXTS)
    for suffix in ("npy", "parquet"):
        output = tmp_path / f"vectors.{suffix}"
        run(capsys, "encode", cli_folder / "encoder", cli_folder / "texts.txt", output, "--dtype", "float32")
        if suffix == "npy":
            got = np.load(output)
        else:
            table = pq.read_table(output)
            assert table["text"].to_pylist() == TEXTS
            got = np.array(table["embedding"].to_pylist())
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert [file.suffix for file in sorted(tmp_path.iterdir())] == [".npy", ".parquet"]


def test_encode_int8(smollm2, cli_folder, tmp_path, capsys):
    vectors = []
    for name, flags in (("plain.npy", []), ("int8.npy", ["--int8"])):
        paths = smollm2, cli_folder / "texts.txt", tmp_path / name
        options = ["--num-layers", 2, "--dtype", "float32", "--device", "cpu"]
        run(capsys, "encode", *paths, *options, *flags)
        vectors.append(np.load(tmp_path / name))
    plain, int8 = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    assert not np.array_equal(plain, int8)
    assert (plain * int8).sum(1).min() > 0.97


def test_encode_reads_jsonl_from_stdin(cli_folder, tmp_path, capsys, monkeypatch):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    output = tmp_path / "v.npy"
    run(capsys, "encode", cli_folder / "encoder", "-", output, "--column", "body", "--dtype", "float32")
    expected = Encoder.from_pretrained(cli_folder / "encoder", dtype="float32").encode(TEXTS)
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)


def test_a_blank_row_is_told_and_not_left_out(cli_folder, tmp_path, capsys):
    """Vectors stood beside other rows than their own."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", " ", "b")))
    (tmp_path / "rows.txt").write_text("a\n\nb\n")
    for file in (rows, tmp_path / "rows.txt"):
        for output in (tmp_path / "v.npy", f"{tmp_path}/v/"):
            said = run(capsys, "encode", cli_folder / "encoder", file, output, status=1)
            assert f"{file}:2: the text is empty" in said


def test_vectors_that_are_not_finite_are_not_written(byte_llama, cli_folder, tmp_path, capsys):
    """Regression: NaN stood in the file, and in what a program would read as JSON."""
    encoder = Encoder.from_pretrained(byte_llama, dtype="float32", device="cpu")
    with torch.no_grad():
        encoder.backbone.norm.weight.fill_(torch.nan)
    encoder.save_pretrained(str(tmp_path / "nan"))
    for command in (["encode", tmp_path / "v.npy"], ["search", "the cat", "--json"]):
        name, *rest = command
        said = run(capsys, name, tmp_path / "nan", cli_folder / "texts.txt", *rest, status=1)
        assert "is not finite" in said
    assert not (tmp_path / "v.npy").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine"}\n{"text": "broken\n', ":2: malformed JSON"),
        (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', ":2: not UTF-8"),
        (b'{"other": "fine"}\n', ":1: no field 'text'"),
        (b"", "holds no text"),
    ],
)
def test_encode_says_where_the_input_is_wrong(cli_folder, tmp_path, capsys, content, message):
    file = tmp_path / "input.jsonl"
    file.write_bytes(content)
    said = run(capsys, "encode", cli_folder / "encoder", file, tmp_path / "v.npy", status=1)
    assert f"{file}{message}" in said or f"{file}: {message}" in said
    assert not (tmp_path / "v.npy").exists()


def test_encode_keeps_an_earlier_output_when_it_fails(cli_folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "v.npy"
    output.write_bytes(b"earlier")

    def full_disk(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    said = run(capsys, "encode", cli_folder / "encoder", cli_folder / "texts.txt", output, status=1)
    assert "No space left" in said and output.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["v.npy"]


def test_search_finds_the_text_itself(cli_folder, capsys):
    results = json.loads(
        run(capsys, "search", cli_folder / "encoder", cli_folder / "texts.txt", *TEXTS, "--json")
    )
    assert [result["hits"][0]["text"] for result in results] == TEXTS
    assert all(result["hits"][0]["score"] > 0.99 for result in results)


def test_encode_into_a_folder_goes_on_from_its_shards(cli_folder, tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": t, "key": f"k{i}"}) + "\n" for i, t in enumerate(TEXTS)))
    options = ["--rows-per-shard", 1, "--id-column", "key", "--dtype", "float32", "--prompt", "Query: "]
    options += ["--dimension", 8, "--normalize", "--vector-dtype", "float16"]
    command = ["encode", cli_folder / "encoder", source, f"{tmp_path}/vectors.v1/", *options]
    run(capsys, *command, "--shard", "1/2")
    assert [file.name for file in tmp_path.glob("vectors.v1/*.parquet")] == ["part-00001.parquet"]
    kept = (tmp_path / "vectors.v1" / "part-00001.parquet").stat().st_mtime_ns
    run(capsys, *command)
    assert (tmp_path / "vectors.v1" / "part-00001.parquet").stat().st_mtime_ns == kept
    table = read_corpus(tmp_path / "vectors.v1")
    assert table["id"].to_pylist() == ["k0", "k1", "k2"]
    encoder = Encoder.from_pretrained(cli_folder / "encoder", dtype="float32")
    expected = encoder.encode(TEXTS, prompt="Query: ", truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected, atol=2e-3)
    said = run(capsys, *command, "--rows-per-shard", 2, status=1)
    assert "differs in rows_per_shard (1 there, 2 here)" in said


def test_encode_cuts_and_scales_into_a_file(cli_folder, tmp_path, capsys):
    options = ["--dimension", 8, "--normalize", "--dtype", "float32"]
    run(capsys, "encode", cli_folder / "encoder", cli_folder / "texts.txt", tmp_path / "v.npy", *options)
    encoder = Encoder.from_pretrained(cli_folder / "encoder", dtype="float32")
    expected = encoder.encode(TEXTS)[:, :8]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("v.npy", ["--shard", "0/2"], "--shard is for a folder of shards: end the output in /"),
        ("v.npy", ["--vector-dtype", "int8"], "--vector-dtype is for a folder of shards"),
        ("v.npy", ["--dimension", "0"], "--dimension is 0; "),
        ("v.npy", ["--dimension", "-1"], "--dimension is -1; "),
        ("v.npy", ["--dimension", "4096"], "has the dimensions 1 to "),
        ("v/", ["--shard", "1"], "--shard takes I/N, for example 0/4, not '1'"),
        ("v/", ["--shard", "2/2"], "shard 2/2 does not exist"),
        ("v", ["--rows-per-shard", "0"], "rows_per_shard is 0"),
        ("v", ["--column", "x", "--id-column", "id"], "no field 'id'"),
    ],
)
def test_encode_refuses(cli_folder, tmp_path, capsys, output, options, message):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"x": "some text", "text": "some text"}\n')
    command = ["encode", cli_folder / "encoder", source, f"{tmp_path}/{output}", *options]
    assert message in run(capsys, *command, status=1)
