"""The benchmark on the device: what the agent becomes. Answers as the agent does, and ends with the connection."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

from edgewise.bench import Comparison, Record, bench, compare
from edgewise.bundle import Bundle
from edgewise.errors import EdgewiseError


def main() -> None:
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What runtimes print on stdout is no answer.
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    order = json.loads(os.environ.pop("EDGEWISE_ORDER"))
    lacks = order["lacks"]
    try:
        bundles = [Bundle.open(folder) for folder in order["bundles"]]
        how = {"progress": lambda line: say(progress=line), **order["how"]}
        one = len(bundles) == 1
        found = bench(bundles[0], order["targets"], **how) if one else compare(bundles, order["targets"], **how)
    except EdgewiseError as error:
        reasons = "".join(f"\n{reason}" for reason in lacks.values())
        say(error=f"{error}{reasons}")
    else:
        if isinstance(found, Record):
            told: Record | Comparison = _explained(found, bundles[0], lacks)
        else:
            records = tuple(_explained(*pair, lacks) for pair in zip(found.records, bundles, strict=True))
            told = found.model_copy(update={"records": records})
        say(result=told.model_dump(mode="json"))


def _explained(record: Record, bundle: Bundle, lacks: dict[str, str]) -> Record:
    """The record with why a runtime could not be installed, where an artifact was skipped for it."""
    labels = {one.label: one.target for one in bundle.manifest.targets}
    skipped = {label: lacks.get(labels[label], reason) for label, reason in record.skipped.items()}
    return record.model_copy(update={"skipped": skipped})


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
