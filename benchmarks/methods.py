"""Every method on a model of its modality at its published size, exported to both targets: the errors of the artifacts.

    python benchmarks/methods.py [METHOD ...]

The models are those of `tests/families.py` (real weights where they are at hand) and, for decoders, a small Llama.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from families import build
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import edgewise
from edgewise.ops import METHODS

IMAGE, VIDEO, AUDIO, DECODER = "siglip", "videomae", "whisper", "llama"
SPECS = {
    IMAGE: [
        *("tome:keep=0.5", "tofu:keep=0.5", "topk@encoder.block[5]:keep=0.5", "dpcknn@encoder.block[5]:keep=64"),
        *("divprune@encoder.block[5]:keep=64", "cdpruner@encoder.block[5]:keep=64", "text-topk@encoder.block[5]:keep=64"),
        *("visionzip@encoder.block[5]:keep=54", "vispruner@encoder.block[5]:keep=128", "prumerge@encoder.block[5]:keep=72"),
        *("trim@encoder.block[5]:keep=64", "random@encoder.block[5]:keep=0.5", "pool@encoder.out:stride=2"),
        *("merge-grid@encoder.out:side=8", "fastervlm@encoder.block[5]:keep=0.25"),
    ],
    VIDEO: [
        *("evs@encoder.out:keep=0.5", "dycoke@encoder.out", "vidcom2@encoder.out:keep=0.25", "tome16@encoder.out"),
        *("framefusion@encoder.out:ratio=0.5", "tempme@encoder.block[2]:keep=0.5", "pool3d@encoder.out", "slowfast@encoder.out"),
        *("frame-pool@encoder.out", "frame-topk@encoder.block[2]:keep=0.5", "frame-visionzip@encoder.block[2]:keep=432"),
        "hired@encoder.block[2]:keep=0.5",
    ],
    AUDIO: [
        *("adjacent:keep=0.5", "segment-topk@encoder.out:keep=0.25", "stack@encoder.out", "avgpool1d@encoder.out"),
    ],
    DECODER: [
        *("fastv@decoder.block[2]:keep=64,span=35:611", "pyramiddrop:span=35:611", "sparsevlm:span=35:611"),
        "dart@decoder.block[2]:keep=64,span=35:611",
    ],
}


class LastHidden(nn.Module):
    """The model's tokens alone, so that methods at its output change an output of the graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self.model(**inputs).last_hidden_state


def made(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    if name != DECODER:
        model, inputs = build(name, small=False)
        return LastHidden(model).eval(), inputs
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=9,
                         num_key_value_heads=3, vocab_size=1000, use_cache=False)  # fmt: skip
    return LlamaForCausalLM(config).eval(), {"inputs_embeds": torch.randn(1, 640, 576)}


def row(name: str, spec: str) -> str:
    start = time.perf_counter()
    model, inputs = made(name)
    try:
        with tempfile.TemporaryDirectory() as folder:
            bundle = edgewise.export(model, Path(folder) / "b", example=inputs, targets=["openvino", "onnxruntime"],
                                     compress=spec, cache=False)  # fmt: skip
    except edgewise.EdgewiseError as error:
        return f"| {spec} | {name} | | {type(error).__name__}: {str(error).splitlines()[0]} |"
    rungs = [r for r in bundle.manifest.verification if r.kind == "lowering"]
    figures = ", ".join(f"{r.name.split('/')[0]} {max(e.relative or 0.0 for e in r.outputs.values()):.1e}" for r in rungs)
    sites = bundle.manifest.components[0].sites
    counts = f"{sites[0].tokens_in} -> {sites[-1].tokens_out}"
    return f"| {spec} | {name} | {counts} | {figures} ({time.perf_counter() - start:.0f} s) |"


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*")
    wanted = parser.parse_args().methods
    named = [(name, spec) for name, specs in SPECS.items() for spec in specs]
    left = set(METHODS) - {spec.partition("@")[0].partition(":")[0] for _, spec in named}
    print("| compression | model | tokens | largest relative error |\n|---|---|---|---|", flush=True)
    for name, spec in named:
        if not wanted or spec.partition("@")[0].partition(":")[0] in wanted:
            print(row(name, spec), flush=True)
    if not wanted:
        print(f"Not here, as they need a file, or a model whose next layer takes more features: {', '.join(sorted(left))}")


if __name__ == "__main__":
    main()
