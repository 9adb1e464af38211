import math

import numpy as np
import pytest
import torch

import tiny
from undistilled.errors import BadArtefact
from undistilled.prove.divergence import EDGES, compare, record, windows
from undistilled.prove.score import Scorer


@pytest.fixture(scope="module")
def cut():
    ids = torch.randint(0, 300, (432,), generator=torch.Generator().manual_seed(1)).tolist()
    return windows(ids, 48, 432)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("m"), tiny.CONFIGS["deepseek_v3"])


@pytest.fixture(scope="module")
def original(folder):
    return Scorer(*tiny.load(folder, context=128, batch=1))


def test_windows():
    assert windows(list(range(10)), 4, 9) == [[0, 1, 2, 3], [4, 5, 6, 7]]  # a window of one predicts nothing
    assert windows(list(range(10)), 4, 10) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert windows(list(range(5)), 4, 99, bos=7) == [[7, 0, 1, 2], [7, 3, 4]]
    for ids, size in (([1], 4), ([], 4), ([1, 2], 1)):
        with pytest.raises(BadArtefact):
            windows(ids, size, 10)


def test_the_same_weights_diverge_by_exactly_nothing(original, folder, cut, tmp_path):
    again = Scorer(*tiny.load(folder, context=128, batch=1))
    found = compare(again, cut, record(original, cut, tmp_path / "lp"))
    assert found["kl_nats"]["mean"] == found["kl_nats"]["max"] == found["kl_nats"]["se"] == 0.0
    assert found["top1_agreement"] == 1.0
    assert found["perplexity"]["original"] == found["perplexity"]["plan"]
    assert found["kl_nats"]["histogram"]["counts"][0] == found["kl_nats"]["n"]


def test_int4_diverges_by_what_a_direct_computation_gives(original, folder, cut, tmp_path):
    plan = Scorer(*tiny.load(folder, scheme="int4", context=128, batch=1))
    found = compare(plan, cut, record(original, cut, tmp_path / "lp"))
    kl, same, nll, means = [], 0, [0.0, 0.0], []
    for w in cut:
        p, q = (s.logits(w)[:-1].double().log_softmax(-1) for s in (original, plan))
        rows = (p.exp() * (p - q)).sum(-1)
        kl += rows.tolist()
        means.append(rows.mean().item())
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        for i, x in enumerate((p, q)):
            nll[i] -= x[range(len(w) - 1), w[1:]].sum().item()
    figures = found["kl_nats"]
    assert figures["mean"] == pytest.approx(np.mean(kl), rel=1e-5) and figures["mean"] > 0
    assert figures["max"] == pytest.approx(max(kl), rel=1e-4)
    assert figures["p99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found["top1_agreement"] == same / len(kl)
    assert found["perplexity"]["original"] == pytest.approx(math.exp(nll[0] / len(kl)), rel=1e-6)
    assert found["perplexity"]["plan"] == pytest.approx(math.exp(nll[1] / len(kl)), rel=1e-6)
    assert figures["se_by"] == "windows" and figures["windows"] == len(cut) == 9
    assert figures["se"] == pytest.approx(np.std(means, ddof=1) / 3, rel=1e-4)
    assert sum(figures["histogram"]["counts"]) == figures["n"] == len(kl)
    assert figures["histogram"]["counts"][0] == sum(x < EDGES[0] for x in kl)
    assert figures["interval"][0] < figures["mean"] < figures["interval"][1]


def test_few_windows_take_the_error_by_tokens(original, cut, tmp_path):
    found = compare(original, cut[:2], record(original, cut[:2], tmp_path / "lp"))
    assert found["kl_nats"]["se_by"] == "tokens"
