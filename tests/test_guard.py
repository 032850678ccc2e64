"""What the server takes and holds: sizes, paces, the key; on raw connections where no client would do so."""

import contextlib
import hmac
import http.client
import json
import socket
import threading
import time

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server needs `pip install uncausal[serve]`")
from served import Server, small_encoder, small_server, wait_for

from uncausal.encoder.serving import server as server_module


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint):
    return small_encoder(tiny_checkpoint)


@pytest.fixture(scope="module")
def server(encoder):
    with small_server(encoder) as server:
        yield server.ready()


def test_slow_body_is_given_up(server):
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_bodies_that_wait_are_bounded_in_bytes(encoder):
    """Regression: a queue of 8,192 texts of two megabytes each was sixteen gigabytes."""
    body = json.dumps({"inputs": ["river " * 3], "padding": "x" * 1000}).encode()
    with Server(lambda: encoder, max_bytes=1500, max_waiting_bytes=2000) as server:
        service, held, answers = server.ready().app.state.service, threading.Event(), []
        service.batcher._vectors = lambda jobs: (held.wait(20), np.ones((len(jobs), 2)))[1]
        first = threading.Thread(target=lambda: answers.append(server.call("POST", "/embed", body)[0]))
        first.start()
        wait_for(lambda: service.held_bytes == len(body))
        status, headers, answer = server.call("POST", "/embed", body)
        assert (status, headers["Retry-After"]) == (429, "1") and "full" in answer["error"]["message"]
        assert server.call("POST", "/embed", b"{}")[0] == 422  # which has room
        held.set()
        first.join()
        wait_for(lambda: service.held_bytes == 0)
        assert answers == [200] and server.call("POST", "/embed", body)[0] == 200


def connect(server, receive_buffer=None):
    """A raw connection, which may be one that takes little of what is sent to it."""
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.port))
    return connection


def post(path, body):
    """The bytes of a request."""
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


def test_answers_that_nobody_reads_are_counted_and_cut_off(encoder, monkeypatch):
    """Regression: they lay in memory, uncounted, for as long as the client stayed."""
    monkeypatch.setattr(server_module, "MOST_TOKENS_TOLD", 10**6)  # more than a socket's buffers hold
    body = json.dumps({"inputs": ["river " * 20_000] * 15}).encode()
    with Server(lambda: encoder, body_seconds=2) as server:
        service = server.ready().app.state.service
        _, headers, answer = server.call("POST", "/tokenize", body)
        assert len(answer) == 15
        length = int(headers["Content-Length"])
        with connect(server, 4096) as reader:
            reader.sendall(post("/tokenize", body))
            wait_for(lambda: service.held_bytes > 10_000_000)  # the answer
            assert server.call("POST", "/embed", {"inputs": "music"})[0] == 200
            wait_for(lambda: not service.held_bytes and not server.server.server_state.connections)
        with connect(server, 4096) as slow:  # who goes on reading gets all of it, however long that takes
            slow.sendall(post("/tokenize", body))
            start, taken = time.monotonic(), 0
            while time.monotonic() < start + 5:
                taken += len(slow.recv(65_536))
                time.sleep(0.1)
            assert 10**5 < taken < 10**6 < service.held_bytes
            while taken < length:
                assert (part := slow.recv(1 << 20))
                taken += len(part)


def test_heads_are_bounded(server):
    """Regression: one connection's headers took memory for as long as it sent them."""
    for line in (b"a: b\r\n", b"a" * 1000):  # many, or one that does not end
        with connect(server) as connection:
            connection.sendall(b"POST /embed HTTP/1.1\r\n" + (b"" if b":" in line else b"x: "))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(200_000 // len(line)):
                    connection.sendall(line)
            with contextlib.suppress(ConnectionResetError):
                assert b" 431 " in connection.recv(1000)
        assert server.call("GET", "/health")[0] == 200
    for trailer in (b"a: b\r\n", b"x" * 1000):
        with connect(server) as connection:
            head = b"POST /embed HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.sendall(head + b"2\r\n{}\r\n0\r\n" + b"x: " * (b":" not in trailer))
            with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
                for _ in range(20_000_000 // len(trailer)):
                    connection.sendall(trailer)
    with connect(server) as connection:  # a long body is no head, nor are many requests of one connection
        for _ in range(9):
            connection.sendall(post("/embed", json.dumps({"inputs": "river", "x": "y" * 19_000}).encode()))
            assert b" 200 " in connection.recv(65_536)


def test_a_body_without_a_length_is_bounded(server):
    """Chunked: only what is read tells how long it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    chunks = (b"a" * 5000 for _ in range(20))
    json_type = {"Content-Type": "application/json"}
    try:
        connection.request("POST", "/embed", chunks, json_type, encode_chunked=True)
    except (BrokenPipeError, ConnectionResetError):  # it was answered before the end
        pass
    assert connection.getresponse().status == 413
    connection.close()


def test_failures_nobody_foresaw_are_counted(encoder):
    with Server(lambda: encoder) as server:
        server.ready().app.state.service.embed = None
        assert server.call("POST", "/embed", {"inputs": "music"})[0] == 500
        found = server.call("GET", "/metrics")[2]
        assert 'uncausal_requests_total{route="/embed",status="500"} 1.0' in found


def test_key_is_asked_for(encoder, monkeypatch):
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *given: (compared.append(given), compare(*given))[1])
    with Server(lambda: encoder, api_key="secret") as server:
        server.ready()
        body = {"inputs": "music"}
        assert server.call("POST", "/embed", body)[0] == 401
        assert server.call("POST", "/embed", body, {"Authorization": "Bearer secreT"})[0] == 401
        assert server.call("POST", "/embed", body, {"Authorization": "Bearer secret"})[0] == 200
        # what needs no key takes no body: strangers held the bytes that others may wait with
        assert server.call("POST", "/health", b"x" * 5000)[0] == 401
    with Server(lambda: encoder, api_key="geheimnis\u00e4") as server:  # as clients send it
        key = "Bearer geheimnis\u00e4".encode().decode("latin-1")
        assert server.ready().call("POST", "/embed", body, {"Authorization": key})[0] == 200
    assert (b"secreT", b"secret") in compared and ("geheimnis\u00e4".encode(),) * 2 in compared
