"""OpenVINO, the stateful model that OpenVINO GenAI runs, by its own infer requests: token ids in, logits of the last one out."""

from __future__ import annotations

from typing import Any

from .common import Job, Tick, Variant, convert, files_size, main

NAME, ENVIRONMENT = "OpenVINO", "openvino"
# Both keep the embedding, which is the output matrix too, in int8. Its CPU kernels round activations to int8 by themselves.
VARIANTS = {
    "int8": Variant("hf", "int8 rows; int8 activations", 8, 1, 1),
    "int4": Variant(
        "hf", "int4, group 64, int8 head; int8 activations", 4, 34 / 64, 1,
        settings={"convert": ["--sym", "--group-size", "64", "--ratio", "1.0"]},
    ),
}  # fmt: skip


class OpenVINO:
    def __init__(self, job: Job) -> None:
        import numpy as np
        import openvino as ov

        variant = VARIANTS[job.variant]
        folder = convert(job, f"openvino-{job.variant}", [
            "bin/optimum-cli", "export", "openvino", "-m", "{source}", "--task", "text-generation-with-past",
            "--weight-format", job.variant, *variant.settings.get("convert", []), "{target}",
        ])  # fmt: skip
        self.np, self.weights_bytes = np, files_size(folder, "openvino_model.bin")
        core = ov.Core()
        model = core.read_model(folder / "openvino_model.xml")
        keep_last_position(model)
        options = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        self.request = core.compile_model(model, "CPU", options).create_infer_request()

    def step(self, ids: list[list[int]], position: int) -> list[int]:
        np, batch, end = self.np, len(ids), position + len(ids[0])
        inputs = {
            "input_ids": np.array(ids, np.int64),
            "attention_mask": np.ones((batch, end), np.int64),
            "position_ids": np.tile(np.arange(position, end, dtype=np.int64), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self.request.start_async(inputs, share_inputs=True)
        self.request.wait()
        return self.request.get_tensor("logits").data[:, -1].argmax(-1).tolist()

    def generate(self, prompts: list[list[int]], new_tokens: int, tick: Tick) -> list[list[int]]:
        self.request.reset_state()
        steps = [self.step(prompts, 0)]
        tick()
        for at in range(len(prompts[0]), len(prompts[0]) + new_tokens):
            steps.append(self.step([[token] for token in steps[-1]], at))
            tick()
        return [list(tokens) for tokens in zip(*steps)]


def keep_last_position(model: Any) -> None:
    """Cut the output matrix's input to the last position, as openvino_genai does when it loads a model."""
    import numpy as np
    from openvino import opset13

    result = next(r for r in model.get_results() if "logits" in r.input_value(0).get_names())
    node = result.input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    one, largest = np.array([1], np.int64), np.array([2**31 - 1], np.int64)
    last = opset13.slice(node.input_value(0), -one, largest, one, one)
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


if __name__ == "__main__":
    main(OpenVINO, ("openvino", "openvino-genai", "optimum-intel", "nncf"))
