"""A folder of optimum-intel's in OpenVINO GenAI; logits by the runtime, from the same compiled graph's defaults."""

from pathlib import Path

import numpy
import openvino
import openvino_genai as genai
from measured import main


class OpenVino:
    def __init__(self, model, threads):
        self.folder, self.options = Path(model), {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = None

    def run(self, prompts, new):
        if self.pipeline is None:
            self.pipeline = genai.LLMPipeline(self.folder, "CPU", **self.options)
        ids = numpy.array(prompts, numpy.int64)
        given = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        config = genai.GenerationConfig(max_new_tokens=new + 1, ignore_eos=True, do_sample=False)
        took = self.pipeline.generate(given, config).perf_metrics
        first = took.get_ttft().mean
        return first / 1e3, (took.get_generate_duration().mean - first) / 1e3

    def logits(self, tokens):
        compiled = openvino.Core().compile_model(self.folder / "openvino_model.xml", "CPU", self.options)
        count = len(tokens)
        ids = numpy.array([tokens], numpy.int64)
        inputs = {"input_ids": ids, "attention_mask": numpy.ones_like(ids),
                  "position_ids": numpy.arange(count)[None], "beam_idx": numpy.zeros(1, numpy.int32)}  # fmt: skip
        return compiled.create_infer_request().infer(inputs)["logits"][0]


if __name__ == "__main__":
    main(OpenVino)
