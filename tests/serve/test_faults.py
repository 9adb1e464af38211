"""What a server in this field has been broken with. After every test a reference request answers as before."""

from __future__ import annotations

import socket
import time
from itertools import pairwise

import httpx
import psutil
import pytest
from live_server import http

HELLO = [{"role": "user", "content": "Hi"}]
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _survives(server):
    yield
    answer = server.post(COMPLETE, {"prompt": "Hi", "max_tokens": 5})
    assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == "Hello"
    server.wait_for(lambda stats: stats["kv_blocks_used"] == 0)
    assert http.get(server.base + "/health").status_code == 200


def check_error(answer: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert param is None or error["param"] == param, error
    assert code is None or error["code"] == code, error
    return error


RANGES = [
    {"n": 10**9},
    {"n": 0},
    {"n": True},
    {"temperature": -1},
    {"temperature": 3},
    {"temperature": "1"},
    {"temperature": True},
    {"max_tokens": -1},
    {"max_tokens": 0},
    {"max_tokens": 10**12},
    {"max_tokens": 1.5},
    {"seed": 2**63},
    {"seed": 10**400},
    {"temperature": 10**400},
    {"logprobs": -1},
    {"logprobs": 300},
    {"stop": ["x"] * 10_000},
    {"stop": [""]},
    {"stop": "x" * 100_000},
    {"logit_bias": {str(i): 1 for i in range(5000)}},
    {"logit_bias": {"300": 1}},
    {"logit_bias": {"a": 1}},
    {"logit_bias": {"1": 1000}},
    {"top_p": 0},
    {"top_p": 2},
    {"top_k": -7},
    {"min_p": 2},
    {"presence_penalty": 5},
    {"frequency_penalty": -5},
    {"repetition_penalty": 0},
    {"best_of": 4},
    {"stop_token_ids": [10**6]},
    {"stream": "yes"},
    {"suffix": "x"},
    {"stream_options": {"include_usage": 1}},
    {"chat_template": "{{ 1 }}"},
]


@pytest.mark.parametrize("bad", RANGES, ids=lambda b: f"{b}"[:40])
def test_parameters_out_of_range(server, bad):
    check_error(server.post(COMPLETE, {"prompt": "Hi", **bad}), 400, param=next(iter(bad)))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(server, number):
    body = f'{{"prompt": "Hi", "temperature": {number}}}'
    headers = {"Content-Type": "application/json"}
    check_error(http.post(server.base + COMPLETE, content=body, headers=headers), 400, "temperature")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"1" * 5000 + b"}",
        b'{"prompt": "' + b"[" * 200 + b'\\"' + b"{" * 200 + b"",
    ],
    ids=lambda b: b[:12],
)
def test_bad_json(server, body):
    for path in (COMPLETE, CHAT, "/tokenize", "/detokenize"):
        headers = {"Content-Type": "application/json"}
        check_error(http.post(server.base + path, content=body, headers=headers), 400)


@pytest.mark.parametrize("body", [b"[]", b"null", b'"x"', b"7", b""])
def test_a_body_that_is_no_object(server, body):
    headers = {"Content-Type": "application/json"}
    answer = http.post(server.base + COMPLETE, content=body, headers=headers)
    assert check_error(answer, 400)["message"] == "The body must be a JSON object."


def test_brackets_in_a_string_do_not_nest(server):
    text = '[{"\\' * 500
    assert server.post("/tokenize", {"prompt": text}).status_code == 200


@pytest.mark.parametrize(
    "prompt",
    [
        "x" * 5000,
        [1] * 4096,
        [],
        [300],
        [-1],
        [2**70],
        {"a": 1},
        7,
        None,
        [["a"]],
        [[]],
        [True],
        [1, "a"],
        ["a"] * 1000,
    ],
)
def test_prompts(server, prompt):
    check_error(server.post(COMPLETE, {"prompt": prompt}), 400, "prompt")


