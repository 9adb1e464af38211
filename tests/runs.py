"""Running requests through the engine's own scheduler and runner, without a tokenizer."""

from undistilled.generate.runner import Runner
from undistilled.generate.sampler import Sampler
from undistilled.schedule.blocks import BlockPool
from undistilled.schedule.request import Request, Sampling
from undistilled.schedule.scheduler import Scheduler


def greedy(decoder, plan, prompts, count, *, chunk=None, batch=None, blocks=None):
    """`count` greedy tokens after each prompt, all prompts in one run."""
    runner = Runner(decoder, plan)
    pool = BlockPool(blocks or plan.kv.blocks, plan.kv.block_size)
    scheduler = Scheduler(
        pool, max_batch=batch or plan.limits.batch, max_context=plan.limits.context, chunk=chunk or plan.limits.chunk
    )
    sampling = Sampling(max_tokens=count, temperature=0)
    sequences = [scheduler.add(Request(str(i), list(p), sampling)) for i, p in enumerate(prompts)]
    samplers = {str(i): Sampler(sampling, p, decoder.spec.vocab) for i, p in enumerate(prompts)}
    while not scheduler.idle:
        for work, logits in runner.run(scheduler.step()):
            token = None if logits is None else samplers[work.sequence.request.id].choose(logits)[0]
            scheduler.done(work, token)
            if len(work.sequence.tokens) - work.sequence.prompt_length >= count:
                scheduler.finish(work.sequence)
    assert pool.used == 0
    return [s.tokens[s.prompt_length :] for s in sequences]
