"""Load one component of a bundle. Needs one runtime, and no torch."""

from __future__ import annotations

import os

from edgewise.bundle import Bundle
from edgewise.errors import InputError
from edgewise.targets import Session, choose, runnable
from edgewise.targets import load as load_artifact


def load_session(
    bundle: Bundle | str | os.PathLike[str],
    target: str | None = None,
    role: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    function: str | None = None,
) -> Session:
    """Load one component of a bundle as a session; `session.run({name: array})` gives `{name: array}`.

    Args:
        bundle: an opened bundle, or the folder of one.
        target, role, precision: which artifact; where several fit, the first whose runtime is installed.
        function: of artifacts that hold several compressions, the one of this name.
        threads: of the runtime; None is its own choice.

    Raises InputError where nothing fits, MissingExtra where the runtime is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if role is not None:
        opened.manifest.component(role)
    artifacts = [
        a
        for a in choose(opened, [target] if target else None, function)
        if role in (None, a.role) and precision in (None, a.precision)
    ]
    if not artifacts:
        raise InputError(f"{opened.path} has no artifact for role {role} at precision {precision}")
    return load_artifact(opened, runnable(artifacts)[0][0], threads=threads)
