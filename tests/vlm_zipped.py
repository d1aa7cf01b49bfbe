"""VisionZip behind the projector of vision-language models whose projectors merge, pool or pack the tower's tokens, as research
code does it: hooks in the tower, and its scores and keys sent through the model's own merging as if they were features. It shares
nothing with edgewise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

Merge = Callable[[Tensor], Tensor]
"""A number for each of the tower's tokens `(tiles, N)`, to the mean of those that each token behind the projector is made of `(K)`;
NaN for one that is made of none."""


def zipped_behind(name: str, model: Any, pixels: Tensor, dominant: int, context: int, **example: Any) -> tuple[Tensor, list[int]]:
    """The tokens of one image `(K, C)`, dominant ones in their order, then context tokens; and where each was among all."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps, keys, whole = _TOWERS.get(name, _attention)(model, pixels, example)
        merge = _MERGES[name](model, pixels, example)
        lost = maps.shape[-1] - keys.shape[1]
        if lost:
            received = maps.mean(dim=1)[:, 0, lost:]
        else:  # of what becomes a token behind the projector
            used = _used(merge, *keys.shape[:2])
            received = torch.stack([one.mean(dim=0)[rows].mean(dim=0) for one, rows in zip(maps, used, strict=True)])
        score = merge(received)
        metric = torch.stack([merge(keys[..., d]) for d in range(keys.shape[-1])], dim=-1)
    return zip_tokens(whole, score, metric, dominant, context)


