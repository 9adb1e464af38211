import json
import sys

import pytest
import toy

from undistilled.errors import BadArtefact, UndistilledError, UsageError
from undistilled.prove import measure
from undistilled.prove.compare import rows
from undistilled.prove.inputs import read_text
from undistilled.prove.receipt import check_output, prove, seal, verify_receipt, write_receipt


def test_figures_and_bindings(receipt, folder):
    r = receipt
    assert r["kl_nats"]["mean"] > 0 and r["kl_nats"]["se"] > 0 and 0 < r["top1_agreement"] <= 1
    assert r["perplexity"]["original"] > 1 and r["perplexity"]["plan"] > 1
    assert r["tasks"]["toy"]["n"] == 6 and {"original", "plan"} <= r["tasks"]["toy"].keys()
    assert r["memory"]["measured"] == toy.BENCH["peak_bytes"] and r["memory"]["predicted"] > 0
    assert r["speed"]["measured"] == {k: toy.BENCH[k] for k in ("prefill_tokens_per_s", "decode_tokens_per_s")}
    assert r["speed"]["predicted"].keys() == r["speed"]["measured"].keys()
    assert r["plan"]["scheme"] == "int4" and r["original"]["scheme"] == "fp32"
    assert r["plan"]["bytes"] < r["original"]["bytes"] and r["plan"]["bits_per_weight"] < 32
    assert len(r["model"]["fingerprint"]) == len(r["plan"]["digest"]) == 64
    assert r["text"]["tokens"] == 300 and r["conditions"]["same_context"]
    assert r["versions"].keys() == {"undistilled", "torch", "python"} and r["when"].endswith("+00:00")


def test_the_original_against_itself_costs_nothing(folder, text, tmp_path):
    said = []
    r = prove(
        str(folder),
        scheme="fp32",
        text=text,
        tasks=[toy.task_file(tmp_path)],
        tokens=200,
        limit=2,
        context=128,
        window=64,
        command=toy.bench,
        progress=said.append,
    )
    assert r["kl_nats"]["mean"] == 0.0 and r["top1_agreement"] == 1.0
    task = r["tasks"]["toy"]
    assert task["n"] == 2 and task["original"] == task["plan"] and task["difference"] == 0
    assert any("original" in s for s in said) and any("toy" in s for s in said)


def test_an_edit_shows(receipt):
    assert verify_receipt(receipt) and verify_receipt(json.loads(json.dumps(receipt)))
    assert not verify_receipt(receipt | {"top1_agreement": 1.0})
    assert not verify_receipt(receipt | {"kl_nats": receipt["kl_nats"] | {"mean": 0.0}})
    assert not verify_receipt({k: v for k, v in receipt.items() if k != "machine"})
    assert not verify_receipt(receipt | {"more": 1})
    assert not verify_receipt({k: v for k, v in receipt.items() if k != "receipt_id"})
    assert not verify_receipt(receipt | {"top1_agreement": float("nan")}) and not verify_receipt([])
    with pytest.raises(ValueError):
        seal({"kl": float("inf")})


def test_written_whole_beside_its_page(receipt, tmp_path):
    page = write_receipt(receipt, tmp_path / "out.json")
    assert verify_receipt(json.loads((tmp_path / "out.json").read_text()))
    assert page == tmp_path / "out.html" and page.read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.html", "out.json"]
    for bad in (tmp_path / "r.html", tmp_path, tmp_path / "absent" / "r.json"):
        with pytest.raises(UsageError):
            check_output(bad)


def test_speed_can_be_left_out(folder, text, tmp_path):
    def never(argv):
        raise AssertionError("ran")

    r = prove(str(folder), scheme="int4", text=text, tokens=200, context=128, speed=False, command=never)
    assert r["kl_nats"]["mean"] > 0 and r["speed"]["measured"] is None and r["memory"]["measured"] is None
    page = write_receipt(r, tmp_path / "quick.json").read_text()
    assert "not measured (--no-speed)" in page
    assert rows([tmp_path / "quick.json"])[0]["decode_tokens_per_s"] is None


def test_a_plan_file_is_held_to(folder, text, tmp_path):
    from undistilled.checkpoint.resolve import find
    from undistilled.generate.engine import plan_for

    plan = plan_for(find(str(folder)), {"scheme": "int8", "context": 96, "device": "cpu"})
    plan.write(tmp_path / "plan.json")
    seen = []

    def bench(argv):
        seen.extend(argv)
        return toy.bench(argv)

    r = prove(str(folder), plan_file=tmp_path / "plan.json", text=text, tokens=64, command=bench)
    assert r["plan"]["digest"] == plan.digest() and r["plan"]["context"] == 96 and r["text"]["window"] == 96
    assert seen[:5] == [sys.executable, "-m", "undistilled", "bench", str(folder)] and "--json" in seen
    assert int(seen[seen.index("--prompt-tokens") + 1]) + int(seen[seen.index("--new-tokens") + 1]) == 96
    with pytest.raises(UsageError):
        prove(str(folder), plan_file=tmp_path / "plan.json", scheme="int4", command=bench)


def test_inputs_are_refused_before_anything_runs(folder, tmp_path):
    def never(argv):
        raise AssertionError("ran")

    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xff")
    for text in (empty, binary, tmp_path / "absent.txt"):
        with pytest.raises(BadArtefact):
            prove(str(folder), scheme="int4", text=text, context=128, command=never)
    with pytest.raises(UsageError):
        prove(str(folder), scheme="int4", tokens=1, context=128, command=never)


@pytest.mark.parametrize(
    "printed",
    [
        "",
        "[]",
        "{}",
        json.dumps(toy.BENCH | {"peak_bytes": 0}),
        json.dumps(toy.BENCH | {"decode_tokens_per_s": {"median": "3"}}),
    ],
)
def test_a_bench_that_measured_nothing_is_no_figure(folder, text, printed):
    with pytest.raises(UndistilledError, match="no measurement"):
        prove(str(folder), scheme="int4", text=text, tokens=64, context=128, command=lambda argv: printed)


def test_a_command_that_fails_says_why():
    with pytest.raises(UndistilledError, match=r"exit 3.*broken"):
        measure.run_command([sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)"])


def test_the_built_in_text():
    name, content = read_text(None)
    assert "Persuasion" in name and content.startswith("Sir Walter Elliot") and 20_000 < len(content) < 26_000
