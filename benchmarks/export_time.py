"""What compression and verification add to the time and peak memory of an export, against torch.export + convert_model.

    python benchmarks/export_time.py [--rounds 3]

ViT-B/16, OpenVINO. Each run is a process of its own; the two kinds take turns. The time is that of the export alone
(imports and making the model are left out); memory is the process's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

_SETUP = """
import json, resource, sys, tempfile, time
import torch, transformers, openvino
torch.manual_seed(0)
model = transformers.ViTModel(transformers.ViTConfig()).eval()
image = torch.randn(1, 3, 224, 224)
with torch.no_grad():
    model(image)
"""
_PLAIN = (
    _SETUP
    + """
cpu, start = time.process_time(), time.perf_counter()
program = torch.export.export(model, (), {"pixel_values": image}, strict=False)
openvino.convert_model(program)
taken, worked = time.perf_counter() - start, time.process_time() - cpu
"""
)
_OURS = (
    _SETUP
    + """
import edgewise
import edgewise.exporter.export
cpu, start = time.process_time(), time.perf_counter()
with tempfile.TemporaryDirectory() as folder:
    edgewise.export(model, folder + "/b", example={"pixel_values": image}, targets=["openvino"], compress="tome:keep=0.5",
                    cache=False)
    taken, worked = time.perf_counter() - start, time.process_time() - cpu
"""
)
_REPORT = """
print(json.dumps({"seconds": taken, "cpu_seconds": worked, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def run(code: str) -> dict[str, float]:
    """One run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + _REPORT], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    plain, ours = [], []
    for _ in range(rounds):
        plain.append(run(_PLAIN))
        ours.append(run(_OURS))
    print("| | plain | edgewise | ratio (medians) | ratio (minimums) |\n|---|---|---|---|---|")
    for key in ("seconds", "cpu_seconds", "peak_mb"):
        a, b = [r[key] for r in plain], [r[key] for r in ours]
        print(
            f"| {key} | {statistics.median(a):.1f} | {statistics.median(b):.1f} | "
            f"{statistics.median(b) / statistics.median(a):.2f} | {min(b) / min(a):.2f} |"
        )


if __name__ == "__main__":
    main()
