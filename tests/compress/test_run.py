"""`quantize` from a folder to a folder: what it writes loads and answers, and a kill or a full disk loses no work."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from byte_tokens import byte_tokenizer
from logits import our_logits
from tiny import CONFIGS, load, write_checkpoint
from undistilled import scheme as schemes
from undistilled.checkpoint import writer
from undistilled.checkpoint.resolve import find
from undistilled.compress import choose, files, material, rescale, run, store
from undistilled.compress.choose import Choice
from undistilled.compress.rescaled import Factors
from undistilled.compress.room import held, reckoned
from undistilled.compress.run import Request, quantize
from undistilled.compress.solvers import gptq
from undistilled.errors import BadArtefact, DoesNotFit, UsageError
from undistilled.model.weights import weights

TOKENS = torch.randint(2, 250, (60,), generator=torch.Generator().manual_seed(3)).tolist()
SMALL = {"tokens": 1024, "shard": 200_000}
KILLS = int(os.environ.get("KILLS", "3"))  # of one run of quantize


def folder(path, name="deepseek_v3", **changes):
    made = write_checkpoint(path, CONFIGS[name] | changes)
    byte_tokenizer().save(made)
    return made


def far(a, b):
    return float((a - b).norm() / b.norm())


def matrices(decoder):
    held = (module.stored for module in decoder.modules() if hasattr(module, "stored"))
    return [stored.dense(torch.float32) for stored in held if len(stored.shape) > 1]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A dense layer and one of experts."""
    return folder(tmp_path_factory.mktemp("original") / "m", num_hidden_layers=2, n_routed_experts=8)


@pytest.fixture(scope="module")
def budgeted(original):
    """The original at 5 bits, made in one go, and what was said of it."""
    out = original.parent / "out"
    return out, quantize(find(str(original)), out, Request(bits=5.0, **SMALL))


def loaded_bytes(made, source, most):
    """What a model's weights take, once it was seen that each is as near to the source's as this."""
    decoder, plan = load(made, scheme=None)
    assert {row.name: row.scheme for row in plan.rows} == find(str(made)).spec.stored
    truth, _ = load(source, scheme="fp32")
    for one, other in zip(matrices(decoder), matrices(truth), strict=True):
        assert far(one, other) < most  # what matters little may get 2 bits
    assert our_logits(decoder, plan, TOKENS).isfinite().all()
    return sum(row.nbytes for row in plan.rows)


def test_rounding_to_nearest_is_what_loading_does(tmp_path):
    source = folder(tmp_path / "m")
    quantize(find(str(source)), tmp_path / "out", Request(scheme="int4", solver="rtn"))
    made, plan = load(tmp_path / "out", scheme=None)
    loaded, _ = load(source, scheme="int4")
    assert torch.equal(our_logits(made, plan, TOKENS), our_logits(loaded, plan, TOKENS))


RTN, ROLES, BITS, SEARCH = (
    {"scheme": "int8", "solver": "rtn"},
    {"scheme": "int8,expert=int4-g32,attention.o=nl4-g32"},
    {"bits": 6.0},
    {"scheme": "nl3-g32", "solver": "search"},
)
HQQ = {"scheme": "int4,expert=nl4-g32", "solver": "hqq"}


@pytest.mark.parametrize(
    "name, asked",
    [
        ("deepseek_v3", ROLES),
        ("deepseek_v3", HQQ),
        ("deepseek_v2", SEARCH),
        ("llama", BITS),
        ("qwen3", RTN),
    ],
)
def test_what_is_written_is_the_model(name, asked, tmp_path):
    source = folder(tmp_path / "m", name)
    done = quantize(find(str(source)), tmp_path / "out", Request(**SMALL, **asked))
    assert done["files"] > 1
    assert loaded_bytes(tmp_path / "out", source, 0.6 if "bits" in asked else 0.3) == done["bytes"]
    if "bits" in asked:
        assert done["bits_per_weight"] <= asked["bits"]


def test_experts_by_a_budget_are_the_models(original, budgeted):
    made, done = budgeted
    assert loaded_bytes(made, original, 0.6) == done["bytes"] and done["bits_per_weight"] <= 5.0


