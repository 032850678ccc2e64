"""What the tests of the server share: a server in a thread, a model behind it, and patience."""

import http.client
import json
import threading
import time

import uvicorn

from uncausal.encoder.serving.guard import protocol
from uncausal.encoder.serving.server import make_app
from uncausal.encoder.serving.service import Limits

TEXTS = ["the cat sees the river", "a dog likes music", "two apples", "the king paints the long road home"]


class Server:
    """Uvicorn on a free port of the loopback interface, in a thread."""

    def __init__(self, load, **limits):
        self.app = make_app(load, "tiny", Limits(**limits))
        config = uvicorn.Config(
            self.app,
            http=protocol(limits.get("body_seconds", 30)),
            host="127.0.0.1",
            port=0,
            log_level="critical",
            timeout_graceful_shutdown=20,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def call(self, method, path, body=None, headers=None):
        """Return status, headers and decoded body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        is_json = text and response.headers.get_content_type() == "application/json"
        return response.status, response.headers, json.loads(text) if is_json else text.decode()

    def ready(self):
        wait_for(lambda: self.call("GET", "/health")[0] == 200)
        return self


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def small_encoder(checkpoint):
    """A model that reads at most 32 tokens and has a prompt."""
    from uncausal import Encoder

    encoder = Encoder.from_pretrained(checkpoint, device="cpu", dtype="float32", max_seq_length=32)
    encoder.prompts = {"query": "the king "}
    return encoder


def small_server(encoder):
    """A server with limits that tests reach."""
    return Server(lambda: encoder, dimensions=(8,), max_texts=20, max_bytes=20_000, body_seconds=2)
