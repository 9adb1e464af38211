"""Refitting: a form comes nearer to its original without a byte more, and a kill costs a pass at most."""

import pytest
import torch

from byte_tokens import byte_tokenizer
from tiny import CONFIGS, write_checkpoint
from undistilled.checkpoint.resolve import find
from undistilled.compress import refit, run
from undistilled.compress.run import Request, quantize
from undistilled.errors import UsageError
from undistilled.ops.registry import force_reference

WINDOWS = torch.randint(2, 250, (4, 48), generator=torch.Generator().manual_seed(5)).tolist()
PASSES = 4


def made(path, name="llama"):
    source = write_checkpoint(path / "m", CONFIGS[name])
    byte_tokenizer().save(source)
    return find(str(source))


def form(model, out):
    quantize(model, out, Request(scheme="nl3-g32", solver="rtn"))
    return out


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def lost(model, folder):
    truth, windows = refit.Truth(model, WINDOWS, "cpu"), enumerate(WINDOWS)
    with torch.no_grad(), force_reference():
        decoder = refit.decoder_of(model.spec, find(str(folder)).source(), "cpu")
        found = [refit.divergence(truth.logits(i), decoder.lm_head(refit.last_states(decoder, w))) for i, w in windows]
    return float(sum(found)) / len(found)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_refit_lowers_the_divergence_and_adds_no_byte(name, tmp_path):
    model = made(tmp_path, name)
    out = form(model, tmp_path / "out")
    before, size = lost(model, out), {name: len(data) for name, data in contents(out).items()}
    refit.refit(model, out, WINDOWS, PASSES, "cpu", lambda _: None)
    assert lost(model, out) < 0.95 * before
    assert {name: len(data) for name, data in contents(out).items()} == size


def test_a_refit_that_was_ended_goes_on_to_the_same_bytes(tmp_path):
    model = made(tmp_path)
    whole, ended = (form(model, tmp_path / name) for name in ("whole", "ended"))
    refit.refit(model, whole, WINDOWS, PASSES, "cpu", lambda _: None)

    def end(said):
        if "pass 2" in said:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refit.refit(model, ended, WINDOWS, PASSES, "cpu", end)
    said = []
    for _ in range(2):  # the second finds everything done
        refit.refit(model, ended, WINDOWS, PASSES, "cpu", said.append)
    assert [line.split(",")[0] for line in said] == ["refit: pass 3 of 4", "refit: pass 4 of 4"]
    assert contents(ended) == contents(whole) != contents(form(model, tmp_path / "plain"))


def test_a_model_that_does_not_fit_is_said_and_left_as_it_is(tmp_path, monkeypatch):
    model, said = made(tmp_path), []
    asked = {"scheme": "nl3-g32", "tokens": 256}
    quantize(model, tmp_path / "plain", Request(**asked))
    monkeypatch.setattr(run.refit, "lacking", lambda *_: 7_000_000_000)
    quantize(model, tmp_path / "out", Request(refit=2, **asked), said.append)
    assert any("7.0 GB" in line for line in said)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_quantize_refits_on_what_it_calibrates_on(tmp_path):
    model, said = made(tmp_path), []
    quantize(model, tmp_path / "out", Request(scheme="nl3-g32", tokens=256, refit=2), said.append)
    first, second = (float(line.split()[5]) for line in said if line.startswith("refit"))
    assert second < first
    assert not (tmp_path / "out" / refit.WORK).exists()
    with pytest.raises(UsageError, match="nothing to refit on"):
        quantize(model, tmp_path / "rtn", Request(scheme="int8", solver="rtn", refit=1))