def test_a_compressed_model_is_planned_from_its_config_alone(budgeted):
    made, _ = budgeted
    config = json.loads((made / "config.json").read_text())
    model = find(str(made))
    assert set(config["undistilled"]["schemes"]) == {w.name for w in weights(model.spec)}
    assert any(s.startswith("tiles") for s in model.spec.stored.values())
    again = find(str(made / "config.json"))
    assert again.spec.stored == model.spec.stored


def test_bad_requests_are_refused_before_anything_is_written(tmp_path):
    model = find(str(folder(tmp_path / "m", "llama", num_hidden_layers=1)))
    for request, word in (
        (Request(), "one of"),
        (Request(scheme="int8", bits=4.0), "one of"),
        (Request(scheme="int9"), "int9"),
        (Request(scheme="int8,expert"), "role=scheme"),
        (Request(scheme="int8", solver="magic"), "magic"),
    ):
        with pytest.raises(UsageError, match=word):
            quantize(model, tmp_path / "out", request)
    with pytest.raises(DoesNotFit, match="bits a weight") as error:
        quantize(model, tmp_path / "low", Request(bits=0.5, solver="rtn"))
    enough = float(error.value.hint.split()[2])
    assert quantize(model, tmp_path / "least", Request(bits=enough, solver="rtn"))["bits_per_weight"] <= enough
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists"):
        quantize(model, tmp_path / "there", Request(scheme="int8"))
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob("low*"))


def test_a_calibration_is_kept_and_is_no_other_models(tmp_path):
    asked = {"bits": 5.0, "calibration": str(tmp_path / "kept"), **SMALL}
    one, other = (find(str(folder(tmp_path / n, "llama", vocab_size=v))) for n, v in (("m", 320), ("n", 352)))
    quantize(one, tmp_path / "first", Request(**asked))
    quantize(one, tmp_path / "second", Request(**asked))
    first, second = ((tmp_path / n / "model-00001-of-00002.safetensors").read_bytes() for n in ("first", "second"))
    assert first == second
    with pytest.raises(UsageError, match="another model"):
        quantize(other, tmp_path / "third", Request(**asked))
    done = quantize(other, tmp_path / "fourth", Request(**asked | {"solver": "rtn"}))
    assert done["bits_per_weight"] <= 5.0 and not list((tmp_path / "kept").glob("options-*-of-rtn*"))
    for inside in ("fifth", "fifth.partial/mine"):
        with pytest.raises(UsageError, match="where the checkpoint goes"):
            quantize(one, tmp_path / "fifth", Request(**asked | {"calibration": str(tmp_path / inside)}))


def test_what_cannot_calibrate_is_said(tmp_path):
    model = find(str(folder(tmp_path / "m", "llama")))
    (tmp_path / "short.txt").write_text("no.")
    with pytest.raises(UsageError, match="tokens to calibrate on"):
        quantize(model, tmp_path / "out", Request(scheme="int4", text=str(tmp_path / "short.txt")))
    with pytest.raises(UsageError, match="number of bits"):
        quantize(model, tmp_path / "nan", Request(bits=float("nan")))
    said = []
    (tmp_path / "some.txt").write_text("word " * 100)
    quantize(model, tmp_path / "some", Request(scheme="int4", text=str(tmp_path / "some.txt")), said.append)
    assert any("only" in line for line in said)


def test_a_request_that_came_to_nothing_does_not_bind_the_next(tmp_path):
    model = find(str(folder(tmp_path / "m", "llama")))
    with pytest.raises(UsageError, match="Cannot read"):
        quantize(model, tmp_path / "out", Request(scheme="int4", text=str(tmp_path / "missing.txt")))
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Name a folder"):
        quantize(model, tmp_path / "out", Request(scheme="int4", calibration=str(tmp_path / "file")))
    quantize(model, tmp_path / "out", Request(scheme="int8", solver="rtn"))
    with pytest.raises(BadArtefact, match="deepseek-r1 has no weights"):
        quantize(find("deepseek-r1"), tmp_path / "r1", Request(scheme="int8"))


def test_a_kill_at_the_very_end_loses_nothing(tmp_path, monkeypatch):
    model = find(str(folder(tmp_path / "m", "llama", num_hidden_layers=1)))
    rename = run.os.replace

    def killed(source, target):
        if target == tmp_path / "out":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.os, "replace", killed)
        quantize(model, tmp_path / "out", Request(bits=5.0, **SMALL))
    said = []
    quantize(model, tmp_path / "out", Request(bits=5.0, **SMALL), said.append)
    assert not any("calibration" in line or "measured 1 " in line for line in said)


