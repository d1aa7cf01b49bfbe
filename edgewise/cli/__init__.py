"""The command line: parse, call the library, print. One module for each verb.

Exit codes: 0 done, 1 checked and failed, 2 bad input or environment, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from edgewise.cli import (
    bench,
    build,
    compare,
    diff,
    explain,
    export,
    fit,
    inspect,
    lint,
    listings,
    report,
    run,
    tune,
    verify,
)
from edgewise.cli.screen import ReaderGone, Result
from edgewise.document import readable
from edgewise.errors import EdgewiseError, Refused, extras_named, unknown
from edgewise.version import __version__

INTERRUPTED = 130

# The base of all usage errors. Its module differs between versions of typer.
_UsageError: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="edgewise",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> Result | None:
    """Put multimodal models on edge devices, with fewer tokens."""
    if context.invoked_subcommand is not None:
        return None
    if version:
        if not json:
            print(f"edgewise {__version__}")
        return Result({"edgewise": __version__})
    # Help is the answer that was asked for, and so it goes to stdout.
    print(context.get_help())
    return Result({"verbs": sorted(_VERBS)})


_VERBS: dict[str, Callable[..., Result]] = {
    "export": export.export,
    "build": build.build,
    "inspect": inspect.inspect,
    "lint": lint.lint,
    "explain": explain.explain,
    "fit": fit.fit,
    "compare": compare.compare,
    "tune": tune.tune,
    "diff": diff.diff,
    "verify": verify.verify,
    "run": run.run,
    "bench": bench.bench,
    "report": report.report,
    "methods": listings.methods,
    "targets": listings.targets,
    "models": listings.models,
    "sys": listings.system,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(_verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, and give its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what no encoding can say
            stream.reconfigure(errors="backslashreplace")
    # Looked for by hand: a usage error must be JSON too, and then nothing was parsed.
    as_json, debug = "--json" in args, "--debug" in args
    with _kept_clean(as_json):
        result = _result(args, debug)
    try:
        if as_json and result.document is not None:
            print(readable(json.dumps(result.document, indent=1, ensure_ascii=_narrow(sys.stdout), allow_nan=False)))
        sys.stdout.flush()
    except BrokenPipeError:
        _discard()
    return result.code


def _narrow(stream: Any) -> bool:
    """Whether a stream cannot say every character: JSON has escapes for them."""
    return not (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def _discard() -> None:
    """Let the interpreter flush what is left of stdout into nothing when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _result(args: list[str], debug: bool) -> Result:
    """Run a command line; an error becomes a message on stderr and a document."""
    try:
        if not debug:
            warnings.simplefilter("ignore")
            # transformers imports torchao where it is installed, which tells of kernels for GPUs that do not load without one.
            for name in ("torchao", "torch.utils._pytree"):
                logging.getLogger(name).setLevel(logging.ERROR)
        _check_verb(args)
        with extras_named():
            done = typer.main.get_command(app).main(args=args, prog_name="edgewise", standalone_mode=False)
        if isinstance(done, Result):
            return done
        # The code of an early exit: --help, or an interrupt.
        return Result(None, done if isinstance(done, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        return _failed("interrupted", {"kind": "Interrupted"}, INTERRUPTED)
    except (ReaderGone, BrokenPipeError):
        _discard()
        return Result(None)
    except SystemExit as stop:  # not ours: the code of a model may do anything
        return _failed(f"the code of the model ended the program with {stop.code!r}", {"kind": "SystemExit"}, 2)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _explained(error)


def _explained(error: Exception) -> Result:
    """What a failed verb gives back, and what it says."""
    details: dict[str, Any] = {"kind": type(error).__name__}
    if isinstance(error, EdgewiseError):
        if isinstance(error, Refused):
            details |= {
                "reason": error.reason,
                "node": error.node,
                "source": error.source,
                "method": error.method,
            }
        return _failed(str(error), details, error.exit_code)
    if isinstance(error, _UsageError):
        return _failed(_usage(error), {"kind": "UsageError"}, 2)
    if isinstance(error, OSError) and error.filename and error.strerror:  # a name too long, a loop of links, no permission
        return _failed(f"{os.fsdecode(error.filename)}: {error.strerror}", details, 2)
    text = " ".join(str(error).split())
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    hint = "this is not an error that edgewise expects; --debug shows where it comes from"
    return _failed(f"{said} ({hint})", details, 2)


def _usage(error: Any) -> str:
    """The message of a usage error, with the nearest flag and where to read on."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "edgewise"
    flag = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and flag and context is not None:
        known = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
        text = str(unknown("flag", flag, [*known, "--help"]))
    else:
        text = error.format_message().rstrip(".")
    return f"{text} (see {path} --help)"


def _check_verb(args: list[str]) -> None:
    """Raise `InputError` with the nearest verb if the first word is none."""
    word = next((word for word in args if not word.startswith("-")), None)
    if word is not None and word not in _VERBS:
        raise unknown("verb", word, _VERBS)


def _failed(message: str, details: dict[str, Any], code: int) -> Result:
    print(f"error: {message}", file=sys.stderr)
    return Result({"error": {**details, "message": message, "exit_code": code}}, code)


@contextlib.contextmanager
def _kept_clean(as_json: bool) -> Iterator[None]:
    """Send to stderr what anything prints on stdout meanwhile, compiled code too: only the document may go there."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # stdout is closed
        yield
        return
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


__all__ = ["app", "main"]
