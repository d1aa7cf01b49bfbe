"""Retrieval recall of two-tower models: how often what belongs to an image is found among all texts, and the other way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgewise.bundle import Bundle
from edgewise.bundle.manifest import Component
from edgewise.calibration import Port, open_source, survey
from edgewise.calibration.samples import spread
from edgewise.errors import InputError
from edgewise.targets import choose, load, runnable
from edgewise.verify.data import Counter, uncounted

RANKS = (1, 5)
"""Recall is the share of queries with a match among so many results."""
TEXT = "text_embeds"
MEDIA = {"image_embeds": "pixel_values", "audio_embeds": "input_features"}
"""The embeddings of media by the outputs of two-tower models (CLIP, SigLIP, CLAP), and the inputs that they are of."""


def has_two_towers(bundle: Bundle) -> bool:
    """Whether a bundle embeds media and texts."""
    return bundle.manifest.pipeline is None and any(_towers(one) for one in bundle.manifest.components)


def recall(
    bundle: Bundle,
    src: str,
    targets: Sequence[str] | None = None,
    threads: int | None = None,
    counter: Counter = uncounted,
    say: Callable[[str], None] = lambda text: None,
    most: int | None = None,
    function: str | None = None,
) -> list[dict[str, Any]]:
    """Recall@1 and @5 of every artifact that can run here, both ways, over pairs of media and texts: an `.npz` or `.safetensors`
    file with an array for each input, whose rows are pairs; all of them, or `most`, spread evenly. Media that are equal are one,
    as texts are. Raises InputError for a model without two towers, and for data without pairs, or with too few."""
    scores = []
    for artifact in runnable(choose(bundle, targets, function))[0]:
        component = bundle.manifest.component(artifact.role)
        tower = _towers(component)
        if tower is None:
            raise InputError(
                f"{artifact.label} has no two towers, and retrieval recall compares embeddings of media ({' or '.join(MEDIA)}) "
                f"with {TEXT}; it gives {', '.join(one.name for one in component.outputs)}"
            )
        media = MEDIA[tower]
        ports = {info.name: Port(info.shape, info.dtype) for info in component.inputs}
        source = open_source(src, ports, bundle.manifest.preprocessing)
        samples = survey(source, ports, spread(len(source), len(source) if most is None else most))
        for note in samples.notes:
            say(f"note: {note}")
        found: dict[str, list[np.ndarray]] = {tower: [], TEXT: []}
        seen: dict[str, list[bytes]] = {tower: [], TEXT: []}
        with (
            load(bundle, artifact, threads=threads) as session,
            counter(f"recall of {artifact.label}", samples.count) as count,
        ):
            for feed in samples:
                rows = min(samples.batch, samples.count - len(seen[TEXT]))
                outputs = session.run_anew(feed)
                for name, arrays in found.items():
                    arrays.append(outputs[name][:rows])
                for row in range(rows):
                    seen[tower].append(_digest([feed[media][row]]))
                    seen[TEXT].append(_digest([feed[name][row] for name in ports if name != media]))
                count(len(seen[TEXT]))
        embedded, texts = (np.concatenate(found[name]) for name in (tower, TEXT))
        made = recall_of(embedded, texts, _numbered(seen[tower]), _numbered(seen[TEXT]), src)
        scores.append({"artifact": artifact.label, "samples": samples.count, **made})
    return scores


def recall_of(
    media: np.ndarray, texts: np.ndarray, media_ids: np.ndarray, text_ids: np.ndarray, name: str = "the data"
) -> dict[str, Any]:
    """Recall by cosine similarity of embeddings `(pairs, width)`, where rows with the same id are one thing: the share of media
    (texts) with a text (media) of theirs among the first k, as `media_to_text` (`text_to_media`), each `{"1": ..., "5": ...}`. What
    is as similar as the best match counts as in front of it. Raises InputError unless there are more things than the largest k."""
    kept = []
    for what, rows, ids in (("media", media, media_ids), ("texts", texts, text_ids)):
        if not np.isfinite(rows).all():
            raise InputError(f"the embeddings of {what} of {name} are not finite: recall cannot be computed")
        _, first = np.unique(ids, return_index=True)
        if len(first) <= max(RANKS):
            raise InputError(f"{name} has {len(first)} different {what}, and recall@{max(RANKS)} needs more than {max(RANKS)}")
        long = rows[first].astype(np.float64)
        kept.append(long / np.maximum(np.linalg.norm(long, axis=-1, keepdims=True), 1e-12))
    similar = kept[0] @ kept[1].T
    match = np.zeros(similar.shape, bool)
    match[np.unique(media_ids, return_inverse=True)[1], np.unique(text_ids, return_inverse=True)[1]] = True
    ways = {"media_to_text": (similar, match), "text_to_media": (similar.T, match.T)}
    return {
        "media": len(similar),
        "texts": similar.shape[1],
        **{way: {str(k): float((_places(*known) < k).mean()) for k in RANKS} for way, known in ways.items()},
    }


def _places(similar: np.ndarray, match: np.ndarray) -> np.ndarray:
    """How many others are in front of each query's best match."""
    best = np.where(match, similar, -np.inf).max(1, keepdims=True)
    return np.asarray(((similar >= best) & ~match).sum(1))


def _towers(component: Component) -> str | None:
    """The output with embeddings of media, of a model that has them of texts, too."""
    outputs = {one.name for one in component.outputs}
    inputs = {one.name for one in component.inputs}
    if TEXT not in outputs:
        return None
    return next((name for name, media in MEDIA.items() if name in outputs and media in inputs), None)


def _digest(arrays: Sequence[np.ndarray]) -> bytes:
    """What is kept of media and texts to know them again."""
    return hashlib.sha256(b"".join(one.tobytes() for one in arrays)).digest()


def _numbered(seen: Sequence[bytes]) -> np.ndarray:
    """A number for each of them, the same for equal ones."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(one, len(numbers)) for one in seen])
