"""The artifacts of a bundle: choose among them and load one."""

from __future__ import annotations

from collections.abc import Sequence

from edgewise.bundle.manifest import Artifact
from edgewise.bundle.reader import Bundle
from edgewise.errors import InputError, MissingExtra, unknown
from edgewise.targets.base import Session


def choose(bundle: Bundle, targets: Sequence[str] | None = None, function: str | None = None) -> list[Artifact]:
    """The artifacts of a bundle for these targets, or for all, in the manifest's order; with `function`, those alone that are this
    function of an artifact of several.

    Raises `InputError` if there are none, or a target or function is unknown or not in the bundle.
    """
    artifacts = bundle.manifest.targets
    if function is not None:
        known = sorted({one.function for one in artifacts if one.function is not None})
        if function not in known:
            raise unknown("function of this bundle", function, known)
        artifacts = tuple(one for one in artifacts if one.function == function)
    present = sorted({artifact.target for artifact in artifacts})
    for name in targets or ():
        if name not in present:
            raise unknown("target of this bundle", name, present)
    chosen = [artifact for artifact in artifacts if targets is None or artifact.target in targets]
    if not chosen:
        raise InputError(f"{bundle.path} has no artifacts: export it again with a target")
    return chosen


def runnable(artifacts: Sequence[Artifact]) -> tuple[list[Artifact], dict[str, str]]:
    """Those artifacts whose runtime is installed, and for each of the others, by label, the reason why not.

    Raises `MissingExtra` with every reason if none can run here.
    """
    from edgewise.targets import get

    able, reasons = [], {}
    for artifact in artifacts:
        try:
            get(artifact.target).check(runtime_only=True)
        except MissingExtra as missing:
            reasons[artifact.label] = str(missing)
        else:
            able.append(artifact)
    if not able:
        raise MissingExtra(
            "no artifact of this bundle can run here:\n  " + "\n  ".join(sorted(set(reasons.values())))
        )
    return able, reasons


def joined_labels(artifacts: Sequence[Artifact]) -> dict[str, str]:
    """A short name for all components of each target: `openvino/fp16`, or `openvino/w8a8+w8a16` where their precisions differ."""
    found: dict[str, list[str]] = {}
    for one in artifacts:
        found.setdefault(one.target, []).append(one.precision)
    return {target: f"{target}/{'+'.join(dict.fromkeys(precisions))}" for target, precisions in found.items()}


def load(bundle: Bundle, artifact: Artifact, *, threads: int | None = None, units: str | None = None) -> Session:
    """Load an artifact of a bundle. `threads` defaults to what the manifest says of the artifact; `units`: see `Target.for_units`.

    Raises `MissingExtra` if its runtime is absent, and `InputError` if it cannot be loaded or its inputs and
    outputs are not those of the manifest.
    """
    from edgewise.targets import get

    files = [bundle.file(name) for name in artifact.files]
    count = artifact.threads if threads is None else threads
    target = get(artifact.target)
    target = target if units is None else target.for_units(units)
    session = target.load_function(files, artifact.function, threads=count)
    component = bundle.manifest.component(artifact.role)
    kept = set(artifact.states)
    for kind, found, said in (
        ("inputs", session.inputs, [one for one in component.inputs if one.name not in kept]),
        ("states", session.kept, [one for one in component.inputs if one.name in kept]),
        ("outputs", session.outputs, component.outputs),
    ):
        if [(one.name, one.shape, one.dtype) for one in found] != [
            (one.name, one.shape, one.dtype) for one in said
        ]:
            session.close()
            raise InputError(
                f"the {kind} of {files[0]} are not those that the manifest gives for '{artifact.role}'; "
                f"export the model again"
            )
    return session
