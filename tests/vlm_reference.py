"""Small vision-language models, and an eager implementation of compression in them that shares nothing with edgewise: attention
with maps, tokens in the order of the sequence, no caches: every new token runs the whole sequence again."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

IMAGE, VIDEO = 99, 98
WORDS = 100


def text_config(kind: Any = hf.LlamaConfig, **more: Any) -> Any:
    return kind(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        max_position_embeddings=256,
        # Large weights: the text is no loop of a few tokens.
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        **more,
    )


def vision_config(kind: Any = hf.CLIPVisionConfig, **more: Any) -> Any:
    sizes = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 4} | more
    return kind(hidden_size=32, intermediate_size=64, num_attention_heads=2, initializer_range=0.2, **sizes)


def llava() -> Any:
    torch.manual_seed(0)
    config = hf.LlavaConfig(vision_config=vision_config(), text_config=text_config(), image_token_id=IMAGE, image_seq_length=64)
    return hf.LlavaForConditionalGeneration(config).eval()


def greedy(model: Any, pixels: Tensor, before: list[int], after: list[int], count: int, new: int, **more: Any) -> list[int]:
    """What the model itself generates, told of its tokens what the model's processor would say."""
    return greedy_of_several(model, pixels, [before, after], count, new, **more)


def greedy_of_several(
    model: Any, pixels: Tensor, texts: list[list[int]], count: int, new: int, *, video: bool = False, **more: Any
) -> list[int]:
    """The same for a prompt with images, or a video, of `count` tokens each between its texts."""
    media = VIDEO if video else IMAGE
    ids = torch.tensor([[*texts[0], *(token for text in texts[1:] for token in (*[media] * count, *text))]])
    model.generation_config.eos_token_id = None
    takes, marks = inspect.signature(model.forward).parameters, (ids == media).long() * (1 + video)
    more["pixel_values_videos" if video else "pixel_values"] = pixels
    if "mm_token_type_ids" in takes:
        more["mm_token_type_ids"] = marks
    elif "token_type_ids" in takes:
        more["token_type_ids"] = marks if "Gemma3" in type(model).__name__ else torch.zeros_like(ids)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **more
        )
    return made[0, ids.shape[1] :].tolist()


@dataclass(frozen=True)
class Compression:
    """VisionZip behind block `tower` of the encoder, then methods in front of blocks of the decoder: `stages` says which, and how
    many visual tokens are kept there."""

    tower: int
    dominant: int
    context: int
    stages: dict[int, tuple[str, int]]


