"""What two bundles differ in, from their bytes up to what they mean. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from edgewise import targets
from edgewise.bundle import Bundle, Manifest
from edgewise.bundle.reader import read_bytes
from edgewise.errors import EdgewiseError
from edgewise.schema import Strict
from edgewise.verify.metrics import compare, worst

Section = Literal[
    "files", "recipe", "model", "versions", "interface", "tokens", "compute", "ops", "tolerances", "figures", "golden", "notes"
]
_SECTIONS = get_args(Section)
_MOST_RECIPE = 1 << 20


class Difference(Strict):
    """One thing that differs: where, what it is called, and its value in A and in B as text. None: it is not there."""

    section: Section
    name: str
    a: str | None
    b: str | None


class Diff(Strict):
    """All differences of two bundles, in the order of the sections; `unknown` says what could not be compared, and why."""

    a: str
    b: str
    identical: bool
    differences: tuple[Difference, ...]
    unknown: tuple[str, ...] = ()


def diff(a: Bundle, b: Bundle) -> Diff:
    """Compare two opened bundles. Bundles of the same bytes have no differences, and need no further look."""
    names = str(a.path), str(b.path)
    if a.manifest == b.manifest:  # it holds the digest of every file
        return Diff(a=names[0], b=names[1], identical=True, differences=())
    unknown: list[str] = []
    views = [_view(bundle, unknown) for bundle in (a, b)]
    found = [
        Difference(section=section, name=name, a=_text(one.get(name)), b=_text(two.get(name)))
        for section in _SECTIONS
        for one, two in [(views[0].get(section, {}), views[1].get(section, {}))]
        for name in _order(one, two)
        if _text(one.get(name)) != _text(two.get(name))
    ]
    found += _golden(a, b, unknown)
    found.sort(key=lambda one: _SECTIONS.index(one.section))
    return Diff(a=names[0], b=names[1], identical=False, differences=tuple(found), unknown=tuple(dict.fromkeys(unknown)))


def _view(bundle: Bundle, unknown: list[str]) -> dict[str, dict[str, Any]]:
    """What a bundle says, by section and name."""
    manifest = bundle.manifest
    view: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    view["files"] = {name: f"{info.bytes} bytes, {info.sha256[:12]}" for name, info in manifest.files.items()}
    view["recipe"] = _recipe(bundle, unknown)
    view["model"] = {**manifest.model.model_dump(), "preprocessing": manifest.preprocessing or None}
    view["versions"] = {"edgewise": manifest.edgewise_version, "schema_version": manifest.schema_version}
    pipeline = getattr(manifest, "pipeline", None)
    view["interface"]["pipeline"] = None if pipeline is None else pipeline.model_dump(mode="json")
    for component in manifest.components:
        role = component.role
        for kind, infos in (("input", component.inputs), ("output", component.outputs)):
            for info in infos:
                view["interface"][f"{role} {kind} {info.name}"] = f"{info.dtype} {'x'.join(map(str, info.shape)) or 'scalar'}"
        for site in component.sites:
            view["tokens"][f"{role} {site.name}"] = f"{site.tokens_in} > {site.tokens_out} ({site.method})"
        view["compute"][f"{role} FLOPs before compression"] = component.flops_before
        view["compute"][f"{role} FLOPs"] = component.flops_after
    short = _short(manifest)
    for artifact in manifest.targets:
        name = short[artifact.label]
        view["versions"] |= {f"{name} {package}": version for package, version in artifact.versions.items()}
        view["figures"][f"{name} bytes"] = sum(manifest.files[name].bytes for name in artifact.files)
        view["notes"] |= {f"{name} warning: {warning}": "said" for warning in artifact.warnings}
        try:
            ops = targets.get(artifact.target).ops([bundle.file(name) for name in artifact.files])
        except EdgewiseError as error:
            ops = None
            unknown.append(f"ops of {bundle.path} {artifact.label}: {error}")
        else:
            if ops is None:
                unknown.append(f"ops of {artifact.label}: they cannot be read here")
        view["ops"] |= {f"{name} {op}": count for op, count in (ops or {}).items()}
    for rung in manifest.verification:
        label = next((label for label in short if rung.name.startswith(label)), "")
        name = f"{short.get(label, '')}{rung.name.removeprefix(label)} against {rung.against}"
        view["tolerances"][name] = rung.threshold
        errors = worst(rung.outputs.values()) if rung.outputs else None
        view["figures"][f"{name}: relative error"] = None if errors is None else errors.relative
        view["figures"][f"{name}: top-1 agreement"] = None if errors is None else errors.top1
        view["figures"][f"{name}: kept overlap"] = rung.kept_overlap
        view["figures"][f"{name}: passed"] = rung.passed
    view["notes"] |= {note: "said" for note in manifest.notes}
    return view


def _short(manifest: Manifest) -> dict[str, str]:
    """A name for each artifact, by its label: without the precision where there is one, so that `fp32` is compared with `fp16`."""
    names = [f"{artifact.target}/{artifact.role}" for artifact in manifest.targets]
    labels = [artifact.label for artifact in manifest.targets]
    return {label: label if names.count(name) > 1 else name for label, name in zip(labels, names, strict=True)}


def _recipe(bundle: Bundle, unknown: list[str]) -> dict[str, Any]:
    """The keys of the recipe, as far as YAML can be read here."""
    try:
        import yaml
    except ModuleNotFoundError:
        unknown.append("recipes: PyYAML is not installed")
        return {}
    try:
        document = yaml.safe_load(read_bytes(bundle.file(bundle.manifest.recipe), _MOST_RECIPE))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        unknown.append(f"recipe of {bundle.path}: {' '.join(str(error).split())}")
        return {}
    return {str(key): value for key, value in document.items()} if isinstance(document, dict) else {}


def _golden(a: Bundle, b: Bundle, unknown: list[str]) -> Iterable[Difference]:
    """How far the golden tensors are from one another: of B relative to A."""
    for role in a.manifest.golden:
        if role not in b.manifest.golden:
            continue
        one, two = a.golden(role), b.golden(role)
        for kind in ("inputs", "outputs", "references"):
            first, second = getattr(one, kind), getattr(two, kind)
            for name in _order(first, second):
                if name not in first or name not in second or first[name].shape != second[name].shape:
                    shapes = [str(group[name].shape) if name in group else None for group in (first, second)]
                    yield Difference(section="golden", name=f"{role} {kind} {name}", a=shapes[0], b=shapes[1])
                elif not np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f"):
                    errors = compare(first[name], second[name])
                    far = f"max abs {errors.max_abs:.2e}, relative {errors.relative or 0:.2e}" if errors.finite else "not finite"
                    yield Difference(section="golden", name=f"{role} {kind} {name}", a="reference", b=far)


def _order(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*one, *two]))


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, default=str)

