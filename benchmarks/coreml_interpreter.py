"""How long the interpreter of Core ML packages takes beside eager PyTorch: ViT-B/16, one thread, the two in turn.

    OMP_NUM_THREADS=1 python benchmarks/coreml_interpreter.py [--precision fp16] [--rounds 5] [--layers 12]

The package is converted and first run in processes of their own, so that the peak memory that is printed is that of running it.
Torch and numpy both compute in one thread: numpy's BLAS takes its number from the environment, set before it is imported.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np


def convert(path: Path, precision: str, layers: int) -> None:
    """Write the package of a ViT-B/16 with random weights."""
    import coremltools as ct
    import torch

    model, image = vit(layers)
    exported = torch.export.export(model, (image,), strict=False).run_decompositions({})
    dtype = np.float16 if precision == "fp16" else np.float32
    ct.convert(
        exported,
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
        inputs=[ct.TensorType(name="pixels", shape=image.shape, dtype=dtype)],
        outputs=[ct.TensorType(name="tokens", dtype=dtype)],
        skip_model_load=True,
    ).save(str(path))


def vit(layers: int):  # type: ignore[no-untyped-def]
    """The model and an image, the same every time."""
    import torch
    import transformers

    class Tokens(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=pixels).last_hidden_state

    torch.manual_seed(0)
    config = transformers.ViTConfig(num_hidden_layers=layers)
    return Tokens(transformers.ViTModel(config, add_pooling_layer=False)).eval(), torch.randn(1, 3, 224, 224)


def memory() -> float:
    """Peak resident memory of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def interpret(path: Path) -> None:
    """In a process without torch: run twice, and print the peak memory and where the time goes."""
    from edgewise.targets.coreml.session import InterpreterSession

    start = time.perf_counter()
    session = InterpreterSession(path)
    info = session.inputs[0]
    x = np.random.default_rng(0).standard_normal(info.shape).astype(info.dtype)
    session.run({info.name: x})
    print(f"open and first run   {time.perf_counter() - start:8.2f} s")
    print(f"peak memory          {memory():8.2f} GB")
    spent: dict[str, float] = defaultdict(float)
    kinds = {name: step.kind for step in session.program.block.steps for name, _ in step.outputs}
    last = time.perf_counter()

    def watch(name: str, array: np.ndarray) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[kinds[name]] += now - last
        last = now

    session.run({info.name: x}, watch=watch)
    for kind, seconds in sorted(spent.items(), key=lambda one: -one[1])[:8]:
        print(f"  {kind:30} {seconds * 1e3:8.1f} ms")


def compare(path: Path, layers: int, rounds: int) -> None:
    """Torch and the interpreter in turn."""
    import torch

    from edgewise.targets.coreml.session import InterpreterSession

    torch.set_num_threads(1)
    model, image = vit(layers)
    session = InterpreterSession(path)
    feeds = {"pixels": image.numpy().astype(session.inputs[0].dtype)}
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            wanted = model(image).numpy()
            middle = time.perf_counter()
            got = session.run(feeds)["tokens"]
            times[0].append(middle - start)
            times[1].append(time.perf_counter() - middle)
    error = np.abs(got.astype(np.float64) - wanted)
    torch_, ours = (statistics.median(one[1:]) for one in times)
    print(f"eager torch          {torch_ * 1e3:8.1f} ms (median of {rounds})")
    print(f"interpreter          {ours * 1e3:8.1f} ms")
    print(f"ratio                {ours / torch_:8.2f}")
    print(f"max abs difference   {error.max():8.1e}   relative {np.linalg.norm(error) / np.linalg.norm(wanted):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--package", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=["convert", "interpret"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step == "convert":
        convert(given.package, given.precision, given.layers)
        return
    if given.step == "interpret":
        interpret(given.package)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit.mlpackage"
        for step in ("convert", "interpret"):
            again = [sys.executable, __file__, "--step", step, "--package", str(path)]
            again += ["--precision", given.precision, "--layers", str(given.layers)]
            errors = subprocess.DEVNULL if step == "convert" else None
            subprocess.run(again, check=True, stderr=errors)
        compare(path, given.layers, given.rounds)


if __name__ == "__main__":
    main()
