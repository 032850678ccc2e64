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
from uncausal.encoder.serving.service import Limits


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


def test_short_answers_that_nobody_reads_are_cut_off(encoder):
    """Regression: what fits the transport's buffer counted as sent, and its connection never ended."""
    body = json.dumps({"inputs": ["river " * 1800]}).encode()
    with Server(lambda: encoder, body_seconds=1) as server:
        state = server.ready().server.server_state
        with contextlib.ExitStack() as readers:
            for _ in range(5):
                readers.enter_context(connect(server, 4096)).sendall(post("/tokenize", body))
            wait_for(lambda: any(c.transport.get_write_buffer_size() for c in state.connections))
            wait_for(lambda: not state.connections)


def held_model(server):
    """The server's service, and the event that its model waits for."""
    service, held = server.ready().app.state.service, threading.Event()
    vectors_of = service.batcher._vectors
    service.batcher._vectors = lambda jobs: (held.wait(20), vectors_of(jobs))[1]
    return service, held


def test_one_request_at_a_time(encoder):
    """Regression: what was sent behind a request was read without bound, uncounted, and without the key."""
    body = json.dumps({"inputs": "river"}).encode()
    with Server(lambda: encoder) as server:
        service, held = held_model(server)
        with connect(server) as connection:
            connection.sendall(post("/embed", body) + post("/embed", body) + b"no HTTP\r\n\r\n")
            wait_for(lambda: service.batcher.waiting or service.held_bytes)
            for _ in range(500):
                connection.sendall(post("/embed", b"x" * 60_000))
            [protocol] = server.server.server_state.connections
            assert not protocol.pipeline and len(protocol.cycle.body) == 0
            assert service.held_bytes == len(body)
            held.set()
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65_536):
                    answer += part
        assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1
        assert b"connection: close" in answer


def test_a_large_second_request_leaves_the_first_its_answer(encoder):
    """Regression: its bytes were counted as a head's, and the first one was answered 431."""
    body = json.dumps({"inputs": "river"}).encode()
    with Server(lambda: encoder) as server:
        service, held = held_model(server)
        with connect(server) as connection:
            connection.sendall(post("/embed", body))
            wait_for(lambda: service.batcher.waiting or service.held_bytes)
            [protocol] = server.server.server_state.connections
            large = post("/embed", b"x" * 200_000)
            server.server.servers[0].get_loop().call_soon_threadsafe(protocol.data_received, large)
            held.set()
            answer = b""
            while part := connection.recv(65_536):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


def test_who_leaves_is_noticed_whatever_was_sent_behind(encoder):
    """Regression: only the last of the requests of a connection was told."""
    body = json.dumps({"inputs": "river"}).encode()
    with Server(lambda: encoder) as server:
        service, held = server.ready().app.state.service, threading.Event()
        service.batcher._vectors = lambda jobs: (held.wait(20), np.ones((len(jobs), 2)))[1]
        with connect(server) as connection:
            connection.sendall(post("/embed", body) + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            wait_for(lambda: service.held_bytes)
        wait_for(lambda: not service.held_bytes)
        held.set()


@pytest.mark.parametrize("path", ["/embed", "/nowhere"])
def test_an_offer_to_upgrade_is_left_aside(server, path):
    """Java's client offers HTTP/2 with its first request. Regression: the request lost its body."""
    whole = post(path, json.dumps({"inputs": "river"}).encode())
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    end = whole.index(b"\r\n\r\n")
    request = whole[: end + 2] + offer + whole[end + 2 :]
    status = b" 200 " if path == "/embed" else b" 404 "
    for parts in ([request], [request[:-9], request[-9:]], [request[i : i + 50] for i in range(0, 999, 50)]):
        with connect(server) as connection:
            for _ in range(2):  # the connection stays
                for part in parts:
                    connection.sendall(part)
                    time.sleep(0.01)
                assert status in connection.recv(65_536)
    with connect(server) as connection:
        connection.sendall(b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b" 400 " in connection.recv(65_536)


@pytest.mark.parametrize("kind", ["head", "blank lines", "answered body", "nothing", "next head"])
def test_connections_that_wait_end(encoder, kind):
    """Regression: a byte now and then kept a connection for ever."""
    rest, again = b"x", b"x"
    first = {
        "head": b"GET /health HTTP/1.1\r\nHo",
        "blank lines": b"\r\n",
        "answered body": b"PUT /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n",
        "nothing": b"",
        "next head": b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
    }[kind]
    if kind in ("blank lines", "next head"):
        rest = again = b"\r\n"
    with Server(lambda: encoder, body_seconds=1) as server:
        state = server.ready().server.server_state
        wait_for(lambda: not state.connections)
        with connect(server) as connection:
            start = time.monotonic()
            connection.sendall(first)
            wait_for(lambda: state.connections)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while state.connections and time.monotonic() < start + 9:
                    connection.sendall(b"" if kind == "nothing" else rest)
                    time.sleep(0.1)
                    rest = again
            assert time.monotonic() < start + 9


def test_a_body_after_its_answer_does_not_end_the_connection(server):
    with connect(server) as connection:
        for _ in range(2):
            connection.sendall(b"PUT /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n")
            assert b" 405 " in connection.recv(65_536)
            connection.sendall(b"0123456789")
        time.sleep(3)  # longer than it may take
        connection.sendall(post("/embed", json.dumps({"inputs": "river"}).encode()))
        assert b" 200 " in connection.recv(65_536)


def test_a_length_above_the_limit_is_refused_unread(server):
    with connect(server) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 20001\r\n\r\n")
        assert b" 413 " in connection.recv(65_536)


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


def test_every_refusal_has_one_form(server):
    """Clients look for `error`; those of the frameworks below had a form of their own."""
    deep = b'{"inputs":' + b"[" * 9000 + b"]" * 9000 + b"}"
    for method, path, body in (
        ("POST", "/embed", deep),
        ("GET", "/embed", None),
        ("GET", "/nowhere", None),
        ("POST", "/embed/", b"{}"),
        ("POST", "/embed", b"{}"),
    ):
        status, headers, answer = server.call(method, path, body)
        assert answer["error"]["code"] == status >= 400 and answer["error"]["message"]
        assert status != 405 or headers["Allow"] == "POST"
    assert server.call("HEAD", "/health")[0] == server.call("HEAD", "/metrics")[0] == 200


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
        for route in server.app.routes:
            for method in route.methods:
                path = route.path
                status = server.call(method, path, body if method == "POST" else None)[0]
                needs_none = path in ("/health", "/metrics") and method in ("GET", "HEAD")
                assert (status == 401) != needs_none, (method, path, status)
    with Server(lambda: encoder, api_key="geheimnis\u00e4") as server:  # as clients send it
        key = "Bearer geheimnis\u00e4".encode().decode("latin-1")
        assert server.ready().call("POST", "/embed", body, {"Authorization": key})[0] == 200
    assert Limits(api_key="secret\n").api_key == "secret"  # as secrets are mounted
    for empty in ("", " \n"):
        with pytest.raises(ValueError, match="the API key is empty"):
            Limits(api_key=empty)
    assert (b"secreT", b"secret") in compared and ("geheimnis\u00e4".encode(),) * 2 in compared
