"""The engine of a cluster: Ray runs every task on some node, and the bundle comes back as bytes.

No file system is shared, so that a node may be lost at any time: what it had not handed back is built by another one. Only this
process writes bundles, each whole and once.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgewise.builder.processes import Tell
from edgewise.builder.store import Store, copy
from edgewise.builder.task import Outcome, Task, build_one, failed
from edgewise.bundle import Bundle
from edgewise.bundle.manifest import path_fault
from edgewise.errors import InputError, extras_named

_TRIES = 3
"""How often a task is run again whose node was lost."""

Files = dict[str, bytes]


def engine(address: str | None) -> Callable[[Sequence[Task], int, Tell], Iterator[Outcome]]:
    """The engine of the cluster at `address` (`auto`, `HOST:PORT`, `ray://HOST:PORT`); None: a cluster of this machine alone.

    Every node needs the same packages, and the model at the same path; a node where they differ is an error, not another bundle.
    Raises MissingExtra where Ray is absent, and InputError where no cluster answers.
    """

    with extras_named():  # before anything is planned, and whether or not something is to be built
        if importlib.util.find_spec("ray") is None:
            raise ModuleNotFoundError("ray is not here", name="ray")

    def build_all(tasks: Sequence[Task], jobs: int, tell: Tell) -> Iterator[Outcome]:
        import ray

        # A cluster that this process is part of already is the one.
        started = not ray.is_initialized()
        if started:
            _answers(address)
            try:
                local: dict[str, Any] = {} if address is not None else {"num_cpus": jobs, "include_dashboard": False}
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
            except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                text = " ".join(str(error).split())
                raise InputError(f"no Ray cluster answers at {address or 'this machine'}: {text}") from error
        try:
            yield from _build(ray, tasks, jobs, tell)
        finally:
            if started:
                ray.shutdown()

    return build_all


def _answers(address: str | None) -> None:
    """Ray itself tries for minutes to reach a cluster that is not there. Raises InputError."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray cluster answers at {address}: {error}") from error


def _build(ray: Any, tasks: Sequence[Task], jobs: int, tell: Tell) -> Iterator[Outcome]:
    # A task that fails says so in its outcome; what Ray tries again is one whose process or node is gone.
    remote = ray.remote(max_retries=_TRIES, num_cpus=1)(build_here)
    waiting, running = list(tasks), dict[Any, Task]()
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop(0)
            tell(task.name, "sent to the cluster")
            running[remote.remote(task.model_dump_json())] = task
        done, _ = ray.wait(list(running), num_returns=1)
        task = running.pop(done[0])
        try:
            outcome, files = ray.get(done[0])
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            yield Outcome(name=task.name, status="failed", message=f"Ray: {lines[0]}", kind=type(error).__name__, code=2)
            continue
        yield _publish(task, Outcome.model_validate_json(outcome), files)


def build_here(document: str) -> tuple[str, Files]:
    """Build a task on the node that runs this; gives the outcome as JSON, and the files of the bundle."""
    task = Task.model_validate_json(document)
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        place = Path(folder) / "bundle"
        outcome = build_one(task.model_copy(update={"out": str(place)}))
        if outcome.status == "failed":
            return outcome.model_dump_json(), {}
        manifest = Bundle.open(place).manifest
        files = {name: (place / name).read_bytes() for name in [*manifest.files, "manifest.json"]}
    return outcome.model_dump_json(), files


def _publish(task: Task, outcome: Outcome, files: Files) -> Outcome:
    """Write what came back, checked as a bundle from anywhere is."""
    if outcome.status == "failed":
        return outcome
    folder = Path(tempfile.mkdtemp(prefix="edgewise-"))
    try:
        for name, data in files.items():
            if fault := path_fault(name):
                raise InputError(f"a node gave a file {name!r}: {fault}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        made = copy(Bundle.open(folder), Path(task.out))
        if task.cache:
            Store().remember(task.key, made)
        return outcome
    except InputError as error:
        return failed(task.name, error, error.exit_code)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
