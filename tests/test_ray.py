"""Ray Data: the bytes of the local engine, with one worker and two, resumed, and with a worker that dies."""

import os
import re
import signal
from functools import partial

import pytest

ray = pytest.importorskip("ray", reason="needs `pip install uncausal[ray]`")

from uncausal import Encoder  # noqa: E402
from uncausal.encoder.data.rows import DataError  # noqa: E402
from uncausal.encoder.serving.corpus import (  # noqa: E402
    CorpusSettings,
    encode_corpus,
    open_corpus,
    read_corpus,
)
from uncausal.encoder.serving.ray import Worker, _shard_row, encode_corpus_on_ray  # noqa: E402

WORDS = "the a cat dog king sees likes paints river music".split()
ROWS = [(f"id{i}", " ".join(WORDS[(i * k) % 10] for k in range(1, 3 + i % 9))) for i in range(57)]
SETTINGS = CorpusSettings(rows_per_shard=10)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


def load(path, dies=None):
    """The encoder; with a file, its process dies at the first batch, once."""
    encoder = Encoder.from_pretrained(path, device="cpu", dtype="float32")
    forward = encoder.forward

    def dying(features, **options):
        if dies.exists():
            dies.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(features, **options)

    if dies is not None:
        encoder.forward = dying
    return encoder


def test_workers_write_the_bytes_of_the_local_engine(tiny_checkpoint, tmp_path):
    """One worker goes on where another engine stopped; of two, one dies and is started anew."""
    one, two, read = tmp_path / "one", tmp_path / "two", lambda: iter(ROWS)
    encode_corpus(load(tiny_checkpoint), ROWS, one, SETTINGS)
    whole = contents(one)
    (one / "part-00002.parquet").unlink()
    (one / "part-00005.json").unlink()
    result = encode_corpus_on_ray(partial(load, tiny_checkpoint), read, one, SETTINGS)
    assert (result.encoded, result.found, result.shards) == (17, 40, 6) and result.tokens > 17
    assert contents(one) == whole
    (tmp_path / "marker").touch()
    dies = partial(load, tiny_checkpoint, tmp_path / "marker")
    result = encode_corpus_on_ray(dies, read, two, SETTINGS, workers=2)
    assert result.encoded == 57 and not (tmp_path / "marker").exists()
    assert contents(two) == whole and len(read_corpus(two)) == 57


def test_what_a_worker_refuses_is_told(tiny_checkpoint, tmp_path):
    """In this process: a worker hands on what it refuses as it hands on what fails later."""
    load_tiny = partial(load, tiny_checkpoint)
    assert not Worker(load_tiny, tmp_path, SETTINGS).failure
    assert not list(tmp_path.iterdir())  # the input may be at fault, and the next call have other settings
    open_corpus(load_tiny(), tmp_path, SETTINGS)
    said, where = Worker(load_tiny, tmp_path, CorpusSettings(rows_per_shard=11)).failure
    assert re.search(
        r"differs in rows_per_shard \(10 there, 11 here\): choose another folder, or remove it$", said
    )
    assert "in open_corpus" in where
    with pytest.raises(ValueError, match="workers is 0"):
        encode_corpus_on_ray(load_tiny, lambda: iter(ROWS), tmp_path, workers=0)


def read_badly():
    yield from ROWS[:15]
    raise DataError("rows.jsonl:16: the text is empty")


def test_what_fails_on_the_way_is_told(tiny_checkpoint, tmp_path, monkeypatch, capfd):
    """In the reader, and within a shard; what was whole by then stays.

    Regression: the cause stood within fifty lines, of Ray's log and of two tracebacks.
    """
    load_tiny = partial(load, tiny_checkpoint)
    with pytest.raises(RuntimeError, match="^rows.jsonl:16: the text is empty$"):
        encode_corpus_on_ray(load_tiny, read_badly, tmp_path / "read", SETTINGS)
    assert "Traceback" not in (log := capfd.readouterr().err), log
    assert (tmp_path / "read" / "part-00000.parquet").exists()
    assert not (tmp_path / "read" / "input.json").exists()
    worker = Worker(load_tiny, tmp_path / "shard", SETTINGS)
    monkeypatch.setattr("uncausal.encoder.serving.ray.encode_shard", lambda *_: {}["layers"])
    batch = _shard_row(0, 1, ["a"], ["the king"])
    [failure] = worker(batch)["failure"]
    assert failure[0] == "KeyError: 'layers'" and "Traceback" in failure[1]


def test_what_ray_itself_says_is_one_line(tiny_checkpoint, tmp_path, monkeypatch):
    def died(self):
        raise ray.exceptions.ActorDiedError()

    monkeypatch.setattr(ray.data.Dataset, "iter_rows", died)
    told = "^Ray: The actor died unexpectedly before finishing this task.; the same again goes on"
    with pytest.raises(RuntimeError, match=told):
        encode_corpus_on_ray(partial(load, tiny_checkpoint), lambda: iter(ROWS), tmp_path, SETTINGS)
