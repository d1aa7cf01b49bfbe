"""What a method costs beside the encoder that it stands in: OpenVINO, one thread, medians of runs in turn.

    python benchmarks/method_cost.py divprune:keep=64 cdpruner:keep=64
    python benchmarks/method_cost.py --encoder vit-b-16 tome:r=16 topk:keep=64 pool
    python benchmarks/method_cost.py

Each method is a graph of its own over random tokens, with all that it computes (similarities, attention rows, the reduction) and
what it would be given (tokens, queries and keys; weights of the shapes that `edgewise fit` makes). It runs in turn with one forward
of the encoder (random weights). A method that goes to every block counts once for each block. Raise --seconds for a quieter number.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from edgewise import targets
from edgewise.errors import InputError
from edgewise.exporter.capture import capture
from edgewise.ops import METHODS, Method, apply
from edgewise.ops.budget import count_to_keep
from edgewise.passes.legalise import Legalise
from edgewise.targets.base import Session


@dataclass(frozen=True)
class Encoder:
    """An encoder of published size: how it is made, its blocks, tokens, features and features of a head."""

    make: Callable[[], nn.Module]
    side: int
    blocks: int
    tokens: int
    width: int
    head: int


def _vit() -> nn.Module:
    config = transformers.ViTConfig()
    return transformers.ViTModel(config, add_pooling_layer=False)


def _clip() -> nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return transformers.CLIPVisionModel(config)


ENCODERS = {"vit-b-16": Encoder(_vit, 224, 12, 196, 768, 64), "clip-l-14-336": Encoder(_clip, 336, 24, 576, 1024, 64)}
GREEDY = ("divprune", "cdpruner")
LIMIT = 0.05


class Call(nn.Module):
    """A method on tokens `(1, N, C)`, queries and keys `(1, heads, N, D)`."""

    def __init__(self, name: str, known: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.known, self.needs = name, known, METHODS[name].needs

    def forward(self, tokens: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        given = dict(self.known)
        if "queries" in self.needs:
            given |= {"queries": queries.transpose(1, 2).flatten(2), "keys": keys.transpose(1, 2).flatten(2)}
        elif "keys" in self.needs:
            given["keys"] = keys.mean(1)
        if "attention" in self.needs:
            given |= {"attention": _Rows(queries, keys)}
        return apply(self.name, tokens, **given).tokens


class _Rows:
    """Attention of which a method takes the rows that it wants."""

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        self.queries, self.keys = queries, keys
        self.shape = (*queries.shape[:3], keys.shape[2])

    def __getitem__(self, where: tuple[Any, ...]) -> Tensor:
        rows = self.queries[:, :, where[2]] if len(where) > 2 else self.queries
        return (rows @ self.keys.transpose(2, 3) * self.keys.shape[-1] ** -0.5).softmax(-1)


def parse(text: str, encoder: Encoder) -> tuple[str, dict[str, Any]]:
    """`METHOD:key=value,...` as the call of that method on the encoder's tokens."""
    from edgewise.passes.plan import parse_spec

    spec = parse_spec(text)
    entry = spec.method
    known = {k: v for k, v in spec.parameters.items() if k not in ("schedule", "prop_attn", "length", "text", "text_tokens")}
    if "text" in entry.needs:
        known["text"] = torch.randn(8, encoder.width, generator=torch.Generator().manual_seed(3))
    side = round(encoder.tokens**0.5)
    if "frames" in entry.needs:
        known.setdefault("grid", (4, side // 2, side // 2))
    elif "grid" in entry.needs:
        known.setdefault("grid", (side, side))
    if "weights" in entry.needs and "weights" not in known:
        known["weights"] = weights(entry, known, encoder)
    if "decoder" in entry.sites and "span" not in known:
        known["span"] = f"8:{encoder.tokens - 32}"
    if "attention" in entry.needs and "span" not in known:
        known["protected"] = 1  # the class token that is attended from
    return entry.name, known


def weights(entry: Method, known: dict[str, Any], encoder: Encoder) -> dict[str, Tensor]:
    """Weights of the shapes that `edgewise fit` makes."""
    assert entry.start is not None
    tokens = torch.randn(2, encoder.tokens, encoder.width, generator=torch.Generator().manual_seed(2))
    given = {p.name: p.default for p in entry.parameters if p.name != "keep"} | known
    grid = known.get("grid")
    keep = count_to_keep(entry, known.get("keep"), None, encoder.tokens, 0, grid, None if grid is None else grid[0], given)
    return {name: weight.value for name, weight in entry.start(tokens, keep, grid, given).items()}


def lowered(module: nn.Module, inputs: dict[str, Tensor], folder: Path, threads: int) -> Session:
    # A file of its own for each: OpenVINO maps weights, and a file that is written over changes under it.
    stem = f"m{len(list(folder.iterdir()))}"
    target = targets.get("openvino")
    exported = torch.export.export(module.eval(), (), inputs, strict=False)
    legal = Legalise(target.realisations)(exported).program
    files = target.lower(legal, folder, stem, precision="fp32", input_names=list(inputs), output_names=["out"])
    return target.load(files, threads=threads)


def encoder_session(encoder: Encoder, folder: Path, threads: int) -> tuple[Session, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    image = {"pixel_values": torch.randn(1, 3, encoder.side, encoder.side)}
    program = capture(encoder.make().eval(), (), image)
    target = targets.get("openvino")
    names = list(program.output_names)
    files = target.lower(program.exported, folder, "e", precision="fp32", input_names=list(image), output_names=names)
    return target.load(files, threads=threads), {k: v.numpy() for k, v in image.items()}


def method_session(text: str, encoder: Encoder, folder: Path, threads: int) -> tuple[Session, dict[str, np.ndarray]]:
    name, known = parse(text, encoder)
    count = encoder.tokens + known.get("protected", 0)
    generator = torch.Generator().manual_seed(1)
    heads = encoder.width // encoder.head
    inputs = {
        "tokens": torch.randn(1, count, encoder.width, generator=generator),
        "queries": torch.randn(1, heads, count, encoder.head, generator=generator),
        "keys": torch.randn(1, heads, count, encoder.head, generator=generator),
    }
    return lowered(Call(name, known), inputs, folder, threads), {k: v.numpy() for k, v in inputs.items()}


def measure(sessions: list[tuple[Session, dict[str, np.ndarray]]], seconds: float, rounds: int) -> list[list[float]]:
    """Times in seconds of each session, all in turn, until both the time and the rounds are spent."""
    times: list[list[float]] = [[] for _ in sessions]
    start = time.perf_counter()
    warm = 1
    while len(times[0]) < rounds or time.perf_counter() - start < seconds:
        for (session, feeds), taken in zip(sessions, times, strict=True):
            before = time.perf_counter()
            session.run(feeds)
            if not warm:
                taken.append(time.perf_counter() - before)
        warm = 0
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="METHOD:key=value,... as for --compress; by default every method")
    parser.add_argument("--encoder", choices=sorted(ENCODERS), default="clip-l-14-336")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="least number of rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder = ENCODERS[options.encoder]
    with tempfile.TemporaryDirectory() as name:
        sessions, texts = [encoder_session(encoder, Path(name), options.threads)], []
        for choices in [[text] for text in options.methods] or [_choices(m, encoder) for m in sorted(METHODS)]:
            reasons = []
            for text in choices:
                try:
                    sessions.append(method_session(text, encoder, Path(name), options.threads))
                    texts.append(text)
                    break
                except (ValueError, InputError) as error:  # another count may be legal
                    if options.methods:
                        raise
                    reasons.append(error)
            else:
                print(f"left out: {choices[0]}: {reasons[0]}".splitlines()[0], file=sys.stderr)
        times = measure(sessions, options.seconds, options.rounds)
    whole = statistics.median(times[0])
    rows = []
    for text, taken in zip(texts, times[1:], strict=True):
        entry = METHODS[text.partition(":")[0].partition("@")[0]]
        sites = encoder.blocks if entry.every_block else 1
        cost = statistics.median(taken)
        rows.append({"method": text, "ms": cost * 1e3, "sites": sites, "share": sites * cost / whole})
    if options.json:
        print(json.dumps({"encoder": options.encoder, "encoder_ms": whole * 1e3, "rounds": len(times[0]), "methods": rows}))
    else:
        print(f"{options.encoder}: {whole * 1e3:.1f} ms (median of {len(times[0])} rounds, {options.threads} thread)\n")
        print("| method | ms | sites | share of the encoder |\n|---|---|---|---|")
        for row in rows:
            mark = "" if row["share"] < LIMIT else " (above 5 %)"
            print(f"| `{row['method']}` | {row['ms']:.2f} | {row['sites']} | {row['share']:.2%}{mark} |")
    return 1 if any(row["share"] >= LIMIT for row in rows) else 0


def _choices(name: str, encoder: Encoder) -> list[str]:
    """Counts to try: for a greedy method the 64 of the requirement; else half, or what a grid or a default gives."""
    counts = [":keep=0.5", "", f":keep={encoder.tokens // 4}", ":q=0.5", ":ratio=0.5"]
    counts = [":keep=64"] if name in GREEDY else counts
    return [name + count for count in counts]


if __name__ == "__main__":
    sys.exit(main())
