"""The verbs as scripts use them: JSON out, errors as one message, exit codes."""

import json
import os
import subprocess
import sys

import pytest

from byte_tokens import byte_tokenizer
from tiny import LLAMA, write_checkpoint


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "undistilled", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )


def test_plan_r1_from_its_config():
    done = run("plan", "deepseek-r1", "--machine", "8x-h200", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["tensors"] == 91_991 and len(plan["rows"]) == 1048
    for device in plan["predicted"]["devices"].values():
        assert set(device["bytes"]) == {"weights", "kv", "activations", "runtime", "total"}
    assert plan["predicted"]["prefill_tokens_per_s"] > 0 and plan["predicted"]["decode_tokens_per_s"] > 0


def test_what_does_not_fit_is_exit_4_and_still_json():
    done = run("plan", "deepseek-r1", "--machine", "laptop-16gb", "--json")
    assert done.returncode == 4 and json.loads(done.stdout)["fits"] is False
    assert "GB" in done.stderr


def test_export(tmp_path):
    byte_tokenizer().save(write_checkpoint(tmp_path / "m", LLAMA))
    done = run("export", tmp_path / "m", tmp_path / "m.gguf", "--format", "gguf", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["schemes"] == {"fp32": 30} and said["dense"] == []
    assert (tmp_path / "m.gguf").stat().st_size > said["bytes"]


def test_inspect_r1():
    found = json.loads(run("inspect", "deepseek-r1", "--json").stdout)
    assert found["parameters"]["total"] == 671_026_419_200 and found["parameters"]["active"] == 36_625_625_600
    assert found["kv_bytes_per_token"] == 70_272 and found["layers"] == 61


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["plan"], 2),
        (["plan", "deepseek-r1", "--machine", "nowhere"], 2),
        (["plan", "deepseek-r1", "--scheme", "int7"], 2),
        (["plan", "deepseek-r1", "--context", "999999999"], 2),
        (["plan", "/no/such/model"], 3),
        (["inspect", "nobody/nothing"], 3),
        (["export", "deepseek-r1", "nowhere", "--format", "onnx"], 2),
        (["prove", "deepseek-r1", "--tokens", "64"], 3),
    ],
)
def test_exit_codes(arguments, code):
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip()


def test_a_plan_is_held_to(tmp_path):
    folder = write_checkpoint(tmp_path / "m", LLAMA)
    plan = tmp_path / "plan.json"
    assert run("plan", folder, "--scheme", "int8", "--device", "cpu", "-o", plan).returncode == 0
    raw = json.loads(plan.read_text())
    raw["rows"][3]["nbytes"] += 1
    plan.write_text(json.dumps(raw))
    done = run("generate", folder, "--plan", plan, "--prompt", "x")
    assert done.returncode == 3 and raw["rows"][3]["name"] in done.stderr.replace("\n", "")


def test_doctor():
    found = json.loads(run("doctor", "--json").stdout)
    on_cpu = [row for row in found["kernels"] if row["device"] == "cpu"]
    assert {row["scheme"] for row in on_cpu} >= {"bf16", "int8", "int4", "fp8_block", "nl3-g64", "dynamic blocks"}
    assert bool(found["native_kernels"]) != bool(found["native_why_missing"])
    assert not found["native_kernels"] or "reference" not in {row["kernel"] for row in on_cpu}


def test_a_build_of_the_kernels_is_chosen_by_name():
    found = json.loads(run("doctor", "--json", UNDISTILLED_KERNELS="avx2").stdout)
    assert found["native_kernels"] in ("avx2", "")
    found = json.loads(run("doctor", "--json", UNDISTILLED_KERNELS="/nowhere").stdout)
    assert found["native_kernels"] == "" and "/nowhere" in found["native_why_missing"]


def test_reference_can_be_forced():
    kernels = json.loads(run("doctor", "--json", UNDISTILLED_REFERENCE="1").stdout)["kernels"]
    assert {row["kernel"] for row in kernels} == {"reference"}


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["plan", "r1-nano", "--scheme", "nl2"], 2, ["nl2-g64", "experts-int4"]),
        (["plan", "r1-nano", "-o", "{}/nowhere/plan.json"], 2, ["no folder"]),
        (["plan", "r1-nano", "-o", "{}/text.txt"], 2, ["text.txt exists", "another name"]),
        (["plan", "{}/gpt2"], 3, ["(gpt2) is not supported"]),
        (["plan", "r1-nano", "--machine", "h100,h100"], 2, ["several machines", "--cluster ray"]),
        (["plan", "r1-nano", "--ranks", "2", "--tp", "2"], 2, ["--ranks chooses --tp", "one or the other"]),
        (["generate", "deepseek-r1", "--prompt", "x", "--tp", "2"], 3, ["no weights here", "enough to plan"]),
        (["prove", "r1-nano", "--tasks", "{}/none.jsonl"], 3, ["No such file", "JSON objects, one a line"]),
        (["compare", "{}/text.txt"], 3, ["is no receipt", "prove MODEL -o"]),
        (["compare", "{}/text.txt", "-o", "{}/q.txt"], 2, [".png or .svg"]),
        (["generate", "r1-nano", "--prompt", "x", "--plan", "{}/text.txt"], 3, ["is no plan", "plan MODEL -o"]),
        (["quantize", "r1-nano", "{}/out", "--bytes", "900GB"], 2, ["as it is", "--bytes below"]),
        (["quantize", "r1-nano", "{}/out", "--bytes", "4"], 4, ["Give --bytes"]),
        (["quantize", "r1-nano", "{}/out", "--bits", "4", "--scheme", "int4"], 2, ["not both"]),
    ],
)
def test_messages_name_the_way_out(arguments, code, said, tmp_path):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "text.txt").write_text("words")
    done = run(*(argument.format(tmp_path) for argument in arguments))
    told = "".join((done.stdout + done.stderr).split())  # a long path is broken anywhere
    assert done.returncode == code and "Traceback" not in told
    assert all("".join(words.split()) in told for words in said)
    assert "written to" not in told


def test_what_a_new_user_types_first():
    from undistilled import __version__

    assert run("--version").stdout.strip() == f"undistilled {__version__}"
    for words, wanted in (
        (("plan", "r1-nano", "--scheme", "expert=int4"), "Put it first: int8,expert=int4"),
        (("plan", "r1-nano", "--device", "cuda"), "without it a GPU is used"),
        (("plan", "r1-nano", "--tp", "3", "--device", "cpu"), "such as --scheme int8"),
        (("plan", "r1-nano", "--ep", "100", "--device", "cpu"), "At most 8 ranks in a stage"),
    ):
        done = run(*words)
        assert done.returncode == 2 and wanted in " ".join(done.stderr.split()), done.stderr
