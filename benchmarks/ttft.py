"""Time to the first token of a vision-language model with fewer visual tokens, against what its FLOPs promise.

    python benchmarks/ttft.py [SPEC ...] [--rounds N] [--work FOLDER]

A LLaVA of random weights on OpenVINO at fp32: a CLIP tower of 336 pixels, 576 visual tokens, and a Llama of 113 million parameters
in its blocks. It is exported uncompressed and with the specs (default: `visionzip:keep=54,context=10`, 64 tokens), and both
bundles answer the same prompt in turns, with eight tokens, on one thread. Printed: medians and least times of vision encoder,
prefill and decode, the speed-up to the first token against the quotient of FLOPs, and decode's time against that of the
uncompressed. The bar: at least 0.85 of what the FLOPs promise, and decode no slower.

Bundles are kept in `--work` for another run with the same specs. Needs about 4 GB of memory, and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import statistics
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers as hf  # noqa: E402

import edgewise  # noqa: E402
from edgewise.bundle import Bundle  # noqa: E402

DEFAULT = ("visionzip:keep=54,context=10",)
IMAGE, PROMPT, ROOM, NEW = 31999, 32, 16, 8
STAGES = ("vision_encoder", "prefill", "decode")


def model() -> hf.LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6, image_size=336, patch_size=14
    )
    text = hf.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12, vocab_size=32000
    )
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=576)
    ).eval()


def exported(specs: tuple[str, ...], work: Path) -> Bundle:
    """The bundle of some specs, made unless it is there."""
    out = work / hashlib.sha256(" ".join(specs).encode()).hexdigest()[:8]
    if not out.exists():
        made = model()
        gc.collect()
        example = {"pixel_values": torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(1))}
        edgewise.export(
            made,
            out,
            example=example,
            targets=["openvino"],
            compress=specs,
            prompt_tokens=PROMPT,
            new_tokens=ROOM,
            cache=False,
        )
    return Bundle.open(out)


def flops(bundle: Bundle, *roles: str) -> float:
    return sum(float(bundle.manifest.component(role).flops_after or 0) for role in roles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC", default=list(DEFAULT))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", type=Path, help="Keep the bundles here.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        bundles = [exported(specs, work) for specs in ((), tuple(args.specs))]
        report(bundles, *measure(bundles, args.rounds))


def measure(bundles: list[Bundle], rounds: int) -> tuple[list[dict[str, list[float]]], list[list[float]]]:
    """Seconds by bundle: of every run of each stage, and to every first token."""
    image = np.random.default_rng(2).standard_normal((1, 3, 336, 336), np.float32)
    ids = [1, *range(100, 108), IMAGE, *range(200, 216)]
    times: list[dict[str, list[float]]] = [defaultdict(list) for _ in bundles]
    first: list[list[float]] = [[] for _ in bundles]
    loaded = [edgewise.load(bundle, threads=1) for bundle in bundles]
    for turn in range(rounds + 2):
        for pipeline, found, firsts in zip(loaded, times, first, strict=True):
            made = pipeline.generate(input_ids=ids, image=image, max_new_tokens=NEW).seconds
            if turn >= 2:  # the first ones warm up
                for stage in STAGES:
                    found[stage] += made[stage]
                firsts.append(made["vision_encoder"][0] + made["prefill"][0])
    for pipeline in loaded:
        pipeline.close()
    return times, first


def report(bundles: list[Bundle], times: list[dict[str, list[float]]], first: list[list[float]]) -> None:
    for bundle, found in zip(bundles, times, strict=True):
        about = bundle.manifest.pipeline
        assert about is not None
        print(" + ".join(bundle.manifest.compress) or "uncompressed", f"({about.media_tokens} visual tokens)")
        for stage in STAGES:
            median, least = statistics.median(found[stage]) * 1e3, min(found[stage]) * 1e3
            print(f"  {stage:15s} {flops(bundle, stage) / 1e9:8.2f} GFLOPs  median {median:8.1f} ms  least {least:8.1f} ms")
        print(f"  caches          {about.cache_bytes / 2**20:8.1f} MiB")
    ahead = ("vision_encoder", "prefill")
    promised = flops(bundles[0], *ahead) / flops(bundles[1], *ahead)
    for name, pick in (("median", statistics.median), ("least", min)):
        gained = pick(first[0]) / pick(first[1])
        decode = pick(times[1]["decode"]) / pick(times[0]["decode"])
        print(
            f"to the first token ({name}): {gained:.2f}x faster, FLOPs promise {promised:.2f}x: {gained / promised:.2f} of it; "
            f"a decoded token takes {decode:.2f} of the time"
        )


if __name__ == "__main__":
    main()
