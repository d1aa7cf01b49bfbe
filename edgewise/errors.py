"""The errors that edgewise raises on purpose, each with the exit code of the command line."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class EdgewiseError(Exception):
    """Base of every error that edgewise raises on purpose.

    `exit_code` is what the command line exits with: 1 for checked and failed, 2 for bad input or environment.
    The message is written for the user and needs no traceback.
    """

    exit_code = 1


class CheckFailed(EdgewiseError):
    """Something was checked and is not good enough: an error above its threshold, a budget not met."""

    exit_code = 1


class InputError(EdgewiseError):
    """Bad input or environment. The message says what is wrong, where, and how to mend it."""

    exit_code = 2


class MissingExtra(InputError):
    """An optional package is absent or too old. The message says what to install."""


# Which extra installs a module that may be absent.
_EXTRAS = {
    "PIL": "generate",
    "coreai": "coreai",
    "coreai_torch": "coreai-export",
    "coremltools": "coreml",
    "google": "coreml",
    "jiwer": "metrics",
    "matplotlib": "report",
    "onnx": "export",
    "onnxscript": "export",
    "soundfile": "generate",
    "tokenizers": "generate",
    "ray": "ray",
    "torch": "export",
    "transformers": "export",
    "yaml": "export",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "av": "calibration",
    "nncf": "calibration",
}


@contextlib.contextmanager
def extras_named() -> Iterator[None]:
    """Turn the error of a module that is not there into a `MissingExtra`, if an extra has it."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXTRAS:
            raise
        mend = f'pip install "edgewise[{_EXTRAS[name]}]"'
        raise MissingExtra(f"{name} is not installed; install it with: {mend}") from error


class Refused(InputError):
    """The compiler refuses to make a graph that it cannot prove right.

    `node` is the name of the graph node, `source` the line of the model that it comes from, `method` the
    compression method, `reason` what is in the way. What is not known is None, and is left out of the
    message.
    """

    def __init__(
        self,
        reason: str,
        *,
        node: str | None = None,
        source: str | None = None,
        method: str | None = None,
    ) -> None:
        self.reason = reason
        self.node = node
        self.source = source
        self.method = method
        what = f"cannot apply {method}" if method else "cannot compile this graph"
        where = f" at node '{node}'" if node else ""
        line = f"\n  from {source}" if source else ""
        super().__init__(f"{what}{where}: {reason}{line}")

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from `args`, which hold the message and not the fields.
        return (_refused, (self.reason, self.node, self.source, self.method))


def _refused(reason: str, node: str | None, source: str | None, method: str | None) -> Refused:
    return Refused(reason, node=node, source=source, method=method)


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Make the error for a name that nobody knows, with the nearest known name.

    >>> print(unknown("target", "openvno", ["openvino", "onnxruntime"]))
    unknown target 'openvno': did you mean 'openvino'? known: onnxruntime, openvino
    """
    names = sorted(known)
    message = f"unknown {kind} '{name}'"
    nearest = difflib.get_close_matches(str(name), names, n=1)
    if not nearest:
        folded = {candidate.lower(): candidate for candidate in names}
        nearest = [folded[match] for match in difflib.get_close_matches(str(name).lower(), folded, n=1)]
    if nearest:
        message += f": did you mean '{nearest[0]}'? known: {', '.join(names)}"
    elif names:
        message += f"; known: {', '.join(names)}"
    else:
        message += "; none are known here"
    return InputError(message)
