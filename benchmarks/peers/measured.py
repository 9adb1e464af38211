"""What every engine's program answers: how fast it is, or what it predicts. Runs in each engine's environment.

An engine has two methods: `run(prompts, new)`, all prompts together and then `new` tokens more of each, gives the
seconds of both; `logits(tokens)` gives [T, V], row t after tokens[: t + 1].
"""

import argparse
import json
from pathlib import Path

import numpy

PROMPT, NEW, TOGETHER, SHORT = 512, 64, 8, 64  # tokens; requests at once, and the tokens of their prompts


def prompt(length, first=0):
    """Token ids without a pattern that an engine could profit from."""
    return [((i + first) * 7919 + 100) % 32000 for i in range(length)]


def rates(engine):
    """Tokens a second: reading a prompt, writing alone after it, writing as many at once."""
    engine.run([prompt(SHORT)], 4)
    reading, writing = engine.run([prompt(PROMPT)], NEW)
    _, together = engine.run([prompt(SHORT, 1000 * i) for i in range(TOGETHER)], NEW)
    return {"prefill": PROMPT / reading, "decode": NEW / writing, "batch 8": TOGETHER * NEW / together}


def main(load):
    """load(model, threads) -> an engine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--text", type=Path, help="token ids, as JSON")
    parser.add_argument("--logits", type=Path, help="where to put the logits of --text")
    args = parser.parse_args()
    engine = load(args.model, args.threads)
    if args.text:
        numpy.save(args.logits, numpy.asarray(engine.logits(json.loads(args.text.read_text())), numpy.float32))
    else:
        print("\n" + json.dumps(rates(engine)))
