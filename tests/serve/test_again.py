"""An engine of a cluster that ends is started again, a few times; meanwhile the server says so."""

import time

import pytest
from live_server import PATIENCE, Running

from undistilled.events import subscribed
from undistilled.serve import again


@pytest.fixture
def running():
    with Running({"cluster": "any", "reply": "Hello!"}) as running:
        yield running


def ask(running, prompt="Hi"):
    return running.post("/v1/completions", {"model": "fake", "prompt": prompt, "max_tokens": 8})


def until(running, status, seconds=PATIENCE):
    """The first answer of /health with this status."""
    limit = time.monotonic() + seconds
    while (found := running.get("/health")).status_code != status:
        assert time.monotonic() < limit, found.text
        time.sleep(0.02)
    return found


def test_an_engine_comes_back(running):
    events = []
    with subscribed(events.append):
        assert ask(running, "die").status_code == 500
        assert "started again" in until(running, 503).json()["error"]["message"]
        waiting = ask(running)
        assert waiting.status_code == 200 or "started again" in waiting.json()["error"]["message"]
        until(running, 200)
    assert ask(running).json()["choices"][0]["text"] == "Hello!"
    assert [(e.name, e.fields["times"]) for e in events if e.name == "engine.restart"] == [("engine.restart", 1)]


def test_only_so_many_times(running):
    """After the last one the server is as one without a cluster: it says that the engine has ended, and ends."""
    for _ in range(again.MOST):
        ask(running, "die")
        until(running, 503)
        until(running, 200)
    ask(running, "die")
    while not running.client.over:
        time.sleep(0.05)
    assert until(running, 503).json()["error"]["message"].startswith("The engine has ended: ")
    answer = ask(running)
    assert answer.status_code == 500 and "ended" in answer.json()["error"]["message"]


def test_times_are_forgotten(running, monkeypatch):
    monkeypatch.setattr(again, "MOST", 1)
    monkeypatch.setattr(again, "WITHIN", 0.0)
    for _ in range(2):
        ask(running, "die")
        until(running, 503)
        until(running, 200)