def zipped(model: Any, pixels: Tensor, how: Compression) -> Tensor:
    """The tokens of an image `(K, C)`: dominant ones in their order, then context tokens, projected."""
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    layer = tower.encoder.layers[how.tower]
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda m, a, out: seen.update(out=out[0] if isinstance(out, tuple) else out)),
        layer.self_attn.register_forward_hook(lambda m, a, out: seen.update(attention=out[1])),
        layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: seen.update(keys=out)),
    ]
    model.set_attn_implementation("eager")
    model.model.vision_tower(pixels)
    for handle in handles:
        handle.remove()
    heads = layer.self_attn.num_heads
    hidden, lost = seen["out"].reshape(-1, seen["out"].shape[-1]), int(hasattr(tower.embeddings, "class_embedding"))
    keys = seen["keys"].reshape(len(hidden), heads, -1).mean(dim=1)[lost:]
    if lost:  # what the class token attends to
        hidden, attention = hidden[1:], seen["attention"][0].mean(dim=0)[0, 1:]
    else:  # what all attend to, behind the last norm
        hidden, attention = tower.post_layernorm(hidden), seen["attention"][0].mean(dim=(0, 1))
    keys = keys / keys.norm(dim=-1, keepdim=True)
    best = sorted(attention.argsort(descending=True, stable=True)[: how.dominant].tolist())
    rest = [i for i in range(len(hidden)) if i not in best]
    targets = [rest[n * (len(rest) // how.context)] for n in range(how.context)]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in members:
            members[max(targets, key=lambda t: float(keys[i] @ keys[t]))].append(i)
    folded = [hidden[t] + (hidden[group].mean(dim=0) if group else 0) for t, group in members.items()]
    return model.model.multi_modal_projector(torch.stack([*hidden[best], *folded])[None])[0]


class Compressed:
    """A decoder that drops tokens in front of some blocks, written out block by block."""

    def __init__(self, model: Any, how: Compression) -> None:
        model.set_attn_implementation("eager")
        self.model, self.decoder, self.how = model, model.get_decoder(), how

    def generate(self, visual: Tensor, before: list[int], after: list[int], new: int) -> list[int]:
        embed = self.model.get_input_embeddings()
        parts = [embed(torch.tensor(before, dtype=torch.int64)), visual, embed(torch.tensor(after, dtype=torch.int64))]
        prompt = torch.cat(parts)
        self.span = range(len(before), len(before) + len(visual))
        kept: dict[int, list[int]] = {}
        tokens: list[int] = []
        for _ in range(new):
            x = torch.cat([prompt, embed(torch.tensor(tokens, dtype=torch.int64))])[None]
            self.given = x[0]
            places = list(range(x.shape[1]))  # in the sequence; `numbers` are their positions
            numbers = places
            for i, layer in enumerate(self.decoder.layers):
                if i in self.how.stages:
                    method, keep = self.how.stages[i]
                    if i not in kept:  # while the prompt is read
                        kept[i] = self._chosen(method, keep, layer, x, places, numbers)
                    stay = [n for n, place in enumerate(places) if place not in self.span or place in kept[i]]
                    x, places, numbers = x[:, stay], [places[n] for n in stay], [numbers[n] for n in stay]
                    if method == "pyramiddrop":
                        numbers = list(range(len(stay)))
                x = self._block(layer, x, numbers)
            logits = self.model.lm_head(self.decoder.norm(x[:, -1]))
            tokens.append(int(logits[0].argmax()))
        return tokens

    def _chosen(
        self, method: str, keep: int, layer: Any, x: Tensor, places: list[int], numbers: list[int]
    ) -> list[int]:
        """The places of the visual tokens that stay."""
        image = [n for n, place in enumerate(places) if place in self.span]
        text = [n for n, place in enumerate(places) if place >= self.span.stop]
        if method == "dart":
            return sorted(places[n] for n in self._dart(x[0], image, text, keep))
        if method == "pyramiddrop":
            self._block(layer, x, numbers)
        if method == "sparsevlm":
            # Text that rates is chosen by what the decoder is given, all visual tokens included.
            relevance = (self.given[self.span] @ self.given[self.span.stop :].T).softmax(dim=-1).mean(dim=0)
            raters = [n for n, value in zip(text, relevance, strict=True) if value > relevance.mean()] or text
            score = self.map[0][:, raters][:, :, image].mean(dim=(0, 1))
        else:
            score = self.map[0].mean(dim=0)[-1, image]
        return sorted(places[image[int(n)]] for n in score.argsort(descending=True, stable=True)[:keep])

    def _dart(self, x: Tensor, image: list[int], text: list[int], keep: int) -> list[int]:
        norm = self.keys.abs().sum(dim=(0, 2))

        def largest(of: list[int]) -> list[int]:
            return sorted(of, key=lambda n: -float(norm[n]))[:4]

        chosen, words = largest(image)[:keep], largest(text)
        pivots = [*chosen, *words, *[words[0]] * (4 - len(words))]
        share, more = divmod(keep - len(chosen), len(pivots))
        for turn, pivot in enumerate(pivots):
            free = [n for n in image if n not in chosen]
            unlike = sorted(free, key=lambda n: float(torch.cosine_similarity(x[n], x[pivot], dim=0)))
            chosen += unlike[: share + (turn < more)]
        return chosen

    def _block(self, layer: Any, x: Tensor, numbers: list[int]) -> Tensor:
        count, position = len(numbers), torch.tensor([numbers])
        hidden = torch.zeros(1, 1, count, count).masked_fill(
            torch.ones(count, count).triu(1).bool(), torch.finfo(torch.float32).min
        )
        cos, sin = rotary = self.decoder.rotary_emb(x, position)
        handles = [
            layer.self_attn.register_forward_hook(lambda m, a, out: setattr(self, "map", out[1])),
            layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: setattr(self, "keys", out)),
        ]
        out = layer(x, attention_mask=hidden, position_embeddings=rotary, position_ids=position)
        for handle in handles:
            handle.remove()
        # As the attention has them: heads apart, turned by their positions.
        keys = self.keys[0].reshape(count, -1, cos.shape[-1]).transpose(0, 1)
        half = keys.shape[-1] // 2
        self.keys = keys * cos[0] + torch.cat([-keys[..., half:], keys[..., :half]], dim=-1) * sin[0]
        return out[0] if isinstance(out, tuple) else out


CHAT = (
    "{% for m in messages %}user {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% elif part['type'] == 'video' %}w98 "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} answer"
)


def save_llava(folder: Any, model: Any = None) -> Any:
    """A LLaVA, or another model, with a tokenizer of words, a chat template and the constants of a processor, as a Hugging Face
    folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "user", "answer", "what", "is", "this", *(f"w{i}" for i in range(7, IMAGE)), "<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=["<image>"], chat_template=CHAT
    )
    fast.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    about = {"size": size, "crop_size": size, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", **about}))
    model = llava() if model is None else model
    model.save_pretrained(folder)
    return model
