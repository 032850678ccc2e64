"""Hostile input: whatever comes in, the answer is a result or an error that was meant, and it comes soon.

`make fuzz` draws 100,000 inputs over all of these tests, `make test` a few of each.
"""

import gzip
import json
import os
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uncausal import Encoder, load_recipe
from uncausal.encoder.data.pairs import read_pairs
from uncausal.encoder.data.rows import DataError
from uncausal.encoder.data.texts import read_texts, sentences
from uncausal.encoder.training.recipes import RecipeError, find_recipe, list_recipes

SHARE = int(os.environ.get("FUZZ", 20))  # examples of a test
fuzz = settings(
    max_examples=SHARE, deadline=20_000, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
ANY_TEXT = st.text(st.characters(codec=None), max_size=60)  # with lone surrogates and NUL
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner), max_leaves=8
)
TOML_VALUES = st.sampled_from(
    [
        "-1",
        "0",
        "1e999",
        "nan",
        "true",
        '""',
        "[]",
        "{}",
        "[[1]]",
        '"../../etc/passwd"',
        "1979-05-27",
        "99999999999",
    ]
)


@pytest.fixture(scope="module")
def encoder(byte_llama):
    return Encoder.from_pretrained(byte_llama, device="cpu", dtype="float32", max_seq_length=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@fuzz
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_any_text_has_a_vector_or_is_named(encoder, texts):
    try:
        vectors = encoder.encode(texts)
    except ValueError as error:
        assert "text" in str(error) and not isinstance(error, UnicodeError)
        assert any(not text.strip() or any(0xD800 <= ord(c) < 0xE000 for c in text) for text in texts)
    else:
        assert vectors.shape == (len(texts), 32) and np.isfinite(vectors).all()


@fuzz
@given(body=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".jsonl", ".csv", ".tsv", ".parquet"]))
@pytest.mark.parametrize("read", [read_texts, read_pairs])
def test_any_file_is_read_or_its_place_named(folder, body, suffix, read):
    for name, content in (
        (f"a{suffix}", body),
        (f"a{suffix}.gz", gzip.compress(body, mtime=0)),
        ("b.jsonl.gz", body),
    ):
        path = folder / name
        path.write_bytes(content)
        try:
            found = list(read(path))
        except DataError as error:
            assert str(error).startswith(str(path))
        else:
            assert read is read_pairs or all(isinstance(text, str) for text in found)


@fuzz
@given(rows=st.lists(ANYTHING, max_size=4))
def test_any_rows_are_pairs_or_named(rows):
    try:
        read_pairs(rows)
    except DataError as error:
        assert "row" in str(error)


@fuzz
@given(
    name=st.sampled_from(sorted(list_recipes())), line=st.integers(0, 200), value=TOML_VALUES, text=ANY_TEXT
)
def test_any_recipe_is_read_or_its_key_named(folder, name, line, value, text):
    """A value in a recipe of the package is replaced, and then the line."""
    lines = find_recipe(name).read_text().splitlines()
    line %= len(lines)
    path = folder / "r.toml"
    for changed in (f"{lines[line].partition('=')[0]}= {value}", text):
        path.write_text("\n".join([*lines[:line], changed, *lines[line + 1 :]]), "utf-8", errors="replace")
        try:
            load_recipe(path)
        except RecipeError as error:
            assert "r.toml" in str(error)


@fuzz
@given(text=ANY_TEXT)
def test_any_text_has_sentences(text):
    assert "".join("".join(s.split()) for s in sentences(text)) in "".join(text.split())


@fuzz
@given(
    route=st.sampled_from(["/v1/embeddings", "/embed", "/similarity", "/tokenize", "/nowhere"]),
    field=st.sampled_from(["input", "inputs", "dimensions", "encoding_format", "truncate", "model"]),
    body=ANYTHING,
)
def test_any_body_is_answered(client, route, field, body):
    """Never a 5xx: what is wrong is the request."""
    for content in (body, {field: body}, {"input": "the cat", "inputs": "the cat", field: body}):
        raw = json.dumps(content).encode("utf-8", "surrogatepass")
        assert client.post(route, content=raw, headers={"Content-Type": "application/json"}).status_code < 500


@pytest.fixture(scope="module")
def client(encoder):
    pytest.importorskip("fastapi", reason="the server needs `pip install uncausal[serve]`")
    from fastapi.testclient import TestClient

    from uncausal.encoder.serving.server import make_app

    with TestClient(make_app(lambda: encoder, "tiny"), raise_server_exceptions=False) as client:
        while client.get("/health").status_code != 200:
            pass
        yield client


def test_a_megabyte_without_a_space_is_cut(encoder):
    long = "x" * 1_000_000
    assert np.array_equal(encoder.encode(long), encoder.encode("x" * 64))


def test_a_bomb_is_read_a_line_at_a_time(tmp_path):
    """A gzip file a thousand times its size costs the memory of a line: the second is never unpacked."""
    import tracemalloc

    pack = zlib.compressobj(9, wbits=31)
    body = pack.compress(b"first\n")
    body += b"".join(pack.compress(b"x\n" * 500_000) for _ in range(100)) + pack.flush()
    (tmp_path / "bomb.txt.gz").write_bytes(body)
    tracemalloc.start()
    assert next(read_texts(tmp_path / "bomb.txt.gz")) == "first"
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": -1},
        {"hidden_size": 31},
        {"vocab_size": -5},
        {"num_attention_heads": 0},
        {"model_type": "../../etc"},
        {"hidden_size": "large"},
    ],
)
def test_hostile_config_is_refused(byte_llama, tmp_path, changes):
    for file in byte_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(Exception) as caught:  # transformers' and the hub's, of many types
        Encoder.from_pretrained(tmp_path, device="cpu")
    assert str(caught.value)


def test_code_of_a_model_is_not_run(byte_llama, tmp_path):
    """A model that brings its own code is refused unless trust_remote_code says otherwise."""
    for file in byte_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": "evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        Encoder.from_pretrained(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()
