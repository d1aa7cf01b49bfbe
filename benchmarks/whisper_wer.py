"""Word error rates of a speech model, compressed in front of its decoder by each method for audio at equal token counts.

    python benchmarks/whisper_wer.py MODEL DATA.tsv --target openvino --target onnxruntime

Every spec is exported, and run on every recording of DATA (a table with the columns `file` and `text`), without torch. With
`--reference`, the transcripts of transformers are made first, and the uncompressed ones must be equal to them, token for token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import edgewise
from edgewise.verify.wer import Spoken, read_spoken, word_errors

SPECS = (
    "",
    "adjacent@encoder.out:keep=0.5",
    "tome@encoder.out:keep=0.5",
    "adjacent@encoder.block[0:4]:keep=0.5",
    "tome@encoder.block[0:4]:keep=0.5",
    "avgpool1d@encoder.out",
    "segment-topk@encoder.out:keep=0.5",
    "topk@encoder.out:keep=0.5",
    "random@encoder.out:keep=0.5",
)
"""Half of the tokens. The blocks are those of Whisper tiny."""


def reference(model: str, data: list[Spoken]) -> list[tuple[list[int], str]]:
    """Tokens and texts by transformers, in single precision, greedily."""
    import torch
    import transformers

    from edgewise.runtime.audio import read_audio, resample

    whole: Any = transformers.WhisperForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    made = []
    for one in data:
        wave = resample(*read_audio(one.file), extractor.sampling_rate)
        features = extractor(wave, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
        with torch.no_grad():
            ids = whole.generate(features)[0].tolist()
        made.append((ids, tokenizer.decode(ids, skip_special_tokens=True).strip()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--target", action="append", help="default: onnxruntime")
    parser.add_argument("--spec", action="append", help="instead of the ones above; an empty one is uncompressed")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    data, targets = read_spoken(args.data), args.target or ["onnxruntime"]
    wanted = reference(args.model, data) if args.reference else None
    if wanted is not None:
        errors = word_errors([one.text for one in data], [text for _, text in wanted])
        print(f"{'transformers':42} {'torch':12} {'':>6} {errors.rate:7.2%}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for i, spec in enumerate(SPECS if args.spec is None else args.spec):
            try:
                bundle = edgewise.export(args.model, Path(folder) / str(i), targets=targets, compress=spec or None)
            except edgewise.EdgewiseError as error:
                print(f"{spec:42} {error}", flush=True)
                continue
            for target in targets:
                row(bundle, spec, target, data, args.threads, None if spec else wanted)


def row(
    bundle: Any,
    spec: str,
    target: str,
    data: list[Spoken],
    threads: int | None,
    wanted: list[tuple[list[int], str]] | None,
) -> None:
    """Transcribe all recordings, and print one line."""
    start, made = time.perf_counter(), []
    with edgewise.load(bundle, target, threads=threads) as speech:
        for one in data:
            made.append(speech.generate(one.file))
    errors = word_errors([one.text for one in data], [one.text for one in made])
    count = bundle.manifest.pipeline.media_tokens
    stages = {
        name: statistics.median(t for one in made for t in one.seconds[name]) * 1e3
        for name in ("audio_encoder", "prefill", "decode")
    }
    told = ", ".join(f"{name} {number:.1f} ms" for name, number in stages.items())
    equal = ""
    if wanted is not None:
        ends = bundle.manifest.pipeline.eos_ids
        same = [
            [i for i in one.ids if i not in ends] == ids and one.text == text
            for one, (ids, text) in zip(made, wanted, strict=True)
        ]
        equal = f"; {sum(same)} of {len(same)} transcripts equal those of transformers"
    seconds = time.perf_counter() - start
    print(
        f"{spec or 'uncompressed':42} {target:12} {count:6} {errors.rate:7.2%}  {told}; {seconds:.0f} s{equal}",
        flush=True,
    )


if __name__ == "__main__":
    main()
