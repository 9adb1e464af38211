"""Ctrl-C over two ranks: while they load, in a prompt and while tokens come; all end at once, and quietly."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from live_server import free_port, http

from byte_tokens import write_tokenizer
from tiny import DEEPSEEK, write_checkpoint

SOON = 2.0  # seconds, as promised
SLACK = 2.0  # more, for a machine that is busy with something else; less than what an orderly end may take
LONG = 3000  # tokens of a prompt

# what starts the tests may ignore SIGINT, as a shell does for what it runs in the background, and that is inherited
HEAR = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
TELL = """
import sys
from undistilled import cli, events
def tell(event):
    if event.name in ("comm", "engine.pass"):
        sys.stderr.write(f"[{event.name} {event.fields.get('prefill')}]")
with events.subscribed(tell):
    cli.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = DEEPSEEK | {"vocab_size": 256, "max_position_embeddings": 8192, "rope_scaling": None}
    made = write_checkpoint(tmp_path_factory.mktemp("interrupted") / "m", config)
    write_tokenizer(made)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (made / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return str(made)


def started(*arguments):
    """A process group of its own, as a terminal makes one. What it does is told on stderr."""
    command = [sys.executable, "-c", f"{HEAR}\n{TELL}", *arguments, "--device", "cpu"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)


def running(code, **pipes):
    return subprocess.Popen([sys.executable, "-c", f"{HEAR}\n{code}"], stdout=subprocess.PIPE, **pipes)


def until_told(process, what):
    """What it told so far, once that has `what` in it."""
    told, until = b"", time.monotonic() + 120
    while what not in told:
        assert time.monotonic() < until and process.poll() is None, told
        told += os.read(process.stderr.fileno(), 4096)
    return told


def family(process):
    return psutil.Process(process.pid).children(recursive=True)


def interrupted(process):
    """SIGINT to the group, as Ctrl-C is: nobody is left, within the time, and there is nothing to read about it."""
    ranks = family(process)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    seconds = time.monotonic() - began
    print(f"{seconds:.2f} s")
    assert process.returncode == 130, err
    assert b"Traceback" not in err + out and b"rror" not in err + out, err
    until = time.monotonic() + 1
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks):
        assert time.monotonic() < until, ranks
        time.sleep(0.01)
    assert ranks and seconds < SOON + SLACK


VERBS = {
    "generate": ("--prompt", "a" * LONG, "--max-tokens", "3000", "--context", "8000"),
    "bench": ("--prompt-tokens", str(LONG), "--new-tokens", "3000"),
}
MOMENTS = {"joined": b"[comm", "prefill": b"[engine.pass True]", "decode": b"[engine.pass False]"}


@pytest.mark.parametrize("layout", ["--tp", "--pp"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("verb", VERBS)
def test_while_it_works(folder, verb, moment, layout):
    process = started(verb, folder, *VERBS[verb], layout, "2")
    try:
        until_told(process, MOMENTS[moment])
        interrupted(process)
    finally:
        process.kill()


@pytest.mark.parametrize("seconds", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("verb", ["generate", "chat", "serve"])
def test_while_ranks_start(folder, verb, seconds):
    more = {"generate": VERBS["generate"], "chat": (), "serve": ("--port", str(free_port()))}[verb]
    process = started(verb, folder, *more, "--tp", "2")
    try:
        while not family(process):
            time.sleep(0.01)
        time.sleep(seconds)
        interrupted(process)
    finally:
        process.kill()


@pytest.mark.parametrize("layout", [(), ("--tp", "2")], ids=["one", "tp"])
def test_in_a_conversation(folder, layout):
    """It stops an answer, as often as it is asked for more; at the prompt it ends."""
    process = started("chat", folder, *layout, "--max-tokens", "3000", "--context", "8000")
    try:
        for _ in range(2):
            process.stdin.write(b"Hi\n")
            process.stdin.flush()
            told = until_told(process, MOMENTS["prefill"])  # of this answer: the last one's tokens may be told yet
            if MOMENTS["decode"] not in told.rpartition(MOMENTS["prefill"])[2]:
                until_told(process, MOMENTS["decode"])
            os.killpg(process.pid, signal.SIGINT)
            said = b""
            while b"(stopped)" not in said:
                said += (piece := os.read(process.stdout.fileno(), 4096))
                assert piece, process.stderr.read()
        time.sleep(1.5)  # longer than an end may take: it did not begin to
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 130) and b"Traceback" not in err, err
    finally:
        process.kill()


@pytest.mark.parametrize("layout", [("--pp", "1"), ("--tp", "2")], ids=["one", "tp"])
@pytest.mark.parametrize("busy", [True, False])
def test_a_server(folder, busy, layout):
    """Who reads an answer is told that it ends."""
    port = free_port()
    process = started("serve", folder, "--port", str(port), *layout)
    body = {"model": "m", "prompt": "abc", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    try:
        until_told(process, b"100%")
        while True:
            try:
                if http.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except Exception:
                time.sleep(0.05)
        if busy:
            with http.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                interrupted(process)
                *_, error, done = filter(None, lines)
            assert "The server is closing" in error and done == "data: [DONE]"
        else:
            interrupted(process)
    finally:
        process.kill()


def test_a_main_thread_that_does_not_hear():
    """It is in native code that a signal does not end."""
    code = """
import ctypes, os, signal
from undistilled import interrupt
interrupt.bound(0.3)
signal.siginterrupt(signal.SIGINT, False)
print("x", flush=True)
ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
"""
    process = running(code)
    assert process.stdout.read(1) == b"x"
    time.sleep(1)  # until it is there
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_what_cannot_be_done_at_the_end_does_not_keep_the_process():
    code = """
import signal, time
from undistilled import interrupt
interrupt.bound(0.1)
interrupt.LAST.append(lambda: 1 / 0)
signal.signal(signal.SIGINT, lambda *_: print("x", flush=True))
print("x", flush=True)
time.sleep(30)
"""
    process = running(code, stderr=subprocess.DEVNULL)
    assert process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_where_python_would_forget_it():
    """In a finalizer an exception is printed and dropped: the program is told once more, and ends by itself."""
    code = """
import sys, time
from undistilled import interrupt
interrupt.bound(60)
class Slow:
    def __del__(self):
        print("x", flush=True)
        time.sleep(2)
try:
    Slow()
    time.sleep(30)
except KeyboardInterrupt:
    sys.exit(7)
"""
    process = running(code, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 7 and err == b""
