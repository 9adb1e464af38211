"""Experts that several ranks hold: what one process gives, within 2e-6 of the logits' size; and what routers choose."""

from dataclasses import replace

import pytest
import torch

from ranks import Cell, Pool, run
from tiny import WIDE, write_checkpoint
from undistilled.generate.engine import open_engine
from undistilled.observe.routing import balance, choices, counted
from undistilled.ops.cpu import native
from undistilled.plan.copies import Counts

LAYOUTS = {"ep2": {"ep": 2}, "tp2 ep2": {"tp": 2, "ep": 2}, "ep4": {"ep": 4}, "ep2 pp2": {"ep": 2, "pp": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("copies") / "m", WIDE["deepseek"]))


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """The first experts are chosen most."""
    config = WIDE["deepseek"]
    row = [1000 // (e + 1) for e in range(config["n_routed_experts"])]
    layers = {layer: row for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"])}
    file = tmp_path_factory.mktemp("counts") / "counts.json"
    file.write_text(Counts(model="tiny", text="made up", tokens=1, layers=layers).model_dump_json())
    return str(file)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    made = Pool(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.mark.parametrize("scheme", ["fp8_block", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_with_copies_is_the_model(pool, folder, counts, layout, scheme):
    cell = Cell(folder, scheme, LAYOUTS[layout] | {"copies": 3, "counts": counts})
    assert len(cell.plan().mesh.copies) >= 3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = run(Cell(folder, scheme), 0, None)
    torch.set_num_threads(threads)
    found = pool.logits(cell)
    assert ((found - expected).norm() / expected.norm()).item() < 2e-6


@pytest.mark.skipif(native.library() is None, reason=native.why_missing())
def test_recorded_passes_with_copies(pool, folder, counts):
    """Whose turn an expert is follows from a pass's tokens: it is not recorded with them."""
    cell = Cell(folder, "int8", {"ep": 2, "copies": 3, "counts": counts}, recorded=True)
    assert torch.equal(pool.logits(cell), pool.logits(replace(cell, replayed=False, recorded=False)))


def test_routers_of_nano_are_counted():
    engine = open_engine({"model": "r1-nano", "device": "cpu", "context": 128})
    text = engine.tokenizer.encode("What is 17 + 25? Sort 5, 3, 9. " * 20, control=False)
    found = choices(engine, text)
    counts = counted(engine, found, "questions")
    assert counts.tokens == len(text) and set(counts.layers) == set(range(1, 16))
    assert all(sum(row) == 6 * len(text) for row in counts.layers.values())
    report = balance(engine, found, 2, 4)
    assert sum(report["copied"]) < sum(report["plain"])