def zip_tokens(x: Tensor, score: Tensor, keys: Tensor, dominant: int, context: int) -> tuple[Tensor, list[int]]:
    """Few of tokens `x (K, C)` with a score `(K)`, NaN for those of no use, and keys `(K, D)`; and where each was."""
    real = [i for i in range(len(x)) if not score[i].isnan()]
    best = sorted(sorted(real, key=lambda i: (-float(score[i]), i))[:dominant])
    rest = [i for i in real if i not in best]
    targets = [rest[n * (len(rest) // context)] for n in range(context)]
    keys = keys / keys.norm(dim=-1, keepdim=True)
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in members:
            members[max(targets, key=lambda t: float(keys[i] @ keys[t]))].append(i)
    folded = [x[t] + (x[group].mean(dim=0) if group else 0) for t, group in members.items()]
    return torch.stack([*x[best], *folded]), [*best, *targets]


def _used(merge: Merge, tiles: int, count: int) -> Tensor:
    """Which of the tower's tokens `(tiles, N)` anything behind the projector is made of."""
    zero = merge(torch.zeros(tiles, count)).nan_to_num()
    used = torch.zeros(tiles, count, dtype=torch.bool)
    for tile in range(tiles):
        for n in range(count):
            one = torch.zeros(tiles, count)
            one[tile, n] = 1
            used[tile, n] = bool((merge(one).nan_to_num() != zero).any())
    return used


# -- attention maps `(tiles, heads, N, N)`, keys without a class token `(tiles, N, D)`, and features `(K, C)`


def _attention(model: Any, pixels: Tensor, example: dict[str, Any], turn: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    tower: Any = next(getattr(model.model, n) for n in ("vision_tower", "vision_model") if hasattr(model.model, n))
    tower = getattr(tower, "vision_model", tower)
    layers = getattr(tower.encoder, "layers", None) or tower.encoder.layer
    attention = getattr(layers[turn], "self_attn", None) or layers[turn].attention
    seen: dict[str, Tensor] = {}
    handles = [
        attention.register_forward_hook(lambda m, a, out: seen.update(maps=out[1])),
        attention.k_proj.register_forward_hook(lambda m, a, out: seen.update(keys=out)),
    ]
    whole = model.model.get_image_features(pixel_values=pixels, **example).pooler_output
    for handle in handles:
        handle.remove()
    maps = seen["maps"]
    keys = seen["keys"].reshape(*maps.shape[:1], maps.shape[-1], maps.shape[1], -1).mean(dim=2)
    if hasattr(tower.embeddings, "class_embedding") or hasattr(tower.embeddings, "cls_token"):
        keys = keys[:, 1:]
    return maps, keys, _rows(whole)


def _rows(whole: Any) -> Tensor:
    parts = whole if isinstance(whole, (list, tuple)) else [whole]
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in parts])


def _before_last(model: Any, pixels: Tensor, example: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return _attention(model, pixels, example, -2)


def _rotary(model: Any, pixels: Tensor, example: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Towers with one map for queries, keys and values, that turn queries and keys by their places."""
    attention = model.model.visual.blocks[-1].attn
    seen: dict[str, Any] = {}
    handles = [
        attention.register_forward_pre_hook(lambda m, a, given: seen.update(given), with_kwargs=True),
        attention.qkv.register_forward_hook(lambda m, a, out: seen.update(qkv=out)),
    ]
    whole = model.model.get_image_features(pixel_values=pixels, **example).pooler_output
    for handle in handles:
        handle.remove()
    count, (cos, sin) = len(seen["qkv"]), seen["position_embeddings"]
    q, k = seen["qkv"].reshape(count, 3, attention.num_heads, -1).permute(1, 2, 0, 3)[:2]
    q, k = (t * cos + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], dim=-1) * sin for t in (q, k))
    maps = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return maps[None], k.mean(dim=0)[None], _rows(whole)


_TOWERS = {"llava-next": _before_last, "qwen2-vl": _rotary, "qwen2.5-vl": _rotary}


# -- what the model itself does with its tower's tokens


def _pooled(model: Any, pixels: Tensor, example: dict[str, Any]) -> Merge:
    return lambda v: nn.functional.avg_pool2d(v.reshape(1, 1, *_square(v)), 2).flatten()


def _shuffled(model: Any, pixels: Tensor, example: dict[str, Any]) -> Merge:
    connector = model.model.connector
    return lambda v: connector.pixel_shuffle(v[..., None], connector.scale_factor).mean(dim=-1).flatten()


def _internvl(model: Any, pixels: Tensor, example: dict[str, Any]) -> Merge:
    ratio = model.config.downsample_ratio
    return lambda v: model.model.pixel_shuffle(v.reshape(1, *_square(v), 1), scale_factor=ratio).mean(dim=-1).flatten()


def _square(v: Tensor) -> tuple[int, int]:
    side = round(v.numel() ** 0.5)
    return side, side


def _fours(model: Any, pixels: Tensor, example: dict[str, Any]) -> Merge:
    return lambda v: v.reshape(-1, 4).mean(dim=-1)


def _windows(model: Any, pixels: Tensor, example: dict[str, Any]) -> Merge:
    config = model.model.visual.config
    sizes = (config.spatial_merge_size, config.window_size, config.patch_size)
    order, _ = get_vision_window_index(example["image_grid_thw"], *sizes)
    return lambda v: v.reshape(-1, 4).mean(dim=-1)[torch.as_tensor(order).argsort()]


def _packed(model: Any, pixels: Tensor, example: dict[str, Any]) -> Merge:
    """Tiles side by side, padding cut off, the end of each row marked."""

    def merge(v: Tensor) -> Tensor:
        mark = torch.full((1,), torch.nan)
        more: dict[str, Any] = {"vision_feature_select_strategy": "default"} if "Next" in type(model).__name__ else {}
        return model.model.pack_image_features([v[..., None]], example["image_sizes"], image_newline=mark, **more)[0][0].flatten()

    return merge


_MERGES: dict[str, Callable[[Any, Tensor, dict[str, Any]], Merge]] = {
    "llava-next": _packed,
    "llava-onevision": _packed,
    "gemma3": _pooled,
    "internvl": _internvl,
    "idefics3": _shuffled,
    "smolvlm": _shuffled,
    "qwen2-vl": _fours,
    "qwen2.5-vl": _windows,
}
