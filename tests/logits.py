"""Helpers that the CPU and GPU comparisons with transformers share."""

import torch

from undistilled.generate.runner import Runner
from undistilled.schedule.request import Request, Sampling
from undistilled.schedule.scheduler import Sequence, Work


def our_logits(decoder, plan, tokens):
    """Logits [T, V] of one whole prompt."""
    runner = Runner(decoder, plan)
    sequence = Sequence(Request("r", tokens, Sampling()), tokens, blocks=list(range(plan.kv.blocks)))
    with torch.inference_mode():
        return decoder.logits(decoder(runner.batch([Work(sequence, 0, len(tokens))], True), runner.caches))
