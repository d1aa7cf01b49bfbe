"""`edgewise verify`: check a bundle, and run its artifacts against their golden outputs and labelled data."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgewise.cli import options, tables
from edgewise.cli.screen import Result, Screen, row, table
from edgewise.cli.spoken import is_speech, word_error_rates
from edgewise.errors import InputError
from edgewise.verify.data import accuracy
from edgewise.verify.questions import answers_questions, exact_match
from edgewise.verify.retrieval import RANKS, has_two_towers, recall


def verify(
    bundle: options.BundleFolder,
    target: options.Targets = None,
    function: options.Function = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SRC",
            help=f"Measure accuracy on labelled data: {options.DATA_HELP}. Of a speech model a table (.tsv, .csv) with the columns "
            "`file` and `text`: measure the word error rate. Of a model that answers about images or recordings demo:vqa (images), "
            "or a table with the columns `file`, `question` and `answer`: measure the exact match of its answers. Of a model with "
            "two towers (CLIP) an .npz with an array for each input, whose rows are pairs: measure recall@1 and recall@5.",
        ),
    ] = None,
    data_samples: Annotated[
        int | None,
        typer.Option("--data-samples", metavar="N", min=1, help="Only so many samples of the data. Default: all."),
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> Result:
    """Check every file of BUNDLE, and run its artifacts on this machine against the golden outputs."""
    from edgewise.bundle import Bundle
    from edgewise.verify.bundle import verify_bundle

    screen = Screen(json, quiet)
    opened = Bundle.open(bundle)
    spoken = data is not None and is_speech(opened)
    asked = data is not None and answers_questions(opened)
    paired = data is not None and has_two_towers(opened)
    if data_samples is not None and data is None:
        raise InputError("--data-samples goes with --data")
    with screen.progress() as step:
        rungs = verify_bundle(
            opened, target or None, function=function, threads=threads, progress=lambda label: step(0, 0, f"run {label}")
        )
    screen.show(tables.ladder(rungs))
    scores: list[dict[str, Any]] = []
    notes: list[str] = []

    def noted(text: str) -> None:
        notes.append(text.removeprefix("note: "))
        screen.say(text)

    if data is not None and not spoken and not asked and not paired:
        scores = accuracy(opened, data, target or None, threads, screen.counter, noted, data_samples, function)
        numbers = ("samples", "correct", "top-1")
        made = table(f"accuracy on {data}", "artifact", *numbers, right=numbers)
        for score in scores:
            row(made, score["artifact"], score["samples"], score["correct"], f"{score['top1']:.2%}")
        screen.show(made)
    rates: list[dict[str, Any]] = []
    if data is not None and spoken:
        rates = word_error_rates(opened, data, target or None, threads, screen.counter, data_samples)
        counts = ("recordings", "words", "replaced", "left out", "added", "word error rate")
        made = table(f"transcripts of {data}", "target", *counts, right=counts)
        for rate in rates:
            errors = [rate[kind] for kind in ("substitutions", "deletions", "insertions")]
            row(made, rate["artifact"], rate["samples"], rate["words"], *errors, f"{rate['wer']:.2%}")
        screen.show(made)
    answers: list[dict[str, Any]] = []
    if data is not None and asked:
        answers = exact_match(opened, data, target or None, threads, screen.counter, data_samples)
        columns = ("questions", "right", "exact match")
        made = table(f"answers to {data}", "target", *columns, right=columns)
        for one in answers:
            row(made, one["artifact"], one["samples"], one["correct"], f"{one['exact_match']:.2%}")
        screen.show(made)
    recalls: list[dict[str, Any]] = []
    if data is not None and paired:
        recalls = recall(opened, data, target or None, threads, screen.counter, noted, data_samples, function)
        ways = {"media_to_text": "of texts", "text_to_media": "of media"}
        shares = ("pairs", *(f"recall@{k} {what}" for what in ways.values() for k in RANKS))
        made = table(f"retrieval in {data}", "artifact", *shares, right=shares)
        for one in recalls:
            row(made, one["artifact"], one["samples"], *(f"{one[way][str(k)]:.2%}" for way in ways for k in RANKS))
        screen.show(made)
    failed = [rung.name for rung in rungs if rung.passed is False]
    checked = [rung.name for rung in rungs if rung.passed]
    if failed:
        screen.show(f"failed: {', '.join(failed)}")
    elif not checked:
        screen.show("every file is as the manifest says; no artifact has a threshold to be checked against")
    else:
        screen.show(f"every file is as the manifest says, and {len(checked)} of {len(rungs)} artifacts passed")
    return Result(
        {
            "bundle": str(bundle),
            "passed": not failed,
            "verification": [rung.model_dump(mode="json") for rung in rungs],
            "notes": notes,
            "accuracy": scores if data is not None and not spoken and not asked and not paired else None,
            "wer": rates if spoken else None,
            "exact_match": answers if asked else None,
            "recall": recalls if paired else None,
        },
        1 if failed else 0,
    )
