"""Text from a generative bundle, for `edgewise run`."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Mapping
from typing import Any

from edgewise.bundle import Bundle
from edgewise.cli.screen import Result, Screen
from edgewise.errors import InputError
from edgewise.runtime import Sampling, load_pipeline


def generate(
    screen: Screen,
    bundle: Bundle,
    given: Mapping[str, Any],
    most: int | None,
    sampling: Sampling,
    target: str | None,
    threads: int | None,
) -> Result:
    """Generate from what is `given` (image, prompt, audio, ...), and print the text as it comes."""
    with load_pipeline(bundle, target, threads=threads) as pipeline:
        takes = inspect.signature(pipeline.generate).parameters
        for name in given:
            if name not in takes:
                raise InputError(f"{bundle.path} is a {pipeline.kind} model, and takes no --{name}")
        needed = [name for name, one in takes.items() if one.default is one.empty and name not in given]
        if needed:
            raise InputError(f"{bundle.path} is a {pipeline.kind} model: give --{needed[0]}")
        made = pipeline.generate(**given, max_new_tokens=most, sampling=sampling, on_text=screen.stream)
        screen.show("")
    stages = {name: {"runs": len(times), "seconds": statistics.fmean(times)} for name, times in made.seconds.items()}
    told = ", ".join(f"{name} {stage['seconds'] * 1e3:.1f} ms" for name, stage in stages.items())
    screen.say(f"{len(made.ids)} tokens, ended by {made.stopped}; mean times: {told}")
    return Result({"bundle": str(bundle.path), "text": made.text, "ids": made.ids, "stopped": made.stopped, "stages": stages})