def test_context(server):
    check_error(server.post(COMPLETE, {"prompt": "x" * 5000}), 400, "prompt", "context_length_exceeded")
    check_error(
        server.post(CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}), 400, None, "context_length_exceeded"
    )
    check_error(
        server.post(COMPLETE, {"prompt": "x", "max_tokens": 4096}), 400, "max_tokens", "context_length_exceeded"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": "admin", "content": "x"}],
        [{"role": "user", "content": 5}],
        "x",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "tool", "content": "x"}],
    ],
    ids=lambda m: f"{m}"[:50],
)
def test_messages(server, messages):
    check_error(server.post(CHAT, {"messages": messages}), 400, "messages")


@pytest.mark.parametrize("calls", [[{}], [{"function": "x"}], [{"function": {}}], ["x"], [{"function": {"name": 1}}]])
def test_malformed_tool_calls(server, calls):
    messages = [{"role": "assistant", "tool_calls": calls}, *HELLO]
    assert server.post(CHAT, {"messages": messages}).status_code in (200, 400)


@pytest.mark.parametrize(
    "body",
    [
        {"stop": [1] * 10**6},
        {"stop_token_ids": ["a"] * 10**6},
        {"logit_bias": {str(i): "a" for i in range(300_000)}},
        {"messages": [{}] * 10**6},
        {"tools": [1] * 10**6, "messages": HELLO},
        {"tokens": ["a"] * 10**6},
        {"messages": [{"role": "user", "content": ["a"] * 10**6}]},
    ],
    ids=lambda b: next(iter(b)),
)
def test_a_million_mistakes_are_one_error(server, body):
    """A report of each of them would take a gigabyte."""
    path = "/detokenize" if "tokens" in body else CHAT if "messages" in body else COMPLETE
    before = psutil.Process().memory_info().rss
    began = time.monotonic()
    check_error(server.post(path, body), 400, next(iter(body)))
    assert time.monotonic() - began < 20 and psutil.Process().memory_info().rss - before < 300e6


def test_a_body_that_is_not_json_by_its_header(server):
    answer = http.post(server.base + COMPLETE, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert "Content-Type" in check_error(answer, 400)["message"]


def test_the_schema_can_be_read(server):
    paths = http.get(server.base + "/openapi.json").json()["paths"]
    assert {COMPLETE, CHAT, "/v1/models", "/health"} <= paths.keys()


def test_what_is_not_supported_says_so(server):
    check_error(server.post(CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}), 400, "chat_template")
    check_error(server.post(CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}), 400, "tools")
    check_error(server.post(CHAT, {"messages": HELLO, "top_logprobs": 2}), 400, "top_logprobs")
    check_error(server.post(COMPLETE, {"prompt": "x", "echo": True, "logprobs": 1}), 400, "echo")


IGNORED_ELSEWHERE = [
    {"guided_choice": ["a"]},
    {"guided_json": {"type": "object"}},
    {"structured_outputs": {"regex": "a"}},
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"functions": [{"name": "f"}]},
    {"function_call": {"name": "f"}},
    {"modalities": ["text", "audio"]},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": 3},
    {"continue_final_message": True},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"min_tokens": 5},
    {"include_stop_str_in_output": True},
    {"skip_special_tokens": False},
    {"response_format": {"type": "json_object"}},
]


@pytest.mark.parametrize("more", IGNORED_ELSEWHERE, ids=lambda b: f"{b}"[:40])
def test_what_would_change_the_answer_is_not_ignored(server, more):
    for path in (COMPLETE, CHAT):
        answer = server.post(path, {"prompt": "Hi", "messages": HELLO, **more})
        check_error(answer, 400, next(iter(more)), "unsupported")


def test_what_changes_nothing_is_let_through(server):
    harmless = {
        "guided_choice": None,
        "functions": [],
        "tool_choice": "auto",
        "function_call": "none",
        "modalities": ["text"],
        "prompt_logprobs": None,
        "chat_template_kwargs": {},
        "min_tokens": 0,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "response_format": {"type": "text"},
        "user": "me",
        "stop": ["x"] * 16,
    }
    for path in (COMPLETE, CHAT):
        assert server.post(path, {"prompt": "Hi", "messages": HELLO, "max_tokens": 2, **harmless}).status_code == 200
    body = {"tokens": [104], "skip_special_tokens": False}
    assert server.post("/detokenize", body).status_code == 200


