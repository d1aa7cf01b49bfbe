"""How much of the speed-up that the FLOP count promises is measured: ViT-S/16, tokens halved by the end, OpenVINO, one thread.

    python benchmarks/realised_speed.py [--size 224] [--size 384] [--rounds 30] [--compress tome:keep=0.5]

Uncompressed and compressed artifacts run in turn (A, B, A, B, ...). The promise counts matrix products, attention and
convolutions; the compression itself counts as nothing, so that its cost shows as speed that was not realised.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

import edgewise
from edgewise.passes.flops import total_flops
from edgewise.passes.legalise import is_compression_op
from edgewise.passes.program import Program


def vit_small(size: int) -> torch.nn.Module:
    """ViT-S/16 with random weights."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, image_size=size
    )
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def promised(program: Program) -> float:
    """FLOPs of the model's own work, before over after."""
    from edgewise.passes.flops import node_flops

    after = sum(node_flops(n) for n in program.exported.graph.nodes if not is_compression_op(n))
    return total_flops(program.base) / after


def measure(size: int, spec: str, target: str, rounds: int) -> tuple[float, float, float, float, float]:
    """Promise, speed-up by medians and by minimums, and both medians in milliseconds."""
    model, image = vit_small(size), torch.randn(1, 3, size, size)
    program = edgewise.compress(edgewise.capture(model, (), {"pixel_values": image}), spec)
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for name, compress in (("plain", None), ("compressed", spec)):
            bundle = edgewise.export(
                model, Path(folder) / name, example={"pixel_values": image}, targets=[target], compress=compress
            )
            sessions.append(edgewise.load(bundle, threads=1))
        feeds = {"pixel_values": np.asarray(image)}
        times: list[list[float]] = [[], []]
        for round_ in range(rounds + 3):
            for session, taken in zip(sessions, times, strict=True):
                start = time.perf_counter()
                session.run(feeds)
                if round_ >= 3:
                    taken.append(time.perf_counter() - start)
    plain, small = times
    return (
        promised(program),
        statistics.median(plain) / statistics.median(small),
        min(plain) / min(small),
        statistics.median(plain) * 1e3,
        statistics.median(small) * 1e3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compress", default="tome:keep=0.5")
    parser.add_argument("--target", default="openvino")
    options = parser.parse_args()
    print(
        "| image | promised | measured (median) | measured (min) | realised (median) | realised (min) | plain ms | compressed ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size in options.size or [224, 384]:
        promise, median, least, plain, small = measure(size, options.compress, options.target, options.rounds)
        print(
            f"| {size} | {promise:.3f} | {median:.3f} | {least:.3f} | {median / promise:.3f} | {least / promise:.3f} "
            f"| {plain:.1f} | {small:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
