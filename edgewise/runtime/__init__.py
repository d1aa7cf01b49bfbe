"""Load a bundle and run it: one component as a session, or all of them as the generative model that they make. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

from edgewise.bundle import Bundle
from edgewise.runtime.generate import Generation
from edgewise.runtime.pipeline import GenerativePipeline
from edgewise.runtime.sampling import Sampling
from edgewise.runtime.session import load_session
from edgewise.targets import Session

__all__ = ["Generation", "GenerativePipeline", "Sampling", "load", "load_pipeline", "load_session"]


def load(
    bundle: Bundle | str | os.PathLike[str],
    target: str | None = None,
    role: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    function: str | None = None,
) -> Session | GenerativePipeline:
    """Load a bundle: its pipeline, where it has one and no `role` is asked for, else one component.

    A session's `run({name: array})` gives `{name: array}`; a pipeline's `generate(...)` gives a `Generation`.

    Args:
        bundle: an opened bundle, or the folder of one.
        target, role, precision: which artifacts; where several fit, the first whose runtime is installed.
        threads: of the runtime; None is its own choice.
        function: of artifacts that hold several compressions, the one of this name.

    Raises InputError where nothing fits, MissingExtra where the runtime is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if opened.manifest.pipeline is None or role is not None or function is not None:
        return load_session(opened, target, role, precision, threads, function)
    return load_pipeline(opened, target, precision, threads)


def load_pipeline(
    bundle: Bundle,
    target: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    sessions: Mapping[str, Session] | None = None,
) -> GenerativePipeline:
    """Load all components of a bundle's pipeline, or take these `sessions` of them. Raises InputError where it has none, and as
    `load` does."""
    from edgewise.runtime.audio_language import AudioLanguage
    from edgewise.runtime.speech import Speech
    from edgewise.runtime.vision_language import VisionLanguage

    known: tuple[type[GenerativePipeline], ...] = (AudioLanguage, Speech, VisionLanguage)
    kinds = {one.kind: one for one in known}
    pipeline = bundle.manifest.pipeline
    GenerativePipeline.check(bundle)
    assert pipeline is not None
    return kinds[pipeline.kind](bundle, target, precision, threads, sessions)
