"""One bundle to build, as it is sent to a process or to another machine, and what came of it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal

from edgewise.builder.key import Keys
from edgewise.builder.store import Store
from edgewise.errors import EdgewiseError, InputError, extras_named
from edgewise.exporter.recipe import Recipe
from edgewise.schema import Strict

Status = Literal["current", "cached", "built", "failed"]
"""`current`: it was there; `cached`: copied from an earlier build."""
Step = Callable[[int, int, str], None]


class Task(Strict):
    """Build `recipe` at `out`, from the folder `folder`. `key`: what the recipe and all that it names were when it was planned."""

    name: str
    recipe: Recipe
    out: str
    key: str
    folder: str
    cache: bool = True
    trust_remote_code: bool = False
    weights_only: bool = False


class Outcome(Strict):
    """What came of an entry; `code` is the exit code of a failure, `kind` its class."""

    name: str
    status: Status
    message: str = ""
    kind: str = ""
    code: int = 0


def build_one(task: Task, step: Step | None = None) -> Outcome:
    """Export the bundle of a task, and remember it under its key. Every failure becomes an outcome.

    What the recipe names must be the same before and after, and the same as when it was planned: else the bundle is not remembered.
    """
    try:
        with extras_named():
            os.chdir(task.folder)
            if task.folder not in sys.path:
                sys.path.insert(0, task.folder)
            _same(task, "on this machine, or has changed since the build began")
            from edgewise.exporter.export import export

            asked = {name: getattr(task.recipe, name) for name in Recipe.model_fields}
            flags: dict[str, Any] = {"trust_remote_code": task.trust_remote_code, "weights_only": task.weights_only}
            made = export(asked.pop("model"), task.out, **asked, **flags, cache=task.cache, progress=step)
            _same(task, "after it was built: something changed meanwhile")
            if task.cache:
                Store().remember(task.key, made)
        return Outcome(name=task.name, status="built")
    except EdgewiseError as error:
        return failed(task.name, error, error.exit_code)
    except Exception as error:
        traceback.print_exc()
        return failed(task.name, error, 2)


def failed(name: str, error: Exception, code: int) -> Outcome:
    """The outcome of an entry that ended with an error."""
    text = str(error) if isinstance(error, EdgewiseError) else f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome(name=name, status="failed", message=text, kind=type(error).__name__, code=code)


def _same(task: Task, why: str) -> None:
    flags = {"trust_remote_code": task.trust_remote_code, "weights_only": task.weights_only}
    if Keys(**flags).of(task.recipe) != task.key:
        raise InputError(
            f"{task.recipe.model}, a file that the recipe names, or a package is not the same {why}. A factory must give the same "
            "weights every time (torch.manual_seed); else build again"
        )

