"""Time to the first token of one model: edgewise, uncompressed and with fewer visual tokens, against openvino-genai.

    python benchmarks/genai.py model FOLDER            # writes the model of benchmarks/ttft.py, with a tokenizer and a processor
    python benchmarks/genai.py convert FOLDER IR       # in an environment with optimum-intel, openvino-tokenizers and no edgewise
    python benchmarks/genai.py time FOLDER IR [SPEC ...] [--rounds N] [--work BUNDLES]

openvino-genai's pipeline takes models that optimum-intel converted, whose transformers is older than ours: hence three steps. The
same weights, 576 visual tokens, the same prompt, fp32, one thread, runs in turn, and another picture in each round: genai keeps the
cache of a prompt that it has seen. Its own CDPruner is asked for as many tokens as the specs keep; the tokens that it reports say
whether it prunes a model of this kind. Uncompressed, both have to begin with the same word.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import numpy as np  # noqa: E402

SIDE, IMAGE_TOKENS, NEW = 336, 576, 8
WORDS = "what is the colour of the small thing on the left of the large one"


def write_model(folder: Path) -> None:
    """The model as its files were before transformers renamed the tower's weights, which older versions read, too."""
    import tokenizers
    import transformers as hf
    from tokenizers import decoders, models, pre_tokenizers
    from ttft import IMAGE, model

    made = model()
    state = {k.replace("vision_tower.", "vision_tower.vision_model.", 1) if ".vision_model." not in k else k: v
             for k, v in made.state_dict().items()}  # fmt: skip
    made.generation_config.eos_token_id = None
    made.save_pretrained(folder, state_dict=state)
    size = made.config.text_config.vocab_size
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {one: 3 + i for i, one in enumerate(letters)}
    vocab |= {f"word{i}": i for i in range(len(vocab), size) if i != IMAGE} | {"<image>": IMAGE}
    made_of = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made_of.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made_of, additional_special_tokens=["<image>"], **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    text = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
    }
    (folder / "processor_config.json").write_text(json.dumps(text))


def convert(folder: Path, out: Path) -> None:
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForVisualCausalLM
    from transformers import AutoTokenizer

    OVModelForVisualCausalLM.from_pretrained(folder, export=True, compile=False, load_in_8bit=False).save_pretrained(out)
    for model, name in zip(
        convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True), ("tokenizer", "detokenizer"), strict=True
    ):
        openvino.save_model(model, out / f"openvino_{name}.xml")
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / name).exists():
            (out / name).write_text((folder / name).read_text())


class Genai:
    """openvino-genai's pipeline on one thread; `pruned` is the share of visual tokens that its pruner is asked to leave out."""

    def __init__(self, folder: Path, pruned: int = 0) -> None:
        import openvino as ov
        import openvino_genai as genai

        self.pipe = genai.VLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=1, INFERENCE_PRECISION_HINT="f32")
        self.config = genai.GenerationConfig()
        self.config.max_new_tokens, self.config.ignore_eos, self.config.do_sample = NEW, True, False
        if pruned:
            self.config.pruning_ratio = pruned
        self._tensor = ov.Tensor

    def __call__(self, picture: np.ndarray) -> tuple[float, int, str]:
        made = self.pipe.generate(WORDS, images=[self._tensor(picture[None])], generation_config=self.config)
        return made.perf_metrics.get_ttft().mean / 1e3, made.perf_metrics.get_num_input_tokens(), made.texts[0]


class Ours:
    def __init__(self, folder: Path, specs: tuple[str, ...], work: Path) -> None:
        import hashlib

        import edgewise

        out = work / hashlib.sha256(" ".join(specs).encode()).hexdigest()[:8]
        if not out.exists():
            edgewise.export(str(folder), out, compress=specs, prompt_tokens=96, new_tokens=16, cache=False)
        bundle = edgewise.Bundle.open(out)
        assert bundle.manifest.pipeline is not None
        self.tokens = bundle.manifest.pipeline.media_tokens
        self.pipeline: Any = edgewise.load(bundle, threads=1)

    def __call__(self, picture: np.ndarray) -> tuple[float, int, str]:
        made = self.pipeline.generate(f"<image>{WORDS}", picture, max_new_tokens=NEW)
        tokens = self.tokens + len(WORDS)  # the tokenizer knows letters alone
        return made.seconds["vision_encoder"][0] + made.seconds["prefill"][0], tokens, made.text


def timed(folder: Path, converted: Path, specs: tuple[str, ...], rounds: int, work: Path) -> None:
    ours = {"edgewise, uncompressed": Ours(folder, (), work), f"edgewise, {' + '.join(specs)}": Ours(folder, specs, work)}
    kept = next(reversed(ours.values())).tokens
    pruned = round(100 * (1 - kept / IMAGE_TOKENS))
    runs: dict[str, Any] = {**ours, "openvino-genai, uncompressed": Genai(converted),
                            f"openvino-genai, pruning_ratio={pruned}": Genai(converted, pruned)}  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in runs}
    tokens, said = dict[str, int](), dict[str, str]()
    for turn in range(rounds + 1):
        picture = np.random.default_rng(turn).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        for name, run in runs.items():
            seconds, tokens[name], said[name] = run(picture)
            if turn:  # the first one warms up
                times[name].append(seconds)
        # The first token alone: with random weights the next ones are near ties.
        if len({said[f"{who}, uncompressed"].split("word")[1] for who in ("edgewise", "openvino-genai")}) > 1:
            raise SystemExit(f"not the same model: {said}")
    base = times["openvino-genai, uncompressed"]
    print(f"{rounds} rounds in turn, one thread, to the first token; ratios are genai's time, uncompressed, to this\n")
    print("| run | tokens of the prompt | median ms | least ms | ratio of medians | of least times |\n|---|---|---|---|---|---|")
    for name, found in times.items():
        median, least = statistics.median(found), min(found)
        ratios = f"{statistics.median(base) / median:.2f} | {min(base) / least:.2f}"
        print(f"| {name} | {tokens[name]} | {median * 1e3:.1f} | {least * 1e3:.1f} | {ratios} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("model").add_argument("folder", type=Path)
    for name in ("convert", "time"):
        verb = verbs.add_parser(name)
        verb.add_argument("folder", type=Path)
        verb.add_argument("ir", type=Path)
    verb.add_argument("specs", nargs="*", metavar="SPEC", default=["visionzip:keep=54,context=10"])
    verb.add_argument("--rounds", type=int, default=9)
    verb.add_argument("--work", type=Path, help="Keep the bundles here.")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if args.verb == "model":
        write_model(args.folder)
    elif args.verb == "convert":
        convert(args.folder, args.ir)
    else:
        with tempfile.TemporaryDirectory() as place:
            timed(args.folder, args.ir, tuple(args.specs), args.rounds, args.work or Path(place))


if __name__ == "__main__":
    main()
