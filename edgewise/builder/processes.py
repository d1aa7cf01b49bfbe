"""The engine of one machine: processes that build side by side, each one bundle after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO

from edgewise.builder.task import Outcome, Task
from edgewise.errors import InputError

Tell = Callable[[str, str], None]
"""Called with the name of an entry, and what is done for it now."""

_TRIES = 2
"""A process may be ended from outside, as by a system that is out of memory. Its bundle is tried once more."""


def build_all(tasks: Sequence[Task], jobs: int, tell: Tell) -> Iterator[Outcome]:
    """Build all tasks with `jobs` processes, and give each outcome when it is there."""
    workers = _Workers()
    with ThreadPoolExecutor(jobs, "edgewise-build") as pool:
        try:
            running = [pool.submit(workers.build, task, tell) for task in tasks]
            for done in as_completed(running):
                yield done.result()
        finally:
            # On an interrupt too: no process goes on alone.
            for one in running:
                one.cancel()
            workers.close()


class _Workers:
    """One process for each thread that asks, started when it first does."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._all: list[_Worker] = []
        self._closed = False

    def build(self, task: Task, tell: Tell) -> Outcome:
        said = ""
        for _ in range(_TRIES):
            if self._closed:
                break
            worker: _Worker | None = getattr(self._local, "worker", None)
            if worker is None or not worker.alive:
                worker = self._local.worker = _Worker()
                self._all.append(worker)
            outcome = worker.build(task, tell)
            if isinstance(outcome, Outcome):
                return outcome
            said = outcome
        return Outcome(name=task.name, status="failed", message=said or "interrupted", kind="WorkerEnded", code=2)

    def close(self) -> None:
        self._closed = True
        for worker in self._all:
            worker.close()


class _Worker:
    def __init__(self) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        # Threads that wait for one another would keep others from their cores.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        package = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgewise.builder.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
            )
        except OSError as error:
            raise InputError(f"cannot start a process: {error.strerror or error}") from error

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def build(self, task: Task, tell: Tell) -> Outcome | str:
        """The outcome, or why the process ended without one."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(task.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                reply = json.loads(line)
                if "outcome" in reply:
                    return Outcome.model_validate(reply["outcome"])
                tell(task.name, reply["step"])
        except BrokenPipeError:
            pass
        return self._last_words(self._process.wait())

    def _last_words(self, code: int) -> str:
        how = f"signal {-code}" + (" (out of memory?)" if code == -9 else "") if code < 0 else f"exit code {code}"
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        return f"the process that built it ended with {how}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue
