"""Train the `demo:vqa` model: a small LLaVA that answers questions about drawn scenes.

Data: drawn by `edgewise.demos.scenes`, endless for training; the test split has seeds of its own, so that no scene
of it takes part in training. Nothing is downloaded.

As LLaVA's own recipe has it, the tower is trained first, and stays as it is while projector and decoder learn to
answer. What makes that quick: the tower is told what lies under every patch and the decoder what every noun refers to
(`vqa_labels.py`); sixteen questions share the image that they ask about; and most steps see a part of the patches,
ground left out first. The model is an ordinary Hugging Face model, and stays one.

    python examples/train_vqa.py --out edgewise/demos/vqa
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from training import PatchDropout
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast
from vqa_labels import NounHead, Nouns, Patches, PatchHead
from vqa_model import make_model, make_processor

from edgewise.demos import scenes

VALIDATION = 2**30  # train scenes from here on are for validation
QUESTIONS = 16  # about every scene


class Scenes:
    """Batches of new scenes, with the labels of their patches and with questions."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, first: int = 0) -> None:
        self.tokenizer, self.next = tokenizer, first

    def draw(self, count: int, questions: int = 0) -> tuple[Tensor, Patches, Questions | None]:
        """Images `(count, 3, 112, 112)` normalised, what lies under their patches, and questions about each."""
        images, labels, asked, seen = [], [], [], []
        for index in range(self.next, self.next + count):
            random, things, image = scenes.scene("train", index)
            images.append(image)
            labels.append(Patches.of(things))
            for number in range(questions):
                turn = (scenes.ask(random, things, scenes.KINDS[(number + k) % 5]) for k in range(5))
                asked.append(next(question for question in turn if question is not None))
                seen.append(things)
        self.next += count
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels, Patches.stack(labels), self._encode(asked, seen) if asked else None

    def _encode(self, asked: list[scenes.Question], seen: list[list[scenes.Thing]]) -> Questions:
        after = scenes.PROMPT.partition("<image>")[2]
        asking = self.tokenizer([after.format(question=q.text) for q in asked], add_special_tokens=False)["input_ids"]
        answer = self.tokenizer([q.answer for q in asked], add_special_tokens=False)["input_ids"]
        length = max((len(a) + len(b) + 1 for a, b in zip(asking, answer, strict=True)))
        ids = torch.full((len(asked), length), self.tokenizer.pad_token_id)
        is_answer = torch.zeros(len(asked), length, dtype=torch.bool)
        nouns = Nouns([], [], [], [])
        for row, (a, b) in enumerate(zip(asking, answer, strict=True)):
            text = [*a, *b, self.tokenizer.eos_token_id]
            ids[row, : len(text)] = torch.tensor(text)
            is_answer[row, len(a) : len(text)] = True
            nouns.add(row, self.tokenizer.convert_ids_to_tokens(a), seen[row])
        return Questions([q.kind for q in asked], ids, is_answer, nouns)


@dataclass
class Questions:
    """Questions with their answers, as many for each image: token ids `(questions, length)`, padded behind, which of
    them are the answer, and the nouns."""

    kinds: list[str]
    ids: Tensor
    is_answer: Tensor
    nouns: Nouns


def answer(
    model: LlavaForConditionalGeneration, start: Tensor, tokens: Tensor, places: Tensor, asked: Questions
) -> tuple[Tensor, Tensor]:
    """Logits for the tokens of all answers, and the hidden states `(questions, length, width)` in mid-decoder.

    `start` are the ids before the image, `tokens (images, kept, width)` the visual ones and `places` their positions.
    The image goes through the decoder once; the questions about it follow, each from a copy of its cache.
    """
    images, decoder = len(tokens), model.model.language_model
    questions, length = asked.ids.shape
    before = decoder.embed_tokens(start).expand(images, -1, -1)
    shared = torch.cat((before, model.model.multi_modal_projector(tokens)), dim=1)
    positions = torch.cat((torch.arange(len(start)).expand(images, -1), places), dim=1)
    # A mask of ones: without a mask, gaps in the positions would be taken for the borders of packed sequences.
    ones = torch.ones(questions, shared.shape[1] + length, dtype=torch.long)
    cache = decoder(
        inputs_embeds=shared, attention_mask=ones[:images, : shared.shape[1]], position_ids=positions, use_cache=True
    ).past_key_values
    copies = questions // images
    cache.batch_repeat_interleave(copies)
    behind = positions[:, -1:].repeat_interleave(copies, 0) + 1 + torch.arange(length)
    output = decoder(
        inputs_embeds=decoder.embed_tokens(asked.ids),
        attention_mask=ones,
        position_ids=behind,
        past_key_values=cache,
        output_hidden_states=True,
    )
    # The logits for a token stand at the token before it.
    wanted = output.last_hidden_state[:, :-1][asked.is_answer[:, 1:]]
    return model.lm_head(wanted), output.hidden_states[2]


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The tower's last hidden states of the patches, and its pooled class token."""
    output = model.model.vision_tower(pixels)
    return output.last_hidden_state[:, 1:], output.pooler_output


