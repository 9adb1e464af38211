"""Rows that are measured stand for all rows, whatever kinds of rows there are."""

import pytest
import torch

from tiny import CONFIGS, write_checkpoint
from undistilled import scheme as schemes
from undistilled.checkpoint.resolve import find
from undistilled.compress import options, pace
from undistilled.compress.calibrate import Moments
from undistilled.compress.choose import Choice
from undistilled.compress.options import FEWEST, RANGE, _stand_for, sample
from undistilled.model.weights import weights


def test_every_stretch_of_r1s_matrices_is_met_and_every_kind_of_row():
    known = {w.name.split("layers.30.")[-1]: w for w in weights(find("deepseek-r1").spec)}
    for name, period, from_ in (("self_attn.kv_b_proj.weight", 256, 128), ("self_attn.q_b_proj.weight", 192, 128)):
        ranges = sample(known[name])
        assert len(ranges) >= FEWEST and ranges == sample(known[name])
        kinds = [{row % period >= from_ for row in range(start, stop)} for _, start, stop in ranges]
        assert set().union(*kinds) == {False, True}, name
    experts = sample(known["mlp.experts.*.down_proj.weight"])
    assert len({e for e, _, _ in experts}) > FEWEST and len({start for _, start, _ in experts}) > 4


def test_losses_are_scaled_by_what_the_rows_are_worth():
    weight = next(w for w in weights(find("deepseek-r1").spec) if "layers.30.self_attn.kv_b" in w.name)
    rows, into = weight.shape
    worth = torch.arange(rows).float()
    choice = Choice("int8", "gptq", {weight.name: Moments(torch.eye(into), worth, tokens=1)})
    ranges = sample(weight)
    measured = sum(float(worth[start:stop].sum()) for _, start, stop in ranges)
    stands_for = _stand_for(weight, ranges, choice, weight.name)
    assert len(ranges) * RANGE < rows and stands_for * measured == float(worth.double().sum())


@pytest.mark.parametrize("free, experts", [(130 << 30, 18), (24 << 30, 10), (6 << 30, 2), (1 << 20, 0)])
def test_experts_together_take_half_of_what_is_free(monkeypatch, free, experts):
    """Of R1's width and hidden size."""
    monkeypatch.setattr(options, "_free", lambda device: free)
    values = options.at_once("cuda:1")
    assert values // (2048 * 7168) == experts and values > 0 and 2 * options.WORKED * values <= max(free, 160)
    assert options.at_once("cpu") == options.AT_ONCE["cpu"]


def test_where_values_are_rounded_to_nearest_that_is_what_is_measured(tmp_path):
    model = find(str(write_checkpoint(tmp_path / "m", CONFIGS["llama"])))
    weight, source = next(w for w in weights(model.spec) if w.is_linear), model.source()
    w, scheme = source.dense(weight.name, 0, weight.shape[0]), schemes.get("int6-g64")
    lost = 0.5 * float((scheme.decompress(scheme.compress(w), weight.shape, torch.float32) - w).square().sum())
    of = {s: {o.scheme: o.loss for o in options.options(weight, source, Choice("int8", s))} for s in ("rtn", "hqq")}
    assert of["rtn"]["int6-g64"] == pytest.approx(lost) and of["hqq"]["int6-g64"] != pytest.approx(lost)


def test_time_left_is_by_what_was_worked_not_by_what_was_there(monkeypatch):
    seconds = iter((10.0, 14.0))
    monkeypatch.setattr(pace, "perf_counter", lambda: next(seconds))
    work = pace.Pace(100)
    work.found(40)
    work.did(20)
    assert str(work) == "8 s left"