def test_another_request_does_not_go_on_with_this_ones_files(tmp_path, monkeypatch):
    model, calls = find(str(folder(tmp_path / "m"))), iter(range(1))

    def full(_fd):
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(writer.DiskFull, match="goes on"):
        patch.setattr(writer.os, "fsync", full)
        quantize(model, tmp_path / "out", Request(scheme="int8", solver="rtn", shard=200_000))
    assert len(list((tmp_path / "out.partial").glob("*.safetensors*"))) == 1
    with pytest.raises(UsageError, match="another request, made with --scheme int8 --solver rtn"):
        quantize(model, tmp_path / "out", Request(scheme="int4", solver="rtn", shard=200_000))
    quantize(model, tmp_path / "out", Request(scheme="int8", solver="rtn", shard=200_000))


def test_a_budget_with_awq_goes_on_with_the_factors_that_it_found(tmp_path, monkeypatch):
    """Scaled weights are another file's values, but the same model: what is written answers as the original does."""
    source = folder(tmp_path / "m", "llama", num_hidden_layers=1)
    asked = Request(bits=7.5, solver="awq-gptq", **SMALL)
    with monkeypatch.context() as patch, pytest.raises(writer.DiskFull):
        patch.setattr(writer.os, "fsync", lambda _fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        quantize(find(str(source)), tmp_path / "out", asked)
    assert Factors.load(tmp_path / "out.partial" / "factors" / "0.safetensors").columns
    monkeypatch.setattr(rescale, "_together", lambda *_: pytest.fail("searched again"))
    assert quantize(find(str(source)), tmp_path / "out", asked)["bits_per_weight"] <= 7.5
    assert not list((tmp_path / "out").glob("factors*"))
    (made, made_plan), (truth, plan) = load(tmp_path / "out", scheme=None), load(source, scheme="fp32")
    one, other = (our_logits(*m, TOKENS).log_softmax(-1) for m in ((truth, plan), (made, made_plan)))
    assert float((one.exp() * (one - other)).sum(-1).mean()) < 0.05


def test_a_disk_that_lies_is_caught(tmp_path, monkeypatch):
    model = find(str(folder(tmp_path / "m")))
    monkeypatch.setattr(writer, "sha256", lambda _file: "0" * 64)
    with pytest.raises(BadArtefact, match="gives back"):
        quantize(model, tmp_path / "out", Request(scheme="int8", solver="rtn"))


def test_killed_at_any_time_it_ends_with_the_same_bytes(original, budgeted, tmp_path):
    code = (
        "from pathlib import Path; from undistilled.checkpoint.resolve import find; "
        "from undistilled.compress.run import Request, quantize; import torch; "
        f"torch.set_num_threads({torch.get_num_threads()}); print('begun', flush=True); "
        f"quantize(find({str(original)!r}), Path({str(tmp_path / 'out')!r}), Request(bits=5.0, **{SMALL}))"
    )
    draw, kills = random.Random(0), 0
    while not (tmp_path / "out").exists():
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        if kills < KILLS:
            time.sleep(draw.uniform(0.2, 6.0))
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    whole, _ = budgeted
    names = sorted(p.name for p in whole.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "out").iterdir())
    for name in names:
        assert (whole / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_schemes_named_by_a_checkpoint_are_checked(tmp_path):
    quantize(find(str(folder(tmp_path / "m"))), tmp_path / "out", Request(scheme="int8", solver="rtn"))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    name = next(n for n, s in config["undistilled"]["schemes"].items() if s == "int8")
    for scheme, word in (("int99", "no scheme"), ("int4", "missing|implies")):
        config["undistilled"]["schemes"][name] = scheme
        file.write_text(json.dumps(config))
        with pytest.raises((BadArtefact, UsageError), match=word):
            load(tmp_path / "out", scheme=None)
    assert schemes.get("int8")


def test_a_disk_that_is_too_small_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    model = find(str(folder(tmp_path / "m", "llama")))
    monkeypatch.setattr(choose, "moments_of", lambda *_: pytest.fail("calibrated"))
    free = files.shutil.disk_usage(tmp_path)
    for room_, asked, what in (
        (1_000, Request(bits=5.0, calibration=str(tmp_path / "kept"), **SMALL), "calibration takes .* MB; .*kept has"),
        (reckoned(model.spec, 1024) + 1, Request(bits=5.0, **SMALL), "in this form, with its calibration"),
        (1_000, Request(scheme="int8", solver="rtn"), "This form takes"),
    ):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _, room_=room_: free._replace(free=room_))
        with pytest.raises(writer.DiskFull, match=what):
            quantize(model, tmp_path / "out", asked)