def drop(tokens: Tensor, patches: Patches, start: int, all_stay: bool) -> tuple[Tensor, Tensor]:
    """25 to 50 % of the visual tokens and their positions, or all of them.

    Patches with a thing on them stay more often. Positions are those in the whole image, or dense: half and half.
    """
    images, total, width = tokens.shape
    if all_stay:
        return tokens, (start + torch.arange(total)).expand(images, -1)
    count = round(total * (0.25 + 0.25 * torch.rand(()).item()))
    kept = (torch.rand(images, total) + importance(patches)).topk(count, dim=1).indices.sort(dim=1).values
    places = kept if torch.rand(()) < 0.5 else torch.arange(count).expand(images, -1)
    return tokens.gather(1, kept[..., None].expand(-1, -1, width)), start + places


def importance(patches: Patches) -> Tensor:
    """What is added to a patch's random draw, which decides whether it is seen: `(images, patches)`."""
    return 0.7 * (patches.colour > 0) + 0.5 * patches.centre


class Trainer:
    """AdamW over some parameters, its rate warmed up, then constant, and going down to 0 in the last 30 % of `steps`.

    `done` steps were made by an earlier run.
    """

    def __init__(self, modules: list[nn.Module], steps: int, rate: float, done: int = 0) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]
        decayed = [p for p in self.parameters if p.ndim >= 2]
        plain = [p for p in self.parameters if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / 50, (steps - done - step) / (0.3 * steps))
        )

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


@torch.no_grad()
def start_projector(model: LlavaForConditionalGeneration, data: Scenes) -> None:
    """Start the projector from what can be read off the visual tokens.

    The tower's tokens are mostly a mean that all share, and shape and size are a few per cent of what differs: a
    projector that starts at random leaves them too small for attention to find. Least squares says which directions
    hold the labels; all labels are given the same spread, and the first layer mixes them at random.
    """
    pixels, patches, _ = data.draw(200)
    tokens = torch.cat([see(model, part)[0] for part in pixels.split(50)]).flatten(0, 1).double()
    on = (patches.colour > 0).flatten().double()
    even = on / on.sum() + (1 - on) / (1 - on).sum()
    whole, mean = readout(tokens, torch.stack((on, patches.centre.flatten().double()), 1), even)
    kinds, middle = readout(tokens, patches.features().flatten(0, 1).double(), on)
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    read = torch.cat((whole, kinds), 1)
    mix = torch.randn(first.out_features, read.shape[1]).double() / 4
    first.weight.copy_(mix @ read.T)
    first.bias.copy_(-(mix @ torch.cat((mean @ whole, middle @ kinds))))
    nn.init.normal_(second.weight, std=second.in_features**-0.5)


