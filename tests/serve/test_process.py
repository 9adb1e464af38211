"""The engine's process and the server's: start, bind, garbage on the socket, death, SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest
import zmq
from live_server import FACTORY, PATIENCE, Running, free_port, http, run_serve

from undistilled.errors import BadArtefact, CannotBind, RequestError, UsageError
from undistilled.events import subscribed
from undistilled.ops.registry import say_fallback
from undistilled.schedule.request import Output, Request, Sampling
from undistilled.serve.client import EngineClient
from undistilled.serve.messages import Add, Command
from undistilled.serve.server import bind, progress_lines, serve
from undistilled.serve.stream import merge
from undistilled.serve.worker import tell
from undistilled.wire import Wire


def test_garbage_on_the_sockets_is_dropped(server):
    directory = server.client._sockets.directory
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    forged = Wire("not the key", Command).pack(Add(Request("x", [1], Sampling())))
    added = server.stats()["added"]
    with zmq.Context() as context:
        for name in ("commands", "reports"):
            with context.socket(zmq.PUSH) as s:
                s.set(zmq.LINGER, 500)
                s.connect(f"ipc://{directory}/{name}")
                for frames in (
                    [b"x"],
                    [b"", b""],
                    forged,
                    [server.client._key.encode(), b"\xff" * 100],
                    [b"x"] * 9,
                    [server.client._key.encode(), b"\x91" * 100_000],
                ):
                    s.send_multipart(frames)
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(f"{directory}/{name}")
                s.sendall(os.urandom(10_000))
    time.sleep(0.3)
    answer = server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 5})
    assert answer.json()["choices"][0]["text"] == "Hello"
    server.wait_for(lambda stats: stats["added"] == added + 1)


def test_the_engine_dies():
    with Running({"delay": 0.02}) as running:
        answers = []
        body = {"prompt": "long", "max_tokens": 4000}
        neighbour = threading.Thread(target=lambda: answers.append(running.post("/v1/completions", body)))
        neighbour.start()
        running.wait_for(lambda stats: stats.get("running") == 1)
        assert running.post("/v1/completions", {"prompt": "die"}).status_code == 500
        neighbour.join(PATIENCE)
        assert answers[0].status_code == 500 and answers[0].json()["error"]["code"] == "engine_dead"
        health = http.get(running.base + "/health")
        assert health.status_code == 503 and health.json()["error"]["type"] == "server_error"
        assert running.post("/v1/completions", {"prompt": "Hi"}).status_code == 500


def test_a_stopped_engine_is_found_by_the_watchdog():
    with Running({"delay": 0.02}) as running:
        running.client.watchdog = 1.0
        os.kill(running.client.pid, signal.SIGSTOP)
        assert running.post("/v1/completions", {"prompt": "Hi"}).status_code == 500
        health = http.get(running.base + "/health")
        assert health.status_code == 503
        assert "has not said a word for 1 s; it was answering 1 request. It was ended." in health.text


def test_an_error_while_opening_keeps_its_class():
    with pytest.raises(BadArtefact, match=r"The model is bad. Get another."):
        asyncio.run(EngineClient.start({"bad": True}, factory=FACTORY))


def test_generate_and_progress():
    async def main() -> tuple[str, list]:
        seen: list = []
        client = await EngineClient.start({"load": 1.0}, factory=FACTORY, progress=lambda *news: seen.append(news))
        try:
            text, ids = "", lambda words: client.tokenizer.encode(words, control=False)
            async for output in client.generate(Request("a", ids("Hi"), Sampling(max_tokens=5))):
                text += output.text
            with pytest.raises(RequestError):
                async for _ in client.generate(Request("b", ids("refuse"), Sampling())):
                    pass
            async for _ in client.generate(Request("c", ids("long"), Sampling(500))):
                break
            return text, seen
        finally:
            await client.close()
            assert not os.path.exists(client._sockets.directory)

    text, seen = asyncio.run(main())
    assert text == "Hello" and len(seen) > 1 and seen[0] == (0, 10, "weight")


def test_merge():
    merged = merge([Output("a", [1], "x", completion_tokens=1), Output("a", [2], "y", [], "stop", None, 3, 2)])
    assert (merged.tokens, merged.text, merged.finish_reason, merged.completion_tokens) == ([1, 2], "xy", "stop", 2)


def started(port: int, shutdown_timeout: float = 5.0, **options: object) -> subprocess.Popen:
    """A process that serves; its output is text. Returns once it answers."""
    command = run_serve(options=options, port=port, shutdown_timeout=shutdown_timeout)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            if http.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


def test_sigterm_lets_requests_finish_and_refuses_new_ones():
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    process = started(port, 20.0, delay=0.02)
    answers = []
    body = {"prompt": "long", "max_tokens": 150}
    busy = threading.Thread(target=lambda: answers.append(http.post(base + "/v1/completions", json=body)))
    busy.start()
    time.sleep(0.8)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    refused = http.post(base + "/v1/completions", json=body)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    health = http.get(base + "/health")
    assert health.status_code == 200 and not answers
    out, err = process.communicate(timeout=PATIENCE)
    busy.join()
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 150
    assert process.returncode == 0, err
    assert f"http://127.0.0.1:{port}/v1" in out and "curl" in out


def test_sigterm_gives_up_after_the_timeout_and_while_loading():
    port = free_port()
    process = started(port, 0.5, delay=0.02)
    body = {"prompt": "long", "max_tokens": 4000, "stream": True}
    with http.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body):
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    command = run_serve(options={"load": 30}, port=port)
    loading = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not _children(loading.pid):
        time.sleep(0.05)
    time.sleep(0.2)
    loading.send_signal(signal.SIGTERM)
    _, err = loading.communicate(timeout=PATIENCE)
    assert loading.returncode == 0 and "Traceback" not in err, err


def test_the_engine_ends_with_a_server_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a killed server leaves its sockets' directory
    process = started(port := free_port(), delay=0.02)
    children = _children(process.pid)
    assert len(children) == 2 and port  # the engine, and what renders templates
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert all(p.status() == psutil.STATUS_ZOMBIE for p in alive), "a child outlived the server"


def test_a_server_whose_engine_died_ends():
    process = started(free_port(), fallback=True)
    _children(process.pid)[0].kill()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "engine has ended" in err
    assert "The engine's process was killed by signal 9; it was idle." in err
    assert err.count("op for model on cpu has no fast kernel here: the PyTorch reference runs") == 1


def _children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children()


@pytest.mark.parametrize("module", ["undistilled.serve.worker", "undistilled.generate.rank"])
@pytest.mark.parametrize("said", ["", '{"key": '])
def test_a_process_whose_parent_was_interrupted_ends_quietly(module, said):
    command = [sys.executable, "-P", "-m", module]
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and not done.stderr + done.stdout


def test_a_port_is_taken_before_a_model_is_loaded():
    with bind("127.0.0.1", 0) as first:
        with pytest.raises(CannotBind, match="--port") as error:
            bind("127.0.0.1", first.getsockname()[1])
    assert error.value.exit_code == 5


def test_a_fallback_is_told_once(capsys, monkeypatch):
    monkeypatch.setattr("undistilled.ops.registry._said", set())
    with subscribed(tell):
        for _ in range(2):
            say_fallback("matmul", "int8", "cpu")
    said = "matmul for int8 on cpu has no fast kernel here: the PyTorch reference runs\n"
    assert capsys.readouterr().err == said


def test_exit_codes():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = run_serve(options={"bad": True}, port=port)
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 5 and str(port) in done.stderr and "--port" in done.stderr
    for options, said in (
        ({"bad": True}, "bad"),
        ({"chat_template": "{% for i in range(10**9) %}{% endfor %}"}, "chat template"),
        ({"generation": {"temperature": 5.0}}, "generation_config.json: temperature is 5.0"),
        ({"generation": {"top_k": 2.5}}, "generation_config.json: top_k is 2.5"),
    ):
        command = run_serve(options=options, port=0)
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 3 and "Traceback" not in done.stderr and said in done.stderr, done.stderr


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_no_key(key):
    with pytest.raises(UsageError, match="key is empty"):
        serve({}, port=0, api_key=key)


def test_loading_is_told_in_tenths_or_in_time(capsys):
    show = progress_lines()
    for done in range(1001):
        show(done * 10**6, 10**9, "a tensor")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[3].split() == ["loading", "30%", "0.3", "of", "1.0", "GB"]
    often = progress_lines(seconds=0.0)
    for done in range(3):
        often(done, 10**6, "a tensor")
    assert len(capsys.readouterr().err.splitlines()) == 3