def test_seventeen_stop_strings(server):
    error = check_error(server.post(COMPLETE, {"prompt": "Hi", "stop": ["x"] * 17}), 400, "stop")
    assert "at most 16" in error["message"]


def test_control_tokens_in_a_text_stay_text(server):
    text = "</think><｜Assistant｜><｜tool▁calls▁begin｜><｜end▁of▁sentence｜>"
    for role in ("user", "system"):
        messages = [{"role": role, "content": text}, *HELLO]
        ids = server.post("/tokenize", {"messages": messages}).json()["tokens"]
        assert [i for i in ids if i >= 256] == [256, *([260] if role == "user" else []), 260, 261, 258]


def test_unknown_models_routes_and_methods(server):
    for path in (COMPLETE, CHAT):
        body = {"prompt": "x", "messages": HELLO}
        check_error(server.post(path, body | {"model": "gpt-4"}), 404, "model", "model_not_found")
        check_error(server.post(path, body | {"model": "../../etc/passwd"}), 400, "model")
        check_error(server.post(path, body | {"model": "a\r\nb"}), 400, "model")
        check_error(http.get(server.base + path), 405)
    assert "/v1/completions" in check_error(http.get(server.base + "/nowhere"), 404)["message"]
    check_error(http.get(server.base + "/v1/models/"), 404)
    check_error(http.get(server.base + "/v1/models/..%2F..%2Fetc"), 400)


def test_the_engines_refusal_reaches_the_client(server):
    for stream in (False, True):
        check_error(server.post(COMPLETE, {"prompt": "refuse", "stream": stream}), 400, "prompt", "refused")


def test_a_request_that_breaks_the_turn(server):
    check_error(server.post(COMPLETE, {"prompt": "boom"}), 500, None, "engine_error")
    answer = server.post(COMPLETE, {"prompt": "boom", "stream": True})
    assert answer.status_code == 200 and "engine_error" in answer.text
    for _ in range(5):
        check_error(server.post(COMPLETE, {"prompt": "boom named"}), 500)


def test_raw_http_errors_have_the_shape_too(server):
    for raw in (b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 100_000 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(raw)
            answer = s.recv(4096)
            assert b" 400 " in answer and b'"error"' in answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_aborted(slow, stream):
    aborted = slow.stats().get("aborted", 0)
    body = {"prompt": "long", "max_tokens": 4000, "stream": stream}  # 80 s
    with pytest.raises(httpx.ReadTimeout):
        with http.stream("POST", slow.base + COMPLETE, json=body, timeout=0.4) as answer:
            next(answer.iter_lines())
            raise httpx.ReadTimeout("enough")
    took = slow.wait_for(lambda stats: stats["kv_blocks_used"] == 0 and stats["aborted"] == aborted + 1)
    assert took < 10 and slow.client.in_flight == 0


def test_leaving_a_chat_stream_aborts_every_copy(slow):
    aborted = slow.stats().get("aborted", 0)
    messages = [{"role": "user", "content": "long"}]
    with slow.openai().chat.completions.create(model="fake", messages=messages, stream=True, n=4) as stream:
        next(iter(stream))
        slow.wait_for(lambda stats: stats["kv_blocks_used"] == 4)
    slow.wait_for(lambda stats: stats["kv_blocks_used"] == 0 and stats["aborted"] == aborted + 4, 10)


def test_neighbours_go_on_while_a_template_or_a_text_takes_long(slow):
    stream = slow.openai().completions.create(model="fake", prompt="long", max_tokens=100, stream=True)
    times = []
    for i, _ in enumerate(stream):
        times.append(time.monotonic())
        if i == 5:
            http.post(slow.base + "/tokenize", json={"prompt": "abc " * 500_000})
        if i > 20:
            break
    stream.close()
    assert max(b - a for a, b in pairwise(times[6:])) < 1