def readout(tokens: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map from tokens `(n, width)` to labels `(n, k)` by weighted least squares, each of its outputs scaled to
    a variance of 1, and the mean token."""
    weight = (weight / weight.sum())[:, None]
    mean = (weight * tokens).sum(0)
    centred = tokens - mean
    gram = centred.T @ (weight * centred)
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    read = torch.linalg.solve(gram + ridge, centred.T @ (weight * labels))
    return read / (weight * (centred @ read) ** 2).sum(0).sqrt(), mean


def train_tower(model: LlavaForConditionalGeneration, data: Scenes, steps: int, out: Path) -> None:
    """The first stage. The tower sees a part of the patches, and all of them in the last quarter."""
    tower = model.model.vision_tower
    head = PatchHead(model.config.vision_config.hidden_size)
    trainer = Trainer([tower, head], steps, 2e-3)
    shown: Patches
    dropout = PatchDropout(special=1, keep=(0.3, 0.5), importance=lambda pixels: importance(shown))
    embeddings = next(module for name, module in tower.named_modules() if name.endswith("embeddings"))
    hook = embeddings.register_forward_hook(dropout)
    tower.train()
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        dropout.active = step < 0.75 * steps
        pixels, shown, _ = data.draw(16)
        losses = head(*see(model, pixels), shown.take(dropout.kept))
        trainer.step(sum(losses.values()) + losses["shape"])
        if step % 20 == 0:
            parts = "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            print(f"tower {step}/{steps}  {parts}  {time.perf_counter() - begin:.0f} s", flush=True)
            model.save_pretrained(out)
    hook.remove()
    tower.eval().requires_grad_(False)


def train_decoder(model: LlavaForConditionalGeneration, data: Scenes, out: Path, steps: int, done: int) -> None:
    """The second stage: projector and decoder learn to answer; the model is saved every 100 steps."""
    parts = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    head = NounHead(model.config.text_config.hidden_size)
    trainer = Trainer([*parts, head], steps, 1.5e-3, done)
    start = data.tokenizer("USER: ", return_tensors="pt")["input_ids"][0]
    held_out = Scenes(data.tokenizer, VALIDATION).draw(50, QUESTIONS)
    begin, total, other = time.perf_counter(), 0.0, 0.0
    for step in range(done + 1, steps + 1):
        pixels, patches, asked = data.draw(8, QUESTIONS)
        with torch.no_grad():
            tokens, _ = see(model, pixels)
        all_stay = step > 0.9 * steps or torch.rand(()).item() < 0.1
        logits, hidden = answer(model, start, *drop(tokens, patches, len(start), all_stay), asked)
        loss, aside = functional.cross_entropy(logits, asked.ids[asked.is_answer]), head(hidden, asked.nouns)
        trainer.step(loss + 0.5 * aside)
        total, other = total + loss.item(), other + aside.item()
        if step % 20 == 0:
            seconds = time.perf_counter() - begin
            print(f"step {step}/{steps}  loss {total / 20:.4f}  nouns {other / 20:.4f}  {seconds:.0f} s", flush=True)
            total = other = 0.0
        if step % 100 == 0 or step == steps:
            print("  held out, all tokens:", validate(model, start, *held_out), flush=True)
            model.save_pretrained(out)


@torch.inference_mode()
def validate(
    model: LlavaForConditionalGeneration, start: Tensor, pixels: Tensor, patches: Patches, asked: Questions
) -> str:
    """The share of wholly right answers by kind of question, the tokens before each given (teacher forcing)."""
    tokens, _ = see(model, pixels)
    logits, _ = answer(model, start, *drop(tokens, patches, len(start), True), asked)
    hits = torch.ones_like(asked.is_answer)
    hits[asked.is_answer] = logits.argmax(-1) == asked.ids[asked.is_answer]
    right, count = Counter(), Counter()
    for kind, hit in zip(asked.kinds, hits.all(-1).tolist(), strict=True):
        right[kind] += hit
        count[kind] += 1
    shares = "  ".join(f"{kind} {right[kind] / count[kind]:.3f}" for kind in scenes.KINDS)
    return f"{right.total() / count.total():.4f}  ({shares})"


@torch.inference_mode()
def accuracy(folder: Path, count: int = scenes.TEST) -> tuple[float, dict[str, float]]:
    """Share of the test questions whose generated answer is right, over all and by kind, read back from `folder`."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = make_processor(folder)
    examples = list(scenes.examples("test", count))
    right, seen = Counter(), Counter()
    for first in range(0, len(examples), 50):
        part = examples[first : first + 50]
        inputs = processor(
            images=[e.image for e in part], text=[e.prompt for e in part], return_tensors="pt", padding=True
        )
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for example, answer in zip(part, processor.batch_decode(made, skip_special_tokens=True), strict=True):
            right[example.kind] += answer == example.answer
            seen[example.kind] += 1
    return right.total() / seen.total(), {kind: right[kind] / seen[kind] for kind in scenes.KINDS}


def main() -> None:
    """Train, save the model, and print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--tower-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--start", type=Path, help="go on from the folder of an earlier run, with its tower as it is")
    parser.add_argument("--done", type=int, default=0, help="steps of the second stage that the earlier run made")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    args.out.mkdir(parents=True, exist_ok=True)
    processor = make_processor()
    processor.save_pretrained(args.out)
    processor.image_processor.save_pretrained(args.out)
    model = make_model(processor.tokenizer)
    data = Scenes(processor.tokenizer)
    if args.start:
        model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(args.start).state_dict())
        model.model.vision_tower.eval().requires_grad_(False)
        data.next = args.tower_steps * 16 + args.done * 8
    else:
        train_tower(model, data, args.tower_steps, args.out)
    if not args.done:
        start_projector(model, data)
    train_decoder(model, data, args.out, args.steps, args.done)
    # Half of the bytes; the configuration says fp32, in which the model is loaded.
    model.save_pretrained(args.out, state_dict={key: value.half() for key, value in model.state_dict().items()})
    total, by_kind = accuracy(args.out)
    print(f"test accuracy {total:.4f} on {scenes.TEST} questions:", by_kind)


if __name__ == "__main__":
    main()
