"""What each method costs `demo:vqa` in accuracy: the visual tokens compressed at the tower's output, in torch.

    python benchmarks/vqa_compression.py [--questions N] [METHOD ...]

Every method that an image encoder's output allows with no weights or text embedding of its own, at 50, 25 and 11 % of
the 196 visual tokens, without any retraining. The methods are called eagerly (`edgewise.ops.apply`), the tokens that
are left take the places of the image's tokens in the prompt (dense positions), and `generate` answers. Counts that a
method does not have are the nearest ones that it has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from edgewise import demos
from edgewise.demos import scenes
from edgewise.ops import apply

BUDGETS = (98, 49, 22)  # of 196
SIDES = {98: 10, 49: 7, 22: 5}  # of a square of about as many
BATCH = 100


class Seen:
    """What the tower makes of a batch of images: tokens, and the last layer's queries and keys, class token first."""

    def __init__(self, model: LlavaForConditionalGeneration, pixels: Tensor) -> None:
        tower = model.model.vision_tower
        last = [module for name, module in tower.named_modules() if name.endswith("self_attn")][-1]
        made: dict[str, Tensor] = {}
        hooks = [
            projection.register_forward_hook(lambda _, __, output, key=key: made.update({key: output}))
            for key, projection in (("queries", last.q_proj), ("keys", last.k_proj))
        ]
        self.tokens = tower(pixels).last_hidden_state
        for hook in hooks:
            hook.remove()
        self.keys = made["keys"]
        queries, keys = (made[key].unflatten(-1, (last.num_heads, -1)).transpose(1, 2) for key in ("queries", "keys"))
        self.queries = made["queries"]
        self.attention = (queries @ keys.transpose(-1, -2) * last.scale).softmax(-1)


def once(name: str, wanted: Callable[[int], dict[str, Any]], **uses: str) -> Callable[[Seen, int], Tensor]:
    """A method called once; `uses` maps its arguments to what was seen."""

    def call(seen: Seen, keep: int) -> Tensor:
        given = {key: getattr(seen, attribute) for key, attribute in uses.items()}
        return apply(name, seen.tokens, protected=1, **given, **wanted(keep)).tokens[:, 1:]

    return call


def merged(name: str) -> Callable[[Seen, int], Tensor]:
    """Bipartite merging, which halves at most, as often as it takes; sizes are carried on, keys merged alike."""

    def call(seen: Seen, keep: int) -> Tensor:
        tokens, keys, size = seen.tokens, seen.keys, torch.ones_like(seen.tokens[..., :1])
        while (count := tokens.shape[1] - 1) > keep:
            r = min(count // 2, count - keep)
            made = apply(name, tokens, r=r, keys=keys, size=size, protected=1)
            keys = apply("tome", keys, r=r, keys=keys, size=size, protected=1).tokens
            tokens, size = made.tokens, made.size
        return tokens[:, 1:]

    return call


def plain(keep: int) -> dict[str, Any]:
    return {"keep": keep}


def context(keep: int) -> dict[str, Any]:
    """A fifth of the tokens hold the others, as in VisionZip's own setting (54 and 10)."""
    return {"keep": keep - keep // 5, "context": keep // 5}


METHODS: dict[str, Callable[[Seen, int], Tensor]] = {
    "random": once("random", plain),
    "pool": once("pool", lambda keep: {"kind": "adaptive", "side": SIDES[keep]}),
    "merge-grid": once("merge-grid", lambda keep: {"side": SIDES[keep]}),
    "topk": once("topk", plain, attention="attention"),
    "fastervlm": once("fastervlm", plain, attention="attention"),
    "vispruner": once("vispruner", plain, attention="attention"),
    "visionzip": once("visionzip", context, attention="attention", keys="keys"),
    "prumerge": once("prumerge", plain, queries="queries", keys="keys"),
    "tome": merged("tome"),
    "tofu": merged("tofu"),
    "dpcknn": once("dpcknn", plain),
    "divprune": once("divprune", plain),
}


@torch.inference_mode()
def answers(model: LlavaForConditionalGeneration, tokenizer: Any, visual: Tensor, prompts: list[str]) -> list[str]:
    """Greedy answers, with `visual (B, kept, C)` in the place of the image."""
    texts = [prompt.replace("<image>", "<image>" * visual.shape[1]) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == model.config.image_token_id] = model.model.multi_modal_projector(visual).flatten(0, 1)
    made = model.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], max_new_tokens=4, do_sample=False
    )
    return tokenizer.batch_decode(made, skip_special_tokens=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=list(METHODS))
    parser.add_argument("--questions", type=int, default=scenes.TEST)
    parser.add_argument("--model", default=demos.folder("vqa"), help="another folder with a model like demo:vqa")
    args = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    examples = list(scenes.examples("test", args.questions))

    runs = [("none", 196, lambda seen, keep: seen.tokens[:, 1:])]
    runs += [(name, keep, METHODS[name]) for keep in BUDGETS for name in args.methods]
    right, counts = dict.fromkeys([run[:2] for run in runs], 0), {}
    for first in range(0, len(examples), BATCH):
        part = examples[first : first + BATCH]
        pixels = processor.image_processor([e.image for e in part], return_tensors="pt")["pixel_values"]
        seen = Seen(model, pixels)
        for name, keep, method in runs:
            visual = method(seen, keep)
            counts[name, keep] = visual.shape[1]
            said = answers(model, processor.tokenizer, visual, [e.prompt for e in part])
            right[name, keep] += int(np.sum([a == e.answer for a, e in zip(said, part, strict=True)]))

    full = right["none", 196] / len(examples)
    print(f"{len(examples)} questions, uncompressed (196 tokens): {full:.1%}\n")
    print(f"{'method':12s}" + "".join(f"{keep / 196:>14.0%}       " for keep in BUDGETS))
    for name in args.methods:
        cells = (
            f"{right[name, keep] / len(examples):14.1%} ({counts[name, keep]:3d})"
            + ("*" if right[name, keep] / len(examples) >= full - 0.02 else " ")
            for keep in BUDGETS
        )
        print(f"{name:12s}" + "".join(cells))
    print("\nIn brackets: tokens that are left. *: within 2 points of uncompressed.")


if __name__ == "__main__":
    main()
