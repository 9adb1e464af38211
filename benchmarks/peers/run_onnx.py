"""A folder of ONNX Runtime GenAI's model builder."""

import json
from time import perf_counter

import numpy
import onnxruntime_genai as genai
from measured import main


class Onnx:
    def __init__(self, model, threads):
        config = genai.Config(model)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = genai.Model(config)

    def generator(self, count, length):
        params = genai.GeneratorParams(self.model)
        params.set_search_options(max_length=length, min_length=length, batch_size=count, do_sample=False)
        return genai.Generator(self.model, params)

    def run(self, prompts, new):
        generator = self.generator(len(prompts), len(prompts[0]) + new + 1)
        began = perf_counter()
        generator.append_tokens(numpy.array(prompts, numpy.int32))
        generator.generate_next_token()
        first = perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return first - began, perf_counter() - first

    def logits(self, tokens):
        generator = self.generator(1, len(tokens) + 1)
        generator.append_tokens(numpy.array([tokens], numpy.int32))
        return generator.get_output("logits")[0]


if __name__ == "__main__":
    main(Onnx)
