"""Key, sizes, times and queue."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import Running, http

from undistilled.serve.limits import Limits, too_deep

ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/metrics"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
    ("GET", "//health"),
    ("GET", "/health/"),
    ("GET", "/docs"),
    ("GET", "/v1/models/../../health"),
    ("GET", "/v1/models?path=/health"),
]


@pytest.fixture(scope="module")
def strict():
    limits = Limits(max_body=100_000, body_seconds=1.0, queue=2, send_seconds=0.5)
    settings = {"api_key": "sécret", "limits": limits}
    with Running({"delay": 0.02}, settings, header_seconds=0.7) as running:
        running.headers = {"Authorization": "Bearer sécret".encode()}
        yield running


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer ", "Basic sécret", "sécret", "Bearer sécretx"])
def test_every_route_but_health_needs_the_key(strict, key):
    headers = {"Authorization": key.encode()} if key else {}
    for method, path in ROUTES:
        for host in ("127.0.0.1", "x/health?", "localhost/health"):
            answer = raw(strict.port, method, path, host, headers)
            assert b" 401 " in answer and b"invalid_api_key" in answer, (path, answer)
    assert http.get(strict.base + "/health").status_code == 200


def raw(port: int, method: str, path: str, host: str, headers: dict[str, bytes]) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n".encode()
    head += b"".join(name.encode() + b": " + value + b"\r\n" for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", port)) as s:
        s.sendall(head + b"Content-Length: 0\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: s.recv(65536), b""))


def test_the_right_key(strict):
    assert http.get(strict.base + "/v1/models", headers=strict.headers).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_while_it_comes(strict, chunked):
    body = (b"x" * 1000 for _ in range(3000)) if chunked else b"x" * 3_000_000
    try:
        answer = http.post(strict.base + "/v1/completions", content=body, headers=strict.headers)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    except httpx.WriteError:
        assert chunked  # the server hung up while we were still sending


def test_one_byte_chunks(strict):
    with socket.create_connection(("127.0.0.1", strict.port)) as s:
        s.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            + b"Authorization: Bearer "
            + "sécret".encode()
            + b"\r\n\r\n"
        )
        s.settimeout(10)
        try:
            for _ in range(200):
                s.sendall(b"1\r\nx\r\n" * 1000)
        except OSError:
            pass
        try:
            answer = s.recv(4096)
        except ConnectionResetError:
            answer = b" 413 "
    assert b" 413 " in answer or b" 408 " in answer
    assert http.get(strict.base + "/health").status_code == 200


def test_a_slow_body_and_slow_headers(strict):
    for sent in (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nAuthorization: Bearer "
        + "sécret".encode()
        + b"\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: x\r\n",
        b"",
    ):
        with socket.create_connection(("127.0.0.1", strict.port)) as s:
            s.sendall(sent)
            s.settimeout(20)
            answer = b"".join(iter(lambda s=s: s.recv(4096), b""))
            assert b" 408 " in answer and b'"error"' in answer


def test_a_connection_that_trickles_headers_after_a_request(strict):
    with socket.create_connection(("127.0.0.1", strict.port)) as s:
        s.settimeout(20)
        s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while b'"ok"' not in answer:
            answer += s.recv(4096)
        s.sendall(b"GET /hea")
        assert b" 408 " in s.recv(4096)


def test_a_full_queue(strict):
    def hold():
        body = {"prompt": "long", "max_tokens": 150}
        http.post(strict.base + "/v1/completions", json=body, headers=strict.headers)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    strict.wait_for(lambda stats: stats["running"] == 2)
    answer = http.post(strict.base + "/v1/completions", content=b"not even JSON", headers=strict.headers)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "queue_full"
    assert http.get(strict.base + "/v1/models", headers=strict.headers).status_code == 200
    for thread in threads:
        thread.join()
    body = {"prompt": "Hi", "max_tokens": 1}
    assert http.post(strict.base + "/v1/completions", json=body, headers=strict.headers).status_code == 200


def test_a_reader_that_stops_reading_is_aborted():
    """The kernel's buffers are filled by large chunks; then nothing moves for `send_seconds`."""
    limits = Limits(send_seconds=0.3)
    with Running({"delay": 0.0005, "reply": "x", "context": 10**6}, {"limits": limits}) as running:
        body = json.dumps({"prompt": "long", "max_tokens": 900_000, "stream": True, "logprobs": 20, "n": 16}).encode()
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.connect(("127.0.0.1", running.port))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            head += "Content-Type: application/json\r\n\r\n"
            s.sendall(head.encode() + body)
            running.wait_for(lambda stats: stats.get("running") == 16)
            running.wait_for(lambda stats: stats.get("aborted") == 16 and stats["kv_blocks_used"] == 0)


def nested(value: object) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if children is None else 1 + max(map(nested, children), default=0)


@settings(max_examples=30)
@given(st.recursive(st.text() | st.none() | st.floats(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)))
def test_depth_is_counted_outside_strings(value):
    body = json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")
    for limit in range(4):
        assert too_deep(body, limit) == (nested(value) > limit)


def test_depth_of_hostile_bodies_is_quick():
    began = time.monotonic()
    assert too_deep(b"[" * 4_000_000, 100)
    assert not too_deep(b'"' + b'\\"[' * 1_300_000, 100)
    assert not too_deep(b"[]" * 2_000_000, 100)
    too_deep(b'"\\' * 2_000_000 + b"[" * 101, 100)
    assert too_deep(b"[" * 101 + b'"' + b'\\"' * 2_000_000 + b"\\", 100)  # a string that never ends
    assert time.monotonic() - began < 20  # whose square would take hours
