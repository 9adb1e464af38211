"""The engine on a real tokenizer and a tiny model: stops, limits, sampling, streams, preemption, faults."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers

from tiny import LLAMA, load, write_checkpoint
from undistilled.checkpoint.tokenizer import Tokenizer
from undistilled.errors import RequestError
from undistilled.generate.engine import Engine
from undistilled.generate.sampler import Sampler
from undistilled.generate.stops import StopText
from undistilled.schedule.request import Request, Sampling


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Raw(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = write_checkpoint(tmp_path_factory.mktemp("m") / "m", LLAMA | {"vocab_size": 256, "eos_token_id": 255})
    decoder, plan = load(folder, scheme="int8", context=128, batch=4)
    return Engine(decoder, plan, Tokenizer(raw, None, (255,)), "tiny")


def run(engine, *requests):
    outputs = engine.run_all(list(requests))
    assert engine.idle and engine.pool.used == 0 and not engine.running
    return outputs


def tokens(outputs):
    return [t for o in outputs for t in o.tokens]


def greedy(count=20, **options):
    return Sampling(max_tokens=count, temperature=0, ignore_eos=True, **options)


def test_max_tokens_and_usage(engine):
    found = run(engine, Request("a", [1, 2, 3], greedy(7)))["a"]
    assert len(tokens(found)) == 7 and found[-1].finish_reason == "length"
    assert found[-1].prompt_tokens == 3 and found[-1].completion_tokens == 7


def test_the_context_ends_a_request(engine):
    found = run(engine, Request("a", [1] * 120, greedy(1000)))["a"]
    assert found[-1].finish_reason == "length" and len(tokens(found)) == 8


def test_stop_ids_and_eos(engine):
    first = tokens(run(engine, Request("a", [1, 2, 3], greedy()))["a"])
    found = run(engine, Request("a", [1, 2, 3], greedy(stop_ids=(first[5],))))["a"]
    assert tokens(found) == first[: first.index(first[5]) + 1] and found[-1].finish_reason == "stop"
    assert found[-1].stop_reason == first[5]


def test_stop_strings_cut_the_text(engine):
    whole = "".join(o.text for o in run(engine, Request("a", [1, 2, 3], greedy(40)))["a"])
    stop = whole[6:9]
    found = run(engine, Request("a", [1, 2, 3], greedy(40, stop=(stop,))))["a"]
    assert "".join(o.text for o in found) == whole[: whole.index(stop)]
    assert found[-1].finish_reason == "stop" and found[-1].stop_reason == stop


def test_a_completion_keeps_its_first_space(engine):
    raw = Raw(models.BPE({f"▁w{i}": i for i in range(256)}, []))
    raw.decoder = decoders.Metaspace()
    raw.add_special_tokens(["▁w9"])
    pieces = Engine(engine.decoder, engine.plan, Tokenizer(raw), "pieces")
    for prompt, text in (([1, 2], " w7 w7"), ([1, 9], "w7 w7")):
        found = run(pieces, Request("a", prompt, greedy(2, logit_bias=((7, 100.0),))))["a"]
        assert "".join(o.text for o in found) == text


def test_a_seed_fixes_the_tokens_in_any_company(engine):
    def drawn(name, seed):
        return Request(name, [5, 6], Sampling(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True))

    alone = tokens(run(engine, drawn("a", 7))["a"])
    crowd = run(engine, drawn("x", 1), drawn("a", 7), drawn("y", 2), Request("z", [9] * 50, greedy()))
    assert tokens(crowd["a"]) == alone and tokens(crowd["x"]) != alone


def test_mixed_requests_equal_their_solo_runs(engine):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 100, (64,), generator=generator).tolist()
    prompts = [torch.randint(0, 255, (n,), generator=generator).tolist() for n in lengths]
    requests = [Request(str(i), p, greedy(min(24, 127 - len(p)))) for i, p in enumerate(prompts)]
    together = run(engine, *requests)
    for request in requests:
        assert tokens(run(engine, request)[request.id]) == tokens(together[request.id]), request.id


def test_abort_frees_blocks_at_once(engine):
    for name in "abc":
        engine.add(Request(name, [1] * 40, greedy()))
    for _ in range(5):
        engine.step()
    assert engine.pool.used > 0
    for name in "abcz":
        engine.abort(name)
    assert engine.pool.used == 0 and engine.idle and engine.step() == []


@pytest.mark.parametrize(
    "prompt, options, param",
    [
        ([], {}, "prompt"),
        ([256], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1] * 128, {}, "prompt"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"temperature": -0.1}, "temperature"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"max_tokens": -5}, "max_tokens"),
        ([1], {"max_tokens": 10**400}, "max_tokens"),
        ([1], {"top_p": 0}, "top_p"),
        ([1], {"seed": 2**63}, "seed"),
        ([1], {"logprobs": -1}, "logprobs"),
        ([1], {"logprobs": 256}, "logprobs"),
        ([1], {"stop": ("x",) * 10_000}, "stop"),
        ([1], {"stop": ("",)}, "stop"),
        ([1], {"logit_bias": ((999, 1.0),)}, "logit_bias"),
        ([1], {"logit_bias": ((1, float("inf")),)}, "logit_bias"),
        ([1], {"logit_bias": tuple((i, 1.0) for i in range(5000))}, "logit_bias"),
        ([1], {"stop_ids": (999,)}, "stop_token_ids"),
    ],
)
def test_nonsense_is_refused_by_name(engine, prompt, options, param):
    with pytest.raises(RequestError) as caught:
        engine.add(Request("a", prompt, Sampling(**options)))
    assert caught.value.param == param and caught.value.status == 400
    assert engine.idle and engine.pool.used == 0


def choose(logits, **options):
    return Sampler(Sampling(**options), [], len(logits)).choose(torch.tensor(logits))


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000))
def test_filters_keep_what_they_promise(seed):
    logits = [3.0, 2.0, 1.0, 0.0, -1.0]  # probabilities 0.64 0.23 0.09 0.03 0.01
    assert choose(logits, temperature=1.0, top_k=2, seed=seed)[0] in (0, 1)
    assert choose(logits, temperature=1.0, top_p=0.6, seed=seed)[0] == 0
    assert choose(logits, temperature=1.0, min_p=0.3, seed=seed)[0] in (0, 1)
    assert choose(logits, temperature=0.01, seed=seed)[0] == 0


def test_draws_follow_the_distribution():
    sampler = Sampler(Sampling(temperature=1.0, seed=0), [], 3)
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    drawn = [sampler.choose(logits)[0] for _ in range(4000)]
    for token, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(drawn.count(token) / 4000 - share) < 0.03


def test_penalties_and_bias():
    assert choose([1.0, 0.9], temperature=0, logit_bias=((1, 0.2),))[0] == 1
    for options in ({"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 2.0}):
        sampler = Sampler(Sampling(temperature=0, **options), [], 2)
        assert [sampler.choose(torch.tensor([1.0, 0.9]))[0] for _ in range(2)] == [0, 1], options
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0), [0], 2).choose(torch.tensor([1.0, 0.9]))[0] == 1


def test_logprobs_are_of_the_model():
    token, found = choose([1.0, 3.0, 2.0], temperature=0, logprobs=2)
    expected = torch.tensor([1.0, 3.0, 2.0]).log_softmax(-1).tolist()
    assert token == found.token == 1 and found.logprob == pytest.approx(expected[1])
    assert [t for t, _ in found.top] == [1, 2] and found.top[1][1] == pytest.approx(expected[2])


@settings(max_examples=300)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 4), max_size=40),
)
def test_stop_strings_in_any_pieces(text, stops, cuts):
    stream, shown, at, matched = StopText(tuple(stops)), "", 0, None
    for cut in [*cuts, len(text) + 1]:
        piece, at = text[at : at + cut], at + cut
        out, matched = stream.push(piece, last=at >= len(text))
        shown += out
        if matched is not None or at >= len(text):
            break
    first = min((text.find(s) for s in stops if s in text), default=None)
    if first is None:
        assert shown == text and matched is None
    else:
        assert not any(s in shown for s in stops) and text.startswith(shown) and matched in stops


def test_the_coldest_temperatures_are_greedy():
    for temperature in (1e-40, 1e-10, 1e-5, 1e-3):
        assert choose([1.0, 3.0, 2.0], temperature=temperature, seed=1)[0] == 1


def test_top_p_works_on_what_top_k_left():
    for seed in range(50):
        logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
        assert choose(logits, temperature=1.0, top_k=2, top_p=0.5, seed=seed)[0] == 0


def test_a_failure_ends_its_own_request_only(engine, monkeypatch):
    whole = tokens(run(engine, Request("b", [4, 5], greedy()))["b"])
    real = Sampler.choose

    def broken(self, logits):
        if self.sampling.seed == 13:
            raise RuntimeError("boom")
        return real(self, logits)

    monkeypatch.setattr(Sampler, "choose", broken)
    found = run(engine, Request("a", [1], greedy(seed=13)), Request("b", [4, 5], greedy()))
    assert found["a"][-1].finish_reason == "error" and "boom" in found["a"][-1].error
    assert tokens(found["b"]) == whole
