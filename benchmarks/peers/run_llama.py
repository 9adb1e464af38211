"""A GGUF file in llama.cpp, by its C interface: sequences in one batch, and a greedy choice."""

from time import perf_counter

import llama_cpp as llama
import numpy
from measured import PROMPT, TOGETHER, main

ROOM = 2048  # tokens of all sequences together


class Llama:
    def __init__(self, model, threads):
        llama.llama_backend_init()
        llama.llama_log_set(_quiet, None)
        self.model = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
        p = llama.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max, p.kv_unified = ROOM, PROMPT, PROMPT, TOGETHER, True
        p.n_threads = p.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, p)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(PROMPT, 0, 1)

    def step(self, rows):
        """Rows of (token, position, sequence, whether its logits are wanted) -> the wanted logits, as one array."""
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        self.batch.n_tokens = len(rows)
        if llama.llama_decode(self.context, self.batch):
            raise SystemExit("llama_decode failed")
        count = sum(row[3] for row in rows)
        return numpy.ctypeslib.as_array(llama.llama_get_logits(self.context), (count, self.vocab))

    def clear(self):
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def run(self, prompts, new):
        self.clear()
        length = len(prompts[0])
        began = perf_counter()
        rows = [(t, i, s, i == length - 1) for s, tokens in enumerate(prompts) for i, t in enumerate(tokens)]
        chosen = self.step(rows).argmax(-1)
        first = perf_counter()
        for position in range(length, length + new):
            chosen = self.step([(int(t), position, s, True) for s, t in enumerate(chosen)]).argmax(-1)
        return first - began, perf_counter() - first

    def logits(self, tokens):
        self.clear()
        return self.step([(t, i, 0, True) for i, t in enumerate(tokens)])


@llama.llama_log_callback
def _quiet(level, text, data):
    pass


if __name__ == "__main__":
    main(Llama)
