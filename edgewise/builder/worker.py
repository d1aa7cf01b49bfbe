"""A process that builds: tasks come in as lines of JSON, and steps and outcomes go out."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import warnings

from edgewise.builder.task import Task, build_one


def main() -> None:
    """Build until there are no more tasks. Whoever started it may be gone at any time, and then so is this process: what it was
    writing is published whole or not at all."""
    warnings.simplefilter("ignore")
    # Models may print, and compiled code too: replies have a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()

    def say(document: object) -> None:
        replies.write(json.dumps(document) + "\n")
        replies.flush()

    while True:
        task = Task.model_validate_json(tasks.get())
        outcome = build_one(task, lambda done, total, text: say({"step": text}))
        say({"outcome": outcome.model_dump(mode="json")})


def _read(tasks: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
