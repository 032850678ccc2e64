"""The commands serve and index, and the search of an index."""

import gc
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import sqlite3
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from commands import TEXTS, run

from uncausal.encoder.cli.main import main
from uncausal.encoder.model import Encoder
from uncausal.encoder.serving.index import Index

SUM = 'def add(a, b):\n    """Add two numbers."""\n    return a + b\n'
GUIDE = "# Rivers\n\nA river carries water to the sea.\n"


def ask(port, path, body=None, key=None):
    """Return status and decoded body, once the model is loaded."""
    deadline = time.monotonic() + 30
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        if response.status != 503 or time.monotonic() > deadline:
            return response.status, content
        time.sleep(0.02)


def served(capsys, monkeypatch, command, *requests, stop=signal.SIGINT):
    """Run the server in this thread, ask from another, then stop it by a signal; return the answers."""
    from uncausal.encoder.cli import serving

    sockets, answers, frozen, listen = [], [], [], serving.listen

    def listening(host, port):
        sockets.append(listen(host, port))
        return sockets[0]

    def client():
        try:
            while not sockets:
                time.sleep(0.02)
            port = sockets[0].getsockname()[1]
            answers.extend(ask(port, *request) for request in requests)
            frozen.append(gc.get_freeze_count())
        finally:
            os.kill(os.getpid(), stop)

    monkeypatch.setattr(serving, "listen", listening)
    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    capsys.readouterr()
    assert main([str(word) for word in command]) == 0
    thread.join(30)
    assert frozen[0] > 0 == gc.get_freeze_count()  # the collector leaves the model alone while it serves
    return answers, capsys.readouterr().err


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_serve_answers_until_it_is_stopped(cli_folder, tmp_path, capsys, monkeypatch, stop):
    pytest.importorskip("fastapi", reason="the server needs `pip install uncausal[serve]`")
    uvicorn = pytest.importorskip("uvicorn")
    terminated, given, config = [], {}, uvicorn.Config
    monkeypatch.setattr(
        uvicorn, "Config", lambda app, **options: (given.update(options), config(app, **options))[1]
    )
    before = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))  # raised again by uvicorn
    (tmp_path / "key").write_text("secret\n")
    model = str(cli_folder / "encoder")
    options = ["--port", 0, "--dtype", "float32", "--max-texts", 3, "--name", "tiny", "--stop-seconds", 7]
    command = ["serve", model, *options, "--api-key-file", tmp_path / "key"]
    requests = [
        ("/v1/embeddings", {"input": TEXTS}, "secret"),
        ("/embed", {"inputs": TEXTS}, "wrong"),
        ("/embed", {"inputs": [*TEXTS, "one more"]}, "secret"),
    ]
    try:
        answers, said = served(capsys, monkeypatch, command, *requests, stop=stop)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [status for status, _ in answers] == [200, 401, 413]
    body = answers[0][1]
    assert body["model"] == "tiny"
    expected = Encoder.from_pretrained(model, dtype="float32").encode(TEXTS)
    np.testing.assert_allclose([row["embedding"] for row in body["data"]], expected, atol=1e-5)
    assert re.match(rf"serving {re.escape(model)} at http://127\.0\.0\.1:\d+\n", said)
    assert "Traceback" not in said and bool(terminated) == (stop == signal.SIGTERM)
    assert given["timeout_graceful_shutdown"] == 7 and given["http"].__name__ == "BoundedProtocol"


def test_serve_takes_the_key_of_the_environment(cli_folder, capsys, monkeypatch):
    pytest.importorskip("fastapi", reason="the server needs `pip install uncausal[serve]`")
    monkeypatch.setenv("UNCAUSAL_API_KEY", "from outside")
    command = ["serve", cli_folder / "encoder", "--port", 0]
    requests = [("/info", None, "from outside"), ("/info", None, "")]
    answers, _ = served(capsys, monkeypatch, command, *requests)
    assert [status for status, _ in answers] == [200, 401]


@pytest.mark.parametrize("host, warned", [("0.0.0.0", True), ("::", True), ("127.0.0.2", False)])
def test_serve_warns_where_others_reach_it_without_a_key(cli_folder, tmp_path, capsys, host, warned):
    """The port does not exist, so that nothing listens there."""
    pytest.importorskip("fastapi", reason="the server needs `pip install uncausal[serve]`")
    (tmp_path / "key").write_text("secret")
    command = ["serve", str(cli_folder / "encoder"), "--host", host, "--port", "99999"]
    for key, wanted in (([], warned), (["--api-key-file", str(tmp_path / "key")], False)):
        assert main([*command, *key]) == 1
        said = capsys.readouterr().err
        assert ("no key is asked for" in said) == wanted and "cannot listen" in said


