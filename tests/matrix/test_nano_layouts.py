"""r1-nano in FP32 writes the same text in every layout, whole processes and all."""

import pytest
import torch

from undistilled.generate.engine import open_engine
from undistilled.schedule.request import Request, Sampling

PROMPTS = ("What is 17 + 25?", "Once upon a time", "Sort 5, 3, 9")
LAYOUTS = [{"tp": 2, "pp": 2, "microbatches": 2}, {"ep": 2}, {"tp": 3}]


def written(device="cpu", **layout):
    threads = torch.get_num_threads()
    engine = open_engine({"model": "r1-nano", "scheme": "fp32", "device": device, "context": 128, "batch": 4, **layout})
    try:
        sampling = Sampling(max_tokens=32, temperature=0, ignore_eos=True)
        asked = [Request(p, engine.tokenizer.encode(p, control=False), sampling) for p in PROMPTS]
        found = engine.run_all(asked)
        return {p: [t for o in found[p] for t in o.tokens] for p in PROMPTS}
    finally:
        engine.close()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone():
    return written()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_text_is_the_same(alone, layout):
    assert written(**layout) == alone
