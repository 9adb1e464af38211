"""The real engine behind the API, on a tiny model: the real `openai` client, 64 requests at once."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from live_server import Running

from byte_tokens import write_tokenizer
from tiny import DEEPSEEK, write_checkpoint

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("m") / "tiny-r1", DEEPSEEK | {"vocab_size": 256})
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    options = {"model": str(folder), "scheme": "int8", "context": 256, "batch": 8, "device": "cpu"}
    with Running(options, factory="undistilled.generate.engine:open_engine") as running:
        yield running


def complete(client, prompt, count):
    answer = client.completions.create(
        model="tiny-r1", prompt=prompt, max_tokens=count, temperature=0, logprobs=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].logprobs.tokens


def test_64_at_once_equal_their_solo_runs(real):
    client = real.openai(timeout=120)
    prompts = [[(7 * i + j) % 250 for j in range(1 + (i * 13) % 180)] for i in range(64)]
    counts = [4 + i % 20 for i in range(64)]
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda pair: complete(client, *pair), zip(prompts, counts, strict=True)))
    assert [len(t) for t in together] == counts
    assert real.wait_for(lambda s: s["kv_blocks_used"] == 0) is not None
    for prompt, count, tokens in list(zip(prompts, counts, together, strict=True)):
        assert complete(client, prompt, count) == tokens
    assert real.wait_for(lambda s: s["kv_blocks_used"] == 0 and s["running"] == 0) is not None


def test_chat_streamed_is_chat_whole(real):
    client = real.openai()
    ask = {
        "model": "tiny-r1",
        "messages": [{"role": "user", "content": "hé"}],
        "max_tokens": 24,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in whole.choices[0].logprobs.content)


def test_n_seeds_and_stop(real):
    client = real.openai()
    ask = {"model": "tiny-r1", "prompt": "abc", "max_tokens": 12, "temperature": 1.0, "seed": 5}
    first = [c.text for c in client.completions.create(**ask, n=3).choices]
    assert [c.text for c in client.completions.create(**ask, n=3).choices] == first and len(set(first)) > 1
    greedy = client.completions.create(model="tiny-r1", prompt="abc", max_tokens=20, temperature=0).choices[0].text
    stop = greedy[4:6]
    cut = client.completions.create(model="tiny-r1", prompt="abc", max_tokens=20, temperature=0, stop=[stop]).choices[0]
    assert cut.text == greedy[: greedy.index(stop)] and cut.finish_reason == "stop"


def test_errors_leave_the_engine_as_it_was(real):
    client = real.openai()
    before = complete(client, [1, 2, 3], 8)
    for body, error in (
        ({"prompt": [1] * 300}, openai.BadRequestError),
        ({"prompt": [999]}, openai.BadRequestError),
        ({"prompt": ""}, openai.BadRequestError),
        ({"prompt": "x", "temperature": -1}, openai.BadRequestError),
        ({"prompt": "x", "model": "gpt-4"}, openai.NotFoundError),
    ):
        with pytest.raises(error):
            client.completions.create(**{"model": "tiny-r1", "max_tokens": 4} | body)
    assert complete(client, [1, 2, 3], 8) == before
    assert real.stats()["kv_blocks_used"] == 0
