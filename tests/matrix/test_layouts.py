"""Every scheme in every layout gives what one process gives: equal bits where sums are taken in the same order (stages
of a pipeline), and else within 2e-6 of the logits' size, float32's rounding over a few hundred terms."""

from dataclasses import replace

import pytest
import torch

from ranks import Cell, Pool, run
from tiny import CONFIGS, WIDE, write_checkpoint
from undistilled.errors import UsageError
from undistilled.ops.cpu import native

SCHEMES = ("bf16", "fp8_block", "int8", "int4", "int8,expert=tiles16x32-2x1-3x2-4x1,dense=tiles16x32-2x1-4x1")
LAYOUTS = {
    "tp2": {"tp": 2}, "tp4": {"tp": 4}, "tp3": {"tp": 3}, "pp2": {"pp": 2}, "pp4": {"pp": 4},
    "tp2 pp2": {"tp": 2, "pp": 2}, "ep2": {"ep": 2}, "tp2 ep2": {"tp": 2, "ep": 2},
}


def cells():
    """Each layout in two schemes and each scheme in at least three layouts, uneven shares among them; the rest is
    slow. What a layout does to a scheme follows from the scheme's quanta by one slicer, so that a fault of either meets
    it in some cell."""
    for at, scheme in enumerate(SCHEMES):
        for number, layout in enumerate(LAYOUTS):
            kept = layout == "tp3" or (number + at) % len(SCHEMES) < 2
            for model in WIDE:
                yield pytest.param(model, scheme, layout, marks=[] if kept else [pytest.mark.slow])


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    made = Pool(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: str(write_checkpoint(tmp_path_factory.mktemp(name), config)) for name, config in WIDE.items()}


@pytest.fixture(scope="module")
def alone(folders):
    found = {}

    def of(model, scheme):
        if (model, scheme) not in found:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            found[model, scheme] = run(Cell(folders[model], scheme), 0, None)
            torch.set_num_threads(threads)
        return found[model, scheme]

    return of


@pytest.mark.parametrize("model, scheme, layout", cells())
def test_a_layout_is_the_model(pool, folders, alone, model, scheme, layout):
    cell = Cell(folders[model], scheme, LAYOUTS[layout])
    if model == "llama" and "ep" in cell.degrees:
        with pytest.raises(UsageError, match="routed experts"):
            cell.plan()
        return
    expected, found = alone(model, scheme), pool.logits(cell)
    assert found.shape == expected.shape
    if set(cell.degrees) == {"pp"}:
        assert torch.equal(found, expected)
    else:
        assert ((found - expected).norm() / expected.norm()).item() < 2e-6


@pytest.mark.parametrize("model", ["deepseek", "llama"])
def test_activations_rounded_to_int16_may_be_cut_anywhere(pool, folders, model):
    """A scale belongs to 32 inputs, of which a rank may have some: what it rounds differs by as much as it rounds."""
    expected = run(Cell(folders[model], "int8", dtype="int16"), 0, None)
    found = pool.logits(Cell(folders[model], "int8", LAYOUTS["tp3"], dtype="int16"))
    assert 0 < ((found - expected).norm() / expected.norm()).item() < 2e-4


def test_key_value_heads_that_ranks_repeat(pool, tmp_path):
    folder = str(write_checkpoint(tmp_path / "m", CONFIGS["llama"]))
    expected, found = run(Cell(folder, "int8"), 0, None), pool.logits(Cell(folder, "int8", {"tp": 4}))
    assert ((found - expected).norm() / expected.norm()).item() < 2e-6


def test_ranks_of_unequal_memory_take_unequal_shares(pool, folders, alone):
    """24 and 8 GB: three heads in four, whole quanta of FP8 each."""
    found = pool.logits(Cell(folders["deepseek"], "fp8_block", {"tp": 2}, [3.0, 1.0]))
    expected = alone("deepseek", "fp8_block")
    assert ((found - expected).norm() / expected.norm()).item() < 2e-6


@pytest.mark.skipif(native.library() is None, reason=native.why_missing())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model, scheme", [("deepseek", "int8"), ("deepseek", "int4"), ("llama", "bf16")])
def test_recorded_passes_have_the_bits_of_others(pool, folders, model, scheme, layout):
    """On every rank, of any stage, with experts and parts of width 0: recorded once, run again with other tokens."""
    if model == "llama" and "ep" in LAYOUTS[layout]:
        return
    cell = Cell(folders[model], scheme, LAYOUTS[layout], recorded=True)
    assert torch.equal(pool.logits(cell), pool.logits(replace(cell, replayed=False, recorded=False)))


@pytest.mark.parametrize("model, layout", [("deepseek", "tp3"), ("llama", "tp4"), ("deepseek", "tp2 ep2")])
def test_sums_in_shared_memory_have_the_bits_of_others(pool, folders, model, layout):
    cell = Cell(folders[model], "int8", LAYOUTS[layout])
    assert torch.equal(pool.logits(cell), pool.logits(replace(cell, sockets=True)))
