"""Tables of what a manifest says, which several verbs show."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from edgewise.bundle import Bundle, Component, Manifest
from edgewise.cli.screen import flops, number, row, size, table
from edgewise.verify import Rung, worst

_RESULTS = {True: ("passed", "green"), False: ("FAILED", "red")}


def sites(component: Component) -> Table:
    """Tokens before and after every site of a component."""
    made = table(f"{component.role}: tokens", "site", "method", "in", "out", right=("in", "out"))
    for site in component.sites:
        row(made, site.name, site.method, site.tokens_in, site.tokens_out)
    return made


def cost(component: Component) -> str:
    """One line: what a run of a component costs, and cost before it was compressed."""
    before, after = component.flops_before, component.flops_after
    if not component.sites:
        return f"{component.role}: {flops(after)}, not compressed"
    change = f" ({after / before - 1:+.1%})" if before else ""
    return f"{component.role}: {flops(before)} before, {flops(after)} after compression{change}"


def caches(manifest: Manifest) -> list[Table]:
    """What compression made of each stage of a pipeline, and the cache of every decoder layer; nothing for a bundle without one."""
    pipeline = manifest.pipeline
    if pipeline is None:
        return []
    tables = []
    if pipeline.stages:
        numbers = ("media tokens", "FLOPs", "caches")
        made = table("stages: with all tokens, and as compressed", "stage", *numbers, right=numbers)
        for one in pipeline.stages:
            held = f"{size(one.cache_bytes_before)} > {size(one.cache_bytes)}" if one.cache_bytes else None
            cost = f"{flops(one.flops_before)} > {flops(one.flops)}"
            row(made, one.role, f"{one.tokens_before} > {one.tokens}", cost, held)
        tables.append(made)
    columns = ("media", "after prefill", "slots", "bytes")
    made = table("caches: tokens", "layer", *columns, right=columns)
    for i, layer in enumerate(pipeline.caches):
        row(made, i, layer.media, layer.tokens, layer.slots, size(layer.bytes))
    row(made, "all", None, None, None, size(pipeline.cache_bytes))
    return [*tables, made]


def ladder(rungs: Sequence[Rung], title: str = "verification") -> Table:
    """The rungs of a ladder, each with the worst error of its outputs."""
    numbers = ("max abs", "relative", "SQNR dB", "cosine", "top-1", "kept", "allowed")
    made = table(title, "check", "against", *numbers, "result", right=numbers)
    for rung in rungs:
        errors = worst(rung.outputs.values()) if rung.outputs else None
        result = Text(*_RESULTS[rung.passed]) if rung.passed is not None else Text(rung.note or "informative", "dim")
        row(
            made,
            rung.name,
            rung.against,
            number(errors.max_abs if errors else None),
            "not finite" if errors and not errors.finite else number(errors.relative if errors else None),
            number(errors.sqnr_db if errors else None, ".1f"),
            number(errors.cosine if errors else None, ".6f"),
            number(errors.top1 if errors else None, ".1%"),
            number(rung.kept_overlap, ".1%"),
            number(rung.threshold, ".0e"),
            result,
        )
    return made


def artifacts(bundle: Bundle) -> Table:
    """Artifacts with their files, sizes and the tools that made them."""
    made = table("artifacts", "artifact", "files", "size", "made with", right=("size",))
    first: dict[tuple[str, ...], str] = {}
    for artifact in bundle.manifest.targets:
        made_with = ", ".join(f"{package} {version}" for package, version in sorted(artifact.versions.items()))
        holder = first.setdefault(artifact.files, artifact.label)
        if holder == artifact.label:
            row(made, artifact.label, "\n".join(artifact.files), size(_bytes(bundle, artifact.files)), made_with)
        else:
            row(made, artifact.label, f"function {artifact.function} of the files of {holder}", None, made_with)
    return made


def quantised(bundle: Bundle) -> list[Table | str]:
    """What accuracy control left in floating point, and what that costs; what quantisation is of each artifact."""
    shown: list[Table | str] = []
    for artifact in bundle.manifest.targets:
        record = artifact.quantisation
        if record is None:
            continue
        count = record.layers - len(record.skipped) - len(record.floating)
        left = f", {len(record.skipped)} left out as asked" if record.skipped else ""
        line = f"{artifact.label}: {count} of {record.layers} layers quantised{left}"
        if record.metric is not None:
            line += (
                f"; {record.metric} on {record.held_out} held-out samples: {record.unquantised:.2%} before, "
                f"{record.all_quantised:.2%} with every layer, {record.result:.2%} as it is"
            )
        shown.append(line)
        if record.floating:
            made = table(
                f"{artifact.label}: layers in floating point", "layer", "SQNR dB if quantised", "costs",
                right=("SQNR dB if quantised", "costs"),
            )  # fmt: skip
            for one in record.floating:
                row(made, one.layer, number(one.sqnr_db, ".1f"), size(one.bytes))
            shown.append(made)
    return shown


def notes(manifest: Manifest) -> list[str]:
    """One line for each note: on the export, and on the checks that passed with one."""
    checked = [rung.note for rung in manifest.verification if rung.passed and rung.note]
    return [f"note: {note}" for note in dict.fromkeys([*manifest.notes, *checked])]


def tensors(manifest: Manifest) -> Table:
    """Inputs and outputs of every component."""
    made = table("inputs and outputs", "component", "", "name", "shape", "dtype")
    for component in manifest.components:
        for kind, infos in (("input", component.inputs), ("output", component.outputs)):
            for info in infos:
                row(made, component.role, kind, info.name, "x".join(map(str, info.shape)) or "scalar", info.dtype)
    return made


def artifact_sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes of every artifact by its label."""
    return {artifact.label: _bytes(bundle, artifact.files) for artifact in bundle.manifest.targets}


def _bytes(bundle: Bundle, files: Sequence[str]) -> int:
    return sum(bundle.manifest.files[name].bytes for name in files)
