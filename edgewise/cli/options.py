"""The flags that several verbs share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MOST_SEED = 2**63 - 1
"""As the random numbers of torch take it."""

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; text for people goes to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no messages.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]

BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder that `edgewise export` wrote.")]
Targets = Annotated[list[str] | None, typer.Option("--target", help="Only this target. Repeatable.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of the runtime. Default: its own choice.")
]

Compress = Annotated[
    list[str] | None,
    typer.Option(
        "--compress",
        metavar="SPEC",
        help="METHOD[@SITE][:key=value,...], such as tome:keep=0.5. Repeatable. See `edgewise methods`.",
    ),
]
Function = Annotated[
    str | None,
    typer.Option("--function", metavar="NAME", help="Only this function, of artifacts that hold several compressions."),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option("--input-shapes", metavar="NAME=AxB", help="Static shape of an input. Repeatable."),
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="First dimension of the inputs. Default: 1.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=MOST_SEED, help="Seed of example inputs. Default: 0.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a Hugging Face model.")
]
WeightsOnly = Annotated[
    bool,
    typer.Option("--weights-only", help="Accept pickled weights, read with torch's restricted unpickler."),
]
DATA_HELP = (
    "demo:NAME; a folder of images, recordings or videos, or of one such folder for each class; a .csv, .tsv or .jsonl with a "
    "column file and one of label or text; an .npz or .safetensors"
)
MODEL_HELP = "A Hugging Face id or local folder, py:package.module:factory, a .pt2 file, or demo:NAME"
