"""Where the tokens of a prompt are in its sequence, and those of its images among them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def placed(
    texts: Sequence[Sequence[int]], places: np.ndarray, advance: int, bucket: int, name: str = "visual_position"
) -> dict[str, np.ndarray]:
    """Inputs of `prefill` besides the images' tokens, in int64: the prompt in its bucket, behind the fill, and where each token is.

    Args:
        texts: token ids before, between and behind the images: one text more than images.
        places: `(images, rows, K)`, of each image's tokens, from the first of them. With several rows they are in time, height and
            width, and in order as they come.
        advance: how many positions the text behind an image is further on.
        bucket: tokens that the prompt has room for.
        name: what the positions of the images' tokens are called.

    Returns: `name (1, images * K)`, `input_ids (1, bucket)`, `position (1, bucket)`. With several rows positions are
    `(1, 1 + rows, N)`, and the first row is the order. -1 is the position of the fill.
    """
    images, rows, count = places.shape
    lengths = [len(text) for text in texts]
    ends = np.cumsum(lengths)
    starts, turns = ends[:-1], np.arange(images)

    def of_text(each: int) -> np.ndarray:
        """Positions of the text, where an image takes `each` of them."""
        return filled(np.arange(ends[-1]) + np.repeat(np.arange(len(texts)), lengths) * each, -1)

    def filled(values: np.ndarray, fill: int) -> np.ndarray:
        made = np.full((1, bucket), fill, np.int64)
        made[0, bucket - ends[-1] :] = values
        return made

    ids = filled(np.array([token for text in texts for token in text], np.int64), 0)
    where = places + (starts + turns * advance)[:, None, None]
    where = where.transpose(1, 0, 2).reshape(rows, images * count).astype(np.int64)
    if rows == 1:
        return {name: where, "input_ids": ids, "position": of_text(advance)}
    order = (starts + turns * count)[:, None] + np.arange(count)
    return {
        name: np.concatenate([order.reshape(1, -1), where])[None],
        "input_ids": ids,
        "position": np.concatenate([of_text(count), np.repeat(of_text(advance), rows, axis=0)])[None],
    }


def items_axis(shape: Sequence[int], items: int) -> int:
    """Along which axis of an input of this shape several images are put one behind the other: the first, or behind the batch of one
    prompt, which there is only in front of images (images, channels, height, width)."""
    return 1 if items > 1 and shape[0] == 1 and len(shape) > 4 else 0
