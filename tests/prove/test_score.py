import pytest
import torch

import tiny
from undistilled.errors import UsageError
from undistilled.prove.score import Scorer


@pytest.fixture(scope="module", params=["llama", "deepseek_v3"])
def scorer(request, tmp_path_factory):
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp(request.param), tiny.CONFIGS[request.param])
    return Scorer(*tiny.load(folder, scheme="fp32", context=128, batch=1))


def ids(count, seed=0):
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_logits_in_chunks_equal_those_of_one_pass(scorer):
    whole = scorer.logits(ids(100))
    assert whole.shape == (100, 320)
    chunked = scorer.plan.model_copy(update={"limits": scorer.plan.limits.model_copy(update={"chunk": 48})})
    torch.testing.assert_close(Scorer(scorer.decoder, chunked).logits(ids(100)), whole, atol=2e-5, rtol=2e-5)


def test_a_prefix_does_not_see_what_follows(scorer):
    torch.testing.assert_close(scorer.logits(ids(100))[:40], scorer.logits(ids(100)[:40]), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("lengths", [(1, 3), (2, 40), (20, 1, 5)])
def test_a_choice_scores_as_in_the_whole_sequence(scorer, lengths):
    context, choices = ids(30), [ids(n, seed=n) for n in lengths]
    for choice, found in zip(choices, scorer.choice_loglikelihoods(context, choices), strict=True):
        logprobs = scorer.logits(context + choice).double().log_softmax(-1)
        direct = sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(choice))
        assert found == pytest.approx(direct, abs=1e-4)


def test_a_choice_longer_than_a_chunk(scorer):
    limits = scorer.plan.limits.model_copy(update={"chunk": 16})
    chunked = Scorer(scorer.decoder, scorer.plan.model_copy(update={"limits": limits}))
    context, choices = ids(21), [ids(45, seed=1), ids(17, seed=2)]
    whole = scorer.choice_loglikelihoods(context, choices)
    assert chunked.choice_loglikelihoods(context, choices) == pytest.approx(whole, abs=1e-3)


def test_what_does_not_fit_is_refused(scorer):
    with pytest.raises(UsageError, match="129 tokens"):
        scorer.logits(ids(129))
    with pytest.raises(UsageError):
        scorer.choice_loglikelihoods([], [[1]])
    with pytest.raises(UsageError):
        scorer.choice_loglikelihoods([1], [[]])
