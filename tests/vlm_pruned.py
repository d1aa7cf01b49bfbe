"""Compression in vision-language models of any family, as research code does it: the whole model runs with `generate`, its image
features are replaced by fewer, and hooks on the decoder's layers take tokens out. The reference shares nothing with
edgewise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vlm_families import make, noise
from vlm_reference import IMAGE, Compression, greedy_of_several, zipped
from vlm_zipped import zipped_behind

import edgewise

Choose = Callable[[Tensor], Tensor]
"""The tokens of an image `(K, C)` to fewer of them."""


@contextmanager
def features(model: Any, choose: Choose) -> Iterator[None]:
    """While this holds, the model's images have the features that `choose` leaves."""
    inner, original = model.model, model.model.get_image_features

    @wraps(original)  # its signature is looked at
    def fewer(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        whole = made.pooler_output
        rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in whole]) if isinstance(whole, (list, tuple)) else whole
        chosen = choose(rows.reshape(-1, rows.shape[-1]))
        made.pooler_output = [chosen] if isinstance(whole, (list, tuple)) else chosen[None]
        return made

    inner.get_image_features = fewer
    try:
        yield
    finally:
        del inner.get_image_features


@contextmanager
def positions(model: Any, stays: list[list[int]], count: int) -> Iterator[None]:
    """While this holds, an image's tokens in a prompt are those that stay of `count`, at the positions in time, height and width
    that they had among all, and so is the text behind them. `stays` says which, image by image."""
    inner, original = model.model, model.model.get_rope_index

    @wraps(original)
    def gathered(input_ids: Tensor, *, mm_token_type_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        assert attention_mask.all()
        left, whole, columns = input_ids[0].tolist(), [], []
        for stay in stays:
            start = left.index(IMAGE)
            columns += [*range(len(whole), len(whole) + start), *(len(whole) + start + n for n in stay)]
            whole += [*left[:start], *[IMAGE] * count]
            left = left[start + len(stay) :]
        columns += range(len(whole), len(whole) + len(left))
        ids = torch.tensor([[*whole, *left]])
        where, delta = original(ids, mm_token_type_ids=(ids == IMAGE).long(), **kwargs)
        return where[..., columns], delta + ids.shape[1] - input_ids.shape[1]

    inner.get_rope_index = gathered
    try:
        yield
    finally:
        del inner.get_rope_index


@contextmanager
def fastv(model: Any, block: int, keep: int, span: list[int]) -> Iterator[None]:
    """While this holds, layers from `block` on see `keep` of the tokens at places `span` (FastV), in the prompt and behind it."""
    model.set_attn_implementation("eager")
    layers = model.get_decoder().layers
    state: dict[str, Any] = {}

    def scored(module: Any, args: Any, out: Any) -> None:
        if out[1].shape[2] > 1:
            state["count"], score = out[1].shape[-1], out[1][0].mean(dim=0)[-1, span]
            best = {span[int(n)] for n in score.argsort(descending=True, stable=True)[:keep]}
            state["stay"] = [n for n in range(state["count"]) if n not in span or n in best]

    def cut(number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            (hidden, *rest), prompt = args, args[0].shape[1] > 1
            stay = state["stay"]
            if prompt and number == block:
                hidden = hidden[:, stay]
            mask = kwargs["attention_mask"]
            if mask is not None:
                columns = [*stay, *range(state["count"], mask.shape[-1])]
                mask = (mask[:, :, stay] if prompt else mask)[..., columns]
            kwargs = {**kwargs, "attention_mask": mask}
            if prompt:
                kwargs["position_embeddings"] = tuple(t[..., stay, :] for t in kwargs["position_embeddings"])
                if kwargs.get("position_ids") is not None:
                    kwargs["position_ids"] = kwargs["position_ids"][..., stay]
            return (hidden, *rest), kwargs

        return hook

    handles = [layers[block - 1].self_attn.register_forward_hook(scored)]
    handles += [
        layer.register_forward_pre_hook(cut(i), with_kwargs=True) for i, layer in enumerate(layers) if i >= block
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def divprune(x: Tensor, keep: int) -> list[int]:
    """The tokens that are farthest apart, one after the other (Alvar et al. 2025)."""
    unit = x / x.norm(dim=-1, keepdim=True)
    far = 1 - unit @ unit.T
    picks = [int(far.sort(dim=0).values[1].argmax())]
    while len(picks) < keep:
        nearest = far[:, picks].amin(dim=1)
        nearest[picks] = -torch.inf
        picks.append(int(nearest.argmax()))
    return sorted(picks)


BLOCK, KEEP, NEW = 2, 5, 32
PROMPTS = [[[1, 5, 6], [7, 8, 9]], [[], [4]]]
OF_TWO = [[[1, 5, 6], [7, 8], [9, 3]], [[], [2], [4]]]
"""Texts before, between and behind the images."""


IN_FRONT = ("llava", "paligemma")
"""Families whose projectors take tokens one by one: VisionZip goes in front of them."""
SPECS = {name: ("visionzip:keep=20,context=4", 24) for name in (*IN_FRONT, "llava-next", "llava-onevision")}
"""VisionZip for a family, and how many tokens it leaves of an image, where they are more than `FEW`."""
FEW = ("visionzip:keep=6,context=3", 9)


def check_compressed(
    name: str, out: Path, targets: tuple[str, ...], images: int = 1, *, spec: str = "", kept: int = 0, **settings: Any
) -> str:
    """Export a family with VisionZip (or DivPrune, by a `spec` that leaves `kept` tokens of an image) in front of its decoder and
    FastV inside of it, for prompts with one image or two, and compare every token that it generates with this. Gives back what the
    caches hold. `settings`: more for the export."""
    model, example = make(name, images)
    spec, kept = (spec, kept) if spec else SPECS.get(name, FEW)
    fast = f"fastv@decoder.block[{BLOCK}]:keep={KEEP}"
    bundle = edgewise.export(
        model,
        out,
        example=example,
        targets=targets,
        compress=[spec, fast],
        images=images,
        prompt_tokens=10,
        new_tokens=NEW,
        cache=False,
        **settings,
    )
    about = bundle.manifest.pipeline
    assert about is not None and about.media_tokens == kept
    assert [cache.media for cache in about.caches] == [images * kept] * BLOCK + [KEEP] * (4 - BLOCK)
    pixels = noise(*example.pop("pixel_values").shape, seed=5)
    found = re.match(r"visionzip:keep=(\d+),context=(\d+)", spec)
    wanted, prompts = [], PROMPTS if images == 1 else OF_TWO
    for texts in prompts:
        model, _ = make(name)
        span, place = [], 0
        for text in texts[:-1]:
            place += len(text)
            span += range(place, place + kept)
            place += kept
        few, stays, count = chosen(name, model, pixels, example, images, found and (int(found[1]), int(found[2])), kept)
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(features(model, lambda x, few=few: few))
            if stays and hasattr(model.model, "get_rope_index"):
                stack.enter_context(positions(model, stays, count))
            stack.enter_context(fastv(model, BLOCK, KEEP, span))
            wanted.append(greedy_of_several(model, pixels, texts, kept, NEW, **example))
        assert len(set(wanted[-1])) > 6
    for target in targets:
        with edgewise.load(bundle, target=target) as loaded:
            for texts, ids in zip(prompts, wanted, strict=True):
                asked = [*texts[0], *(token for text in texts[1:] for token in (IMAGE, *text))]
                assert loaded.generate(input_ids=asked, images=pixels.numpy()).ids == ids, (name, target)
    return f"{spec}: {[cache.media for cache in about.caches]}"


def chosen(
    name: str, model: Any, pixels: Tensor, example: dict[str, Tensor], images: int, zip_: tuple[int, int] | None, keep: int
) -> tuple[Tensor, list[list[int]], int]:
    """The few tokens of all images `(K, C)`; which they were, image by image (none said: their order is all there is to know), of
    how many. `zip_`: dominant and context tokens of VisionZip; DivPrune without."""
    if zip_ and name in IN_FRONT:
        # LLaVA reads the block before the last.
        how = Compression(tower=2 if name == "llava" else 3, dominant=zip_[0], context=zip_[1], stages={})
        with torch.no_grad():
            return torch.cat([zipped(model, one, how) for one in pixels.chunk(images)]), [], 0
    with torch.no_grad():
        whole = model.model.get_image_features(pixel_values=pixels, **example).pooler_output
    rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in whole])
    count = len(rows) // images
    if zip_:
        tiles = 1 if name in ("idefics3", "smolvlm") else 0  # of all images one behind the other
        parts = [dict(zip(example, one, strict=True)) for one in zip(*(v.chunk(images) for v in example.values()), strict=True)]
        turns = zip(pixels.chunk(images, tiles), parts or [{}] * images, strict=True)
        made = [zipped_behind(name, model, one, *zip_, **more) for one, more in turns]
        return torch.cat([few for few, _ in made]), [stay for _, stay in made], count
    stays = [divprune(one, keep) for one in rows.split(count)]
    return rows[[turn * count + n for turn, stay in enumerate(stays) for n in stay]], stays, count