@pytest.mark.parametrize("name", ["llama-tied", "deepseek_v3", "deepseek_v2", "deepseek_v3-mtp"])
def test_what_a_calibration_takes_is_reckoned(name, tmp_path):
    model = find(str(folder(tmp_path / "m", name)))
    quantize(model, tmp_path / "out", Request(scheme="int4", calibration=str(tmp_path / "kept"), **SMALL))
    left, states = held(tmp_path / "kept"), 4 * 1024 * model.spec.hidden * (model.spec.layers + 2)
    assert 0.9 * left < reckoned(model.spec, 1024) - states < 1.02 * left


def test_a_calibration_that_fills_the_disk_says_so_and_goes_on(tmp_path, monkeypatch):
    model = find(str(folder(tmp_path / "m", "llama")))

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch, pytest.raises(writer.DiskFull, match=r"No space left.*goes on"):
        patch.setattr(store, "save_file", full)
        quantize(model, tmp_path / "out", Request(scheme="int4", **SMALL))
    assert not list((tmp_path / "out.partial" / "calibration").glob("*.part"))
    quantize(model, tmp_path / "out", Request(scheme="int4", **SMALL))


def test_a_gpu_without_memory_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(run, "choose", full)
    with pytest.raises(DoesNotFit, match=r"2\.00 GiB\. Free it .*--device cpu"):
        quantize(find(str(folder(tmp_path / "m", "llama"))), tmp_path / "out", Request(scheme="int4", **SMALL))


def test_answers_that_did_not_fit_are_said_in_every_run(tmp_path, monkeypatch):
    model = find(str(folder(tmp_path / "m", "llama")))
    monkeypatch.setattr(material, "fits", lambda *_: False)
    asked = Request(scheme="int4", traces=512, calibration=str(tmp_path / "kept"), **SMALL)
    for out, words in (("one", "does not fit here"), ("two", "remove it to try again")):
        said = []
        quantize(model, tmp_path / out, asked, said.append)
        assert any(words in line for line in said)


@pytest.mark.parametrize("solver", ["search", "awq"])
def test_a_budget_is_for_the_solver_that_was_asked_for(solver, tmp_path, monkeypatch):
    monkeypatch.setattr(gptq, "rounded", lambda *_: pytest.fail("GPTQ"))
    model = find(str(folder(tmp_path / "m", "llama", num_hidden_layers=1)))
    quantize(model, tmp_path / "out", Request(bits=5.0, solver=solver, **SMALL))
    assert any(s.startswith("tiles") for s in find(str(tmp_path / "out")).spec.stored.values())


def test_an_mtp_layer_is_solved_by_its_own_moments(tmp_path, monkeypatch):
    model, met = find(str(folder(tmp_path / "m", "deepseek_v3-mtp"))), []
    known = Choice.known

    def noted(self, weight, experts):
        found = known(self, weight, experts)
        met.append((weight.name, found is not None)) if weight.mtp else None
        return found

    monkeypatch.setattr(Choice, "known", noted)
    quantize(model, tmp_path / "out", Request(scheme="int4", **SMALL))
    assert met and all(there for _, there in met)


def test_what_a_model_is_stored_in_is_an_option_that_loses_nothing(tmp_path):
    source = write_checkpoint(tmp_path / "m", CONFIGS["deepseek_v3"], fp8=True)
    byte_tokenizer().save(source)
    done = quantize(find(str(source)), tmp_path / "out", Request(bits=12.0, solver="rtn"))
    assert done["schemes"]["fp8_block"] > 10
    held_, truth = (find(str(path)).source() for path in (tmp_path / "out", source))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(held_.dense(name, 0, held_.shape(name)[0]), truth.dense(name, 0, truth.shape(name)[0]))