def test_serve_refuses(cli_folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("fastapi", reason="the server needs `pip install uncausal[serve]`")
    model = cli_folder / "encoder"
    assert "no model at '/nowhere'" in run(capsys, "serve", "/nowhere", "--port", 0, status=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = run(capsys, "serve", model, "--port", port, status=1)
    assert f"cannot listen on --host 127.0.0.1 --port {port}: Address already in use" in said
    assert "cannot listen on" in run(capsys, "serve", model, "--port", 99999, status=1)
    (tmp_path / "key").write_text("\n")
    said = run(capsys, "serve", model, "--port", 0, "--api-key-file", tmp_path / "key", status=1)
    assert "holds no API key" in said
    assert "--api-key" in run(capsys, "serve", model, "--api-key", "secret", status=2)
    said = run(capsys, "serve", model, "--port", 0, "--attention", "sdpa", status=1)
    assert "does not run packed" in said and "serving" not in said
    said = run(capsys, "serve", model, "--port", 0, "--dimensions", 4096, status=1)
    assert "dimension 4096 is none that" in said
    assert "max waiting is 0" in run(capsys, "serve", model, "--max-waiting", 0, status=1)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert "pip install 'uncausal[serve]'" in run(capsys, "serve", model, status=1)


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "sums.py").write_text(SUM)
    (folder / "guide.md").write_text(GUIDE)
    return folder


def test_index_is_updated_and_searched(cli_folder, project, tmp_path, capsys, monkeypatch):
    """The model of an update and of a search is the index's own, from any folder."""
    monkeypatch.chdir(cli_folder)
    path = tmp_path / "code.index"
    options = ["--out", path, "--dtype", "float32", "--json"]
    made = json.loads(
        run(capsys, "index", project, "--model", "encoder", "--dimension", 16, "--int8", *options)
    )
    assert (made["added"], made["passages"], made["index"]) == (2, 3, str(path))
    assert Index(path).vectors.shape == (3, 16)
    monkeypatch.chdir(tmp_path)
    (project / "guide.md").write_text(GUIDE + "\nIt ends there.\n")
    done = json.loads(run(capsys, "index", project, *options))
    assert (done["added"], done["changed"], done["unchanged"]) == (0, 1, 1)
    passage = {name: text for _, _, _, name, text in Index(path).passages}["add"]
    search = ["search", path, passage, "--dtype", "float32"]
    [result] = json.loads(run(capsys, *search, "--json"))
    hit = result["hits"][0]
    assert result["query"] == passage and hit["score"] > 0.99
    assert (hit["path"], hit["line"], hit["end_line"], hit["name"]) == ("sums.py", 1, 3, "add")
    [result] = json.loads(run(capsys, *search, "--within", "*.md", "--top-k", 1, "--json"))
    assert [hit["path"] for hit in result["hits"]] == ["guide.md"]
    assert re.search(r"^  \d\.\d{3}  sums\.py:1-3  add$", run(capsys, *search), re.M)


def test_index_is_updated_and_searched_with_the_model_as_it_was_loaded(cli_folder, project, tmp_path, capsys):
    """Regression: without the options it was made with, an index was said to be of another model."""
    path, model = tmp_path / "code.index", cli_folder / "encoder"
    loading = ["--pooling", "weighted_mean", "--num-layers", 1, "--dtype", "float32"]
    run(capsys, "index", project, "--model", model, "--out", path, *loading)
    for options in ([], ["--model", model], loading):
        assert "unchanged: 2" in run(capsys, "index", project, "--out", path, *options)
        assert "sums.py:1-3  add" in run(capsys, "search", path, "add two numbers", *options)
    for command in (["index", project, "--out", path], ["search", path, "add"]):
        said = run(capsys, *command, "--pooling", "mean", status=1)
        assert f"{path}: was made with pooling='weighted_mean', not 'mean': leave that option out" in said
        assert "cannot be made causal again" in run(capsys, *command, "--causal", status=1)
        said = run(capsys, *command, "--max-seq-length", 4, status=1)
        assert (
            "max_seq_length 512, not 4" if command[0] == "index" else "or of one loaded otherwise"
        ) in said
    model.rename(moved := model.with_name("moved"))
    run(capsys, "search", path, "add", "--max-seq-length", 64, "--model", moved)
    assert "unchanged: 2" in run(capsys, "index", project, "--out", path, "--model", moved)
    with closing(sqlite3.connect(path)) as database:
        [[told]] = database.execute("SELECT value FROM meta WHERE key = 'loading'")
    assert json.loads(told) == {"pooling": "weighted_mean", "num_layers": 1, "dtype": "float32"}
    moved.rename(model)


def test_index_and_its_search_refuse(cli_folder, byte_llama, project, tmp_path, capsys):
    path, model = tmp_path / "code.index", cli_folder / "encoder"
    assert "a new index needs --model" in run(capsys, "index", project, "--out", path, status=1)
    said = run(capsys, "index", tmp_path / "nowhere", "--model", model, "--out", path, status=1)
    assert "no such folder" in said
    assert f"no index at {path}: `uncausal index" in run(capsys, "search", path, "query", status=1)
    (tmp_path / "empty").mkdir()
    run(capsys, "index", tmp_path / "empty", "--model", model, "--out", tmp_path / "none.index")
    assert "passages: 0" in run(capsys, "index", tmp_path / "empty", "--out", tmp_path / "none.index")
    run(capsys, "index", project, "--model", model, "--out", path)
    assert "one or more queries after the index" in run(capsys, "search", path, status=1)
    said = run(capsys, "search", path, "query", "--model", byte_llama, status=1)
    assert "holds vectors of another model" in said
    said = run(capsys, "search", cli_folder / "texts.txt", "query", status=1)
    assert "neither an index, which `uncausal index` writes, nor a model" in said
    said = run(capsys, "search", model, cli_folder / "texts.txt", "query", "--within", "*.md", status=1)
    assert "--within is for an index" in said
