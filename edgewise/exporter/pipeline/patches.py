"""Images as the flat patches that some models take instead (Qwen2-VL): what their processor makes of pixels, in the graph."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

from edgewise.errors import InputError

_PROCESSORS = {"Qwen2VLImageProcessor", "Glm4vImageProcessor", "Glm46VImageProcessor"}
"""Those that write patches in the order of `patched`. Others with the same sizes in their configuration do not (HunYuan-VL)."""


def with_grid(model: nn.Module, pixels: Tensor, given: dict[str, Any], name: str) -> dict[str, Any]:
    """What a model is told of an example: where that is pixels, images `(B, C, H, W)` or videos `(B, T, C, H, W)`, and the model
    takes patches, the grid of these as `name`. Raises InputError for pixels that do not fall into patches, and for those of a model
    whose patches lie in an order that is not known here."""
    if pixels.ndim < 4:
        return given
    if not _takes_patches(model):
        if name in inspect.signature(model.forward).parameters and not (name in given and _are_patches(model, pixels)):
            raise InputError(
                f"{type(model).__name__} takes patches, and how its processor cuts pixels {list(pixels.shape)} into them is not "
                f"known here: give what the processor writes, patches with {name}"
            )
        return given
    if name in given:
        return given
    size, frames, merged = _sizes(model)
    count = 1 if pixels.ndim == 4 else pixels.shape[1] // frames
    height, width = pixels.shape[-2:]
    if height % (size * merged) or width % (size * merged) or (pixels.ndim == 5 and pixels.shape[1] % frames):
        raise InputError(
            f"the model cuts images into groups of patches of {size * merged} x {size * merged} pixels, and videos into {frames} "
            f"frames: {list(pixels.shape)} is no multiple of these"
        )
    return {**given, name: torch.tensor([[count, height // size, width // size]] * pixels.shape[0])}


def patched(model: nn.Module, pixels: Tensor) -> Tensor:
    """Patches `(N, C * frames * size * size)` of images `(B, C, H, W)` or videos `(B, T, C, H, W)`, those that the model merges one
    behind the other; anything else, and for another model, as it is."""
    if pixels.ndim < 4 or not _takes_patches(model):
        return pixels
    size, frames, merged = _sizes(model)
    if pixels.ndim == 4:  # an image is a film that stands still
        pixels = pixels[:, None].expand(-1, frames, -1, -1, -1)
    channels, height, width = pixels.shape[-3:]
    h, w = height // size, width // size
    # Of at most five dimensions at a time, which is what some devices have.
    x = pixels.reshape(-1, size, w, size).transpose(1, 2).reshape(-1, channels, h * w, size * size)
    x = x.reshape(-1, frames, channels, h * w, size * size).permute(0, 3, 2, 1, 4).flatten(2)
    place = torch.arange(h * w).reshape(h // merged, merged, w // merged, merged).transpose(1, 2).reshape(-1)
    return x.index_select(1, place).flatten(0, 1)


def _sizes(model: nn.Module) -> tuple[int, int, int]:
    """Pixels of a patch's side, frames of a patch, and patches of a side that become one token."""
    config: Any = model.config
    vision = config.vision_config
    return int(vision.patch_size), int(vision.temporal_patch_size), int(vision.spatial_merge_size)


def _takes_patches(model: nn.Module) -> bool:
    """Whether the processor that transformers knows for a model cuts pixels as `patched` does, into patches of known sizes."""
    config: Any = model.config
    vision = getattr(config, "vision_config", None)
    if not all(hasattr(vision, name) for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")):
        return False
    return not _PROCESSORS.isdisjoint(_image_processors(str(getattr(config, "model_type", ""))))


def _image_processors(kind: str) -> set[str]:
    """Those that transformers knows for a type of model (or the whole that it is the thinker of), or else for types with its
    processor."""
    kind = kind.removesuffix("_thinker")
    own = PROCESSOR_MAPPING_NAMES.get(kind)
    alike = [other for other, name in PROCESSOR_MAPPING_NAMES.items() if own is not None and name == own]
    kinds = [kind] if IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) else alike
    return {name for other in kinds for name in IMAGE_PROCESSOR_MAPPING_NAMES.get(other, {}).values()}


def _are_patches(model: nn.Module, pixels: Tensor) -> bool:
    """Whether `(..., C, size, size)` is what some processors write of each patch."""
    config: Any = model.config
    size = getattr(getattr(config, "vision_config", None), "patch_size", None)
    return tuple(pixels.shape[-2:]) == (size, size)
