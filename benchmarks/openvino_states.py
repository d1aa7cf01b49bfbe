"""A decoded token on OpenVINO with its caches as inputs and outputs, against caches that the model keeps (ReadValue and Assign).

    python benchmarks/openvino_states.py [--tokens N ...] [--rounds N]

The decoder of `ttft.py`, a Llama of 113 million parameters in its blocks, random weights, fp32, one thread, behind N visual tokens
(default: 576 and 64) and a prompt of 32. The same graph runs in both forms, in turns, eight tokens a round: as the runtime runs it,
with caches that are handed over and written in NumPy, and made stateful by `openvino.passes.MakeStateful`, with each token
scattered into its slot. Both must give the same logits. Printed: medians and least times of a token, of the clock and of the
processor, which a busy machine changes less, and their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import openvino.opset13 as ops  # noqa: E402
import torch  # noqa: E402
from openvino.passes import MakeStateful, Manager  # noqa: E402
from ttft import NEW, PROMPT, ROOM, model  # noqa: E402

from edgewise import targets  # noqa: E402
from edgewise.exporter.capture import capture  # noqa: E402
from edgewise.exporter.pipeline.vision_language import Decode  # noqa: E402
from edgewise.targets import Session  # noqa: E402

LAYERS, HEADS, SIZE = 16, 12, 64
Times = list[np.ndarray]
"""Seconds of each token, of the clock and of the processor."""


def now() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def lowered(made: Any, tokens: int, folder: Path) -> Path:
    """The IR of `decode` behind so many visual tokens."""
    past = [torch.zeros(1, HEADS, tokens + PROMPT + ROOM, SIZE) for _ in range(LAYERS)]
    whole = {"input_ids": torch.tensor([[5]]), "position": torch.tensor([[tokens + PROMPT]])}
    whole |= {"length": torch.tensor([PROMPT]), "step": torch.tensor([0])}
    program = capture(Decode(made, PROMPT, ROOM), (), {**whole, "past_key": past, "past_value": [t.clone() for t in past]})
    target = targets.get("openvino")
    names = list(program.inputs)
    files = target.lower(
        program.exported, folder, f"decode{tokens}", precision="fp32", input_names=names, output_names=list(program.output_names)
    )
    return files[0]


def stateful(path: Path, first: int) -> ov.Model:
    """The same graph, which keeps its caches and writes each token to slot `first` + step."""
    graph = ov.Core().read_model(path)
    inputs = {port.get_any_name(): port for port in graph.inputs}
    outputs = {port.get_any_name(): port.get_node().input_value(0) for port in graph.outputs}
    slot = ops.add(inputs["step"], ops.constant(np.array([first], np.int64)))
    pairs, results = {}, []
    for name in [name for name in inputs if name.startswith("past_")]:
        token = outputs[name.removeprefix("past_")]
        kept = ops.scatter_update(inputs[name], slot, token, ops.constant(np.array(2, np.int64)))
        kept.output(0).get_tensor().set_names({f"kept_{name}"})
        results.append(ops.result(kept))
        pairs[name] = f"kept_{name}"
    graph.add_results(results)
    manager = Manager()
    manager.register_pass(MakeStateful(pairs))
    manager.run_passes(graph)
    return graph


def feeds(tokens: int, step: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.array([[7 + step]]),
        "position": np.array([[tokens + PROMPT + step]]),
        "length": np.array([PROMPT]),
        "step": np.array([step]),
    }


def by_hand(session: Session, tokens: int, begin: dict[str, np.ndarray], times: Times) -> np.ndarray:
    """Eight tokens with caches that are handed over; gives the logits of the last."""
    caches = {name: array.copy() for name, array in begin.items()}
    for step in range(NEW):
        start = now()
        made = session.run({**caches, **feeds(tokens, step)})
        for name in caches:
            caches[name][:, :, tokens + PROMPT + step] = made[name.removeprefix("past_")][:, :, 0]
        times.append(now() - start)
    return made["logits"]


def by_itself(request: ov.InferRequest, tokens: int, begin: dict[str, np.ndarray], times: Times) -> np.ndarray:
    """Eight tokens of the model that keeps its caches."""
    for state in request.query_state():
        name = next(name for name in begin if state.name.startswith(name + "kept") or state.name == name)
        state.state = ov.Tensor(begin[name])
    for step in range(NEW):
        start = now()
        for name, value in feeds(tokens, step).items():
            request.get_tensor(name).data[...] = value
        request.infer(share_outputs=True)
        logits = np.asarray(request.get_tensor("logits").data.copy())
        times.append(now() - start)
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 64])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    made = model()
    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
    for tokens in args.tokens:
        with tempfile.TemporaryDirectory() as folder:
            path = lowered(made, tokens, Path(folder))
            rng = np.random.default_rng(0)
            shape = (1, HEADS, tokens + PROMPT + ROOM, SIZE)
            begin = {
                f"past_{kind}_{i}": rng.standard_normal(shape, np.float32) for i in range(LAYERS) for kind in ("key", "value")
            }
            session = targets.get("openvino").load([path], threads=1)
            request = ov.Core().compile_model(stateful(path, tokens + PROMPT), "CPU", config).create_infer_request()
            times: tuple[Times, Times] = ([], [])
            for turn in range(args.rounds + 1):
                found = [by_hand(session, tokens, begin, times[0]), by_itself(request, tokens, begin, times[1])]
                np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-3 * float(np.abs(found[0]).max()))
                if turn == 0:  # it warms up
                    times[0].clear()
                    times[1].clear()
            session.close()
        print(f"{tokens} visual tokens, caches of {sum(a.nbytes for a in begin.values()) / 2**20:.1f} MiB")
        for unit, clock in enumerate(("clock", "processor")):
            handed, kept = ([float(one[unit]) * 1e3 for one in form] for form in times)
            for label, one in (("inputs and outputs", handed), ("kept by the model", kept)):
                print(f"  {clock:10s}{label:20s} median {statistics.median(one):7.1f} ms  least {min(one):7.1f} ms")
            ratio = statistics.median(kept) / statistics.median(handed)
            print(f"  {clock:10s}kept / handed over: median {ratio:.2f}, least {min(kept) / min(handed):.2f}", flush=True)


if __name__ == "__main__":
    main()
