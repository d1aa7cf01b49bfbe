"""Compression in vision-language models of any family, as research code does it: the whole model runs with `generate`, its image
features are replaced by fewer, and hooks on the decoder's layers take tokens out. The reference shares nothing with
edgewise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vlm_families import make, noise
from vlm_reference import IMAGE, Compression, greedy, zipped

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
def positions(model: Any, stay: list[int], count: int) -> Iterator[None]:
    """While this holds, an image's tokens in a prompt are those that `stay` of `count`, at the positions in time, height and width
    that they had among all, and so is the text behind them."""
    inner, original = model.model, model.model.get_rope_index

    @wraps(original)
    def gathered(input_ids: Tensor, *, mm_token_type_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        assert attention_mask.all()
        start = int((input_ids[0] == IMAGE).float().argmax())
        whole = torch.cat([input_ids[:, :start], torch.full((1, count), IMAGE), input_ids[:, start + len(stay) :]], dim=1)
        where, delta = original(whole, mm_token_type_ids=(whole == IMAGE).long(), **kwargs)
        columns = [*range(start), *(start + n for n in stay), *range(start + count, whole.shape[1])]
        return where[..., columns], delta + count - len(stay)

    inner.get_rope_index = gathered
    try:
        yield
    finally:
        del inner.get_rope_index


@contextmanager
def fastv(model: Any, block: int, keep: int, span: range) -> Iterator[None]:
    """While this holds, layers from `block` on see `keep` of the tokens of `span` (FastV), in the prompt and behind it."""
    model.set_attn_implementation("eager")
    layers = model.get_decoder().layers
    state: dict[str, Any] = {}

    def scored(module: Any, args: Any, out: Any) -> None:
        if out[1].shape[2] > 1:
            state["count"], score = out[1].shape[-1], out[1][0].mean(dim=0)[-1, span.start : span.stop]
            best = {span.start + int(n) for n in score.argsort(descending=True, stable=True)[:keep]}
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
PROMPTS = [([1, 5, 6], [7, 8, 9]), ([], [4])]


def check_compressed(name: str, spec: str | None, kept: int, out: Path, targets: tuple[str, ...]) -> str:
    """Export a family with `spec` (VisionZip or DivPrune, None: nothing) in front of its decoder and FastV inside of it, and
    compare every token that it generates with this. Gives back what the caches hold."""
    model, example = make(name)
    fast = f"fastv@decoder.block[{BLOCK}]:keep={KEEP}"
    bundle = edgewise.export(
        model,
        out,
        example=example,
        targets=targets,
        compress=[*([spec] if spec else []), fast],
        prompt_tokens=10,
        new_tokens=NEW,
        cache=False,
    )
    about = bundle.manifest.pipeline
    assert about is not None and about.media_tokens == kept
    assert [cache.media for cache in about.caches] == [kept] * BLOCK + [KEEP] * (4 - BLOCK)
    pixels = noise(*example.pop("pixel_values").shape, seed=5)
    # LLaVA reads the block before the last.
    zipped_at = Compression(tower=2 if name == "llava" else 3, dominant=20, context=4, stages={})
    wanted = []
    for before, after in PROMPTS:
        model, _ = make(name)
        with ExitStack() as stack, torch.no_grad():
            if spec is not None and spec.startswith("visionzip"):
                few = zipped(model, pixels, zipped_at)
                stack.enter_context(features(model, lambda x, few=few: few))
            elif spec is not None:
                whole = model.model.get_image_features(pixel_values=pixels, **example).pooler_output
                rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in whole])
                stay = divprune(rows, kept)
                stack.enter_context(features(model, lambda x, stay=stay: x[stay]))
                if hasattr(model.model, "get_rope_index"):
                    stack.enter_context(positions(model, stay, len(rows)))
            stack.enter_context(fastv(model, BLOCK, KEEP, range(len(before), len(before) + kept)))
            wanted.append(greedy(model, pixels, before, after, kept, NEW, **example))
        assert len(set(wanted[-1])) > 6
    for target in targets:
        with edgewise.load(bundle, target=target) as loaded:
            for (before, after), ids in zip(PROMPTS, wanted, strict=True):
                assert loaded.generate(input_ids=[*before, IMAGE, *after], image=pixels.numpy()).ids == ids, (name, target)
    return str([cache.media for cache in about.caches])
