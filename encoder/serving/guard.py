"""What stands before the routes: the key, sizes and paces of requests and answers, their count and time."""

from __future__ import annotations

import asyncio
import hmac
import socket
import time
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import Response
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from uncausal.encoder.serving.service import Refused, Service

PIECE = 65_536  # bytes of an answer that are sent at a time
MOST_HEAD = 65_536  # bytes of a request before its body
OPEN = {("GET", "/health"), ("HEAD", "/health"), ("GET", "/metrics"), ("HEAD", "/metrics")}  # need no key


def refusal_of(refusal: Refused, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that tells why there is no other."""
    if refusal.retry_after:
        headers = {"Retry-After": str(refusal.retry_after)}
    error = {"message": refusal.message, "type": "error", "code": refusal.status}
    return Response(orjson.dumps({"error": error}), refusal.status, headers, "application/json")


class Held:
    """Bytes of one request and of its answer, counted among those of all."""

    def __init__(self, service: Service):
        self.service, self.bytes = service, 0

    def take(self, count: int) -> None:
        """Count so many more, or refuse."""
        if self.service.held_bytes + count > self.service.limits.max_waiting_bytes:
            raise self.service.overloaded()
        self.add(count)

    def add(self, count: int) -> None:
        """Count so many more or, below zero, fewer."""
        self.service.held_bytes += count
        self.bytes += count


class Guard:
    """Plain ASGI, as a middleware of Starlette costs a request two tasks more and a stream between them.

    Args:
        app: what comes behind.
        service: has the limits and the counters.
        methods: of every route, by its path.
    """

    def __init__(self, app: ASGIApp, service: Service, methods: Mapping[str, set[str]]):
        self.app, self.service, self.methods = app, service, methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, held = time.perf_counter(), 500, Held(self.service)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await self._send(message, send, held)

        try:
            try:
                self._check_key(scope)
                if scope["method"] == "POST" and "POST" in self.methods.get(scope["path"], ()):
                    receive = await self._read_body(scope, receive, held)
            except Refused as refusal:
                await refusal_of(refusal)(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        finally:
            held.add(-held.bytes)
            route = scope["path"] if scope["path"] in self.methods else "other"
            self.service.requests.labels(route, status).inc()
            self.service.seconds.labels(route).observe(time.perf_counter() - start)

    def _check_key(self, scope: Scope) -> None:
        key = self.service.limits.api_key
        if key is None or (scope["method"], scope["path"]) in OPEN:
            return
        given = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
        wanted = key.encode(errors="surrogateescape")  # as the environment is decoded
        if not hmac.compare_digest(given.encode("latin-1"), wanted):  # as headers are
            raise Refused(401, "wrong or missing API key")

    async def _read_body(self, scope: Scope, receive: Receive, held: Held) -> Receive:
        """Read the body within the limits of size and time, and return what hands it to the route."""
        limits = self.service.limits
        too_large = Refused(413, f"the body is larger than {limits.max_bytes} bytes")
        if int(Headers(scope=scope).get("content-length") or 0) > limits.max_bytes:
            raise too_large
        body = bytearray()

        async def read() -> None:
            message: Message = {"more_body": True}
            while message.get("more_body"):
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(499, "the client left")
                part = message.get("body", b"")
                if len(body) + len(part) > limits.max_bytes:
                    raise too_large
                held.take(len(part))
                body.extend(part)

        try:
            await asyncio.wait_for(read(), limits.body_seconds)
        except asyncio.TimeoutError:
            raise Refused(408, f"the body did not arrive within {limits.body_seconds:g} s") from None
        whole: list[Message] = [{"type": "http.request", "body": bytes(body)}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay

    async def _send(self, message: Message, send: Send, held: Held) -> None:
        """Send a message, a long body in pieces: each waits until most of those before it have left."""
        body, more = message.get("body", b""), message.get("more_body", False)
        held.add(len(body))
        if len(body) <= PIECE:
            await send(message)
            return
        for first in range(0, len(body), PIECE):
            left = more or first + PIECE < len(body)
            await send({**message, "body": body[first : first + PIECE], "more_body": left})


def protocol(seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol for a connection, that ends it where a client makes it wait or hold without end.

    Args:
        seconds: for a head to arrive, or the rest of a body that was answered before its end; and without a
            byte taken of an answer that waits.
    """
    return type("BoundedProtocol", (_Bounded,), {"seconds": seconds})


class _Bounded(HttpToolsProtocol):
    """One request at a time, and none that changes the protocol.

    Behind the answer to a request that another followed too early the connection is closed: the client is to
    send the others again (RFC 9112, section 9.3.2). An offer to upgrade, which Java's client makes with every
    first request, is left aside, where uvicorn would lose the request's body.
    """

    seconds = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # What has left is what the kernel sends, and not what it would take to send later.
        option, own = getattr(socket, "TCP_NOTSENT_LOWAT", None), transport.get_extra_info("socket")
        if option is not None and own is not None and own.family != socket.AF_UNIX:
            own.setsockopt(socket.IPPROTO_TCP, option, PIECE)
        self.loose = 0  # bytes since the last that were a body's
        self.in_head, self.deaf = True, False
        self.late: asyncio.TimerHandle | None = None
        self.unsent: asyncio.TimerHandle | None = None
        self._expect()

    def data_received(self, data: bytes) -> None:
        if self.deaf:
            return
        self._unset_keepalive_if_required()
        if self.in_head and self.late is None and not self._busy():
            self._expect()
        self.loose += len(data)
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
        except HttpParserError:
            self._refuse("Invalid HTTP request received.")
        if self.loose > MOST_HEAD and not self.deaf and not self.transport.is_closing():
            if self.in_head:
                status = b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
                self.transport.write(status + b"connection: close\r\ncontent-length: 0\r\n\r\n")
                self.transport.close()
            else:  # trailers, or what stands beside a chunk's length
                self.transport.abort()
        self._watch_unsent()

    def _busy(self) -> bool:
        """Whether a request waits for its answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def _turn_deaf(self) -> None:
        """Answer what is being answered, and nothing more."""
        self.cycle.keep_alive, self.deaf = False, True

    def _refuse(self, message: str) -> None:
        if self.in_head and self._busy():
            self._turn_deaf()
        else:
            self.send_400_response(message)

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse("CONNECT is for proxies.")
            return
        headers = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = HttpRequestParser(self)
        head = b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(headers))
        self.data_received(head + rest)

    def on_message_begin(self) -> None:
        if self._busy():
            self._turn_deaf()
        if not self.deaf:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self.deaf:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head and not self.deaf:  # trailers say nothing here
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self.deaf and not self.parser.should_upgrade():
            self.in_head = False
            self._stop(self.late)
            self.late = None
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.deaf:
            self.loose = 0
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.deaf or self.parser.should_upgrade():
            return
        self.loose, self.in_head = 0, True
        super().on_message_complete()
        if not self._busy():  # it was answered before its end
            self._stop(self.late)
            self.late = None
            keep_alive = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
            self.timeout_keep_alive_task = keep_alive

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.in_head:
            self._expect()
        self._watch_unsent()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unsent()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop(self.unsent)
        self.unsent = None
        self._watch_unsent()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self.late)
        self._stop(self.unsent)
        super().connection_lost(exc)

    def _expect(self) -> None:
        """End the connection if what is awaited has not arrived in a while."""
        self._stop(self.late)
        self.late = self.loop.call_later(self.seconds, self.transport.abort)

    def _watch_unsent(self) -> None:
        """Look again in a while whether the client has taken anything of what waits."""
        waiting = self.transport.get_write_buffer_size()
        if self.unsent is not None or not waiting:
            return

        def look() -> None:
            self.unsent = None
            if self.transport.get_write_buffer_size() < waiting:
                self._watch_unsent()
            else:
                self.transport.abort()

        self.unsent = self.loop.call_later(self.seconds, look)

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
