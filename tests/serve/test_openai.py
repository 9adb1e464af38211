"""The routes as the real `openai` client sees them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from live_server import http

REPLY = "Hello, wörld 🤖!"
HELLO = [{"role": "user", "content": "Hi"}]


def test_models(server):
    client = server.openai()
    assert [m.id for m in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_completion(server):
    answer = server.openai().completions.create(model="fake", prompt="Hi", max_tokens=100)
    assert answer.choices[0].text == REPLY and answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 3  # BOS and two bytes
    assert answer.usage.completion_tokens == len(REPLY.encode()) and answer.object == "text_completion"


def test_completion_defaults_to_16_tokens(server):
    answer = server.openai().completions.create(model="fake", prompt="Hi")
    assert answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == "Hello, wörld \ufffd"  # 16 bytes end within the robot


@pytest.mark.parametrize("prompt", ["Hi", [72, 105], ["Hi", "Ho"], [[72, 105], [72]]])
def test_prompt_forms(server, prompt):
    answer = server.openai().completions.create(model="fake", prompt=prompt, max_tokens=5, n=2)
    count = 1 if prompt in ("Hi", [72, 105]) else 2
    assert [c.index for c in answer.choices] == list(range(2 * count))
    assert all(c.text == "Hello" for c in answer.choices)
    assert answer.usage.completion_tokens == 10 * count


def test_echo_stop_and_logprobs(server):
    client = server.openai()
    answer = client.completions.create(model="fake", prompt="Say: ", echo=True, stop=[","], max_tokens=50)
    assert answer.choices[0].text == "Say: Hello" and answer.choices[0].finish_reason == "stop"
    answer = client.completions.create(model="fake", prompt="a", logprobs=2, max_tokens=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["H", "e", "l"] and logprobs.text_offset == [0, 1, 2]
    assert logprobs.token_logprobs == [-0.5] * 3 and len(logprobs.top_logprobs[0]) == 2
    assert min(logprobs.top_logprobs[0].values()) == -9999.0


def test_text_offsets_count_characters_not_bytes(server):
    """Each byte is a token; those of one character all begin where it does."""
    ask = {"model": "fake", "prompt": "😀😀😀😀", "logprobs": 1, "max_tokens": 100}
    client = server.openai()
    expected = [at for at, character in enumerate(REPLY) for _ in character.encode()]
    assert client.completions.create(**ask).choices[0].logprobs.text_offset == expected
    chunks = client.completions.create(**ask, stream=True)
    assert [at for c in chunks if c.choices[0].logprobs for at in c.choices[0].logprobs.text_offset] == expected


def test_completion_stream(server):
    stream = server.openai().completions.create(
        model="fake", prompt="Hi", max_tokens=100, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == REPLY
    assert all("\ufffd" not in c.choices[0].text for c in chunks if c.choices)
    assert chunks[-1].usage.completion_tokens == len(REPLY.encode()) and not chunks[-1].choices
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_chat(server):
    answer = server.openai().chat.completions.create(
        model="fake", messages=[{"role": "system", "content": "Be."}, *HELLO], logprobs=True, top_logprobs=2
    )
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content == "" and message.reasoning_content == REPLY  # R1's prompt opens <think>
    entry = answer.choices[0].logprobs.content[0]
    assert entry.token == "H" and entry.bytes == [72] and len(entry.top_logprobs) == 2
    assert answer.choices[0].logprobs.content[-3].token.startswith("bytes:\\x")


def test_chat_text_parts_n_and_seeds(server):
    parts = [{"type": "text", "text": "seed?"}]
    client = server.openai()
    ask = {"model": "fake", "messages": [{"role": "user", "content": parts}], "n": 3, "seed": 7}
    first, again = (client.chat.completions.create(**ask) for _ in range(2))
    seeds = [c.message.reasoning_content for c in first.choices]
    assert seeds[0] == "7" and len(set(seeds)) == 3
    assert seeds == [c.message.reasoning_content for c in again.choices]


def test_chat_stream_with_usage(server):
    stream = server.openai().chat.completions.create(
        model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}, n=2
    )
    chunks = list(stream)
    for index in range(2):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == "stop"
        text = "".join(getattr(c.delta, "reasoning_content", None) or "" for c in mine)
        assert text == REPLY == "".join(getattr(c.delta, "reasoning", None) or "" for c in mine)
    assert chunks[-1].usage.completion_tokens == 2 * len(REPLY.encode())


def test_stream_is_server_sent_events(server):
    body = {"messages": HELLO, "stream": True, "max_tokens": 2}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(json.loads(line[6:])["id"] for line in lines[:-1])


def test_tokenize_and_detokenize(server):
    found = server.post("/tokenize", {"prompt": "né</think>", "parse_special": True}).json()
    assert found["count"] == 5 and found["tokens"][0] == 256 and found["tokens"][-1] == 259
    assert server.post("/detokenize", {"tokens": found["tokens"][1:]}).json() == {"prompt": "né</think>"}
    plain = server.post("/tokenize", {"prompt": "</think>"}).json()["tokens"]
    assert plain[0] == 256 and len(plain) == 9 and max(plain[1:]) < 256
    chat = server.post("/tokenize", {"messages": HELLO}).json()["tokens"]
    assert chat[:2] == [256, 260] and chat.count(256) == 1 and chat[-2] == 258


def test_control_tokens_in_a_prompt_are_asked_for(server):
    for settings, count in (({}, 9), ({"parse_special": False}, 9), ({"parse_special": True}, 2)):
        answer = server.post("/v1/completions", {"prompt": "</think>", "max_tokens": 1, **settings}).json()
        assert answer["usage"]["prompt_tokens"] == count, settings


def test_version_health_metrics(server):
    server.openai().completions.create(model="fake", prompt="Hi")
    assert http.get(server.base + "/health").json() == {"status": "ok"}
    assert http.get(server.base + "/version").json()["version"]
    text = http.get(server.base + "/metrics").text
    for name in (
        'undistilled_requests_total{route="/v1/completions",status="200"}',
        "undistilled_time_to_first_token_seconds_sum",
        "undistilled_inter_token_latency_seconds_count",
        "undistilled_e2e_request_latency_seconds_count",
        "undistilled_prompt_tokens_total",
        "undistilled_generation_tokens_total",
        "undistilled_requests_running",
        "undistilled_requests_waiting",
        "undistilled_kv_blocks_used 0.0",
        "undistilled_kv_blocks_total 100.0",
    ):
        assert name in text, name


def test_64_at_once(server):
    client = server.openai()

    def ask(i: int) -> str:
        if i % 2:
            return client.completions.create(model="fake", prompt=f"{i}", max_tokens=100).choices[0].text
        chunks = client.completions.create(model="fake", prompt=f"{i}", max_tokens=100, stream=True)
        return "".join(c.choices[0].text for c in chunks)

    with ThreadPoolExecutor(64) as pool:
        assert set(pool.map(ask, range(64))) == {REPLY}
    server.wait_for(lambda stats: stats["kv_blocks_used"] == 0)
    assert server.client.in_flight == 0
