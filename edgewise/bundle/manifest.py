"""The manifest of a bundle: what `manifest.json` says, and how it is read and written.

The schema is strict: an unknown key is an error, and so is a missing one. Nothing in a manifest depends on
the time or the place of the build, so that two builds of the same recipe are byte-identical.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from edgewise.bundle.pipeline import Pipeline
from edgewise.document import parse as document_of
from edgewise.document import readable, validate
from edgewise.errors import InputError, unknown
from edgewise.schema import Strict
from edgewise.verify.ladder import Rung

FORMAT = "edgewise-bundle"
SCHEMA_VERSION: Final = 7
"""Goes up with every new key, as older readers refuse keys that they do not know. All lower versions are read: new keys have
defaults. 2: `notes`. 3: `pipeline`. 4: `calibration`, `quantisation`. 5: `variant_of`, `function`, and
`compress` of components. 6: `media_items` of a pipeline, `states` of an artifact.
7: `classes`."""
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]

# Path parts that Windows gives to a device, whatever their suffix.
_DEVICE = re.compile(r"^(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?$", re.IGNORECASE)


def path_fault(path: str) -> str | None:
    """Say why `path` may not be used inside a bundle, or give None if it may.

    A bundle is copied between machines, so a path must mean the same file on each of them: relative, forward
    slashes, and no part that leaves the folder or has a meaning of its own.
    """
    if not path:
        return "it is empty"
    if "\\" in path:
        return "it has a backslash"
    if path.startswith("/") or ":" in path:
        return "it is absolute"
    if not path.isprintable():
        return "it has a character that cannot be printed"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return f"it has the part '{part}'"
        if part != part.rstrip(". "):
            return f"its part '{part}' ends in a dot or a blank"
        if _DEVICE.match(part):
            return f"its part '{part}' is the name of a device"
    return None


def _checked_path(path: str) -> str:
    fault = path_fault(path)
    if fault:
        raise ValueError(f"path {path!r} is not allowed in a bundle: {fault}")
    return path


class TensorInfo(Strict):
    """One input or output: name, static shape, dtype (a numpy name: `float32`), `meaning` in words."""

    name: str
    shape: tuple[Count, ...]
    dtype: str
    meaning: str = ""


class Site(Strict):
    """A place where tokens were compressed: how many came in and how many went out."""

    name: str
    method: str
    tokens_in: Count
    tokens_out: Count


class ModelInfo(Strict):
    """Identity of the model: where it is from, its class, number of parameters, digest of its weights."""

    source: str
    class_name: str
    parameters: Count
    weights_digest: str


class Component(Strict):
    """One graph of the model. FLOPs count a multiply and an add as two; before and after compression. `variant_of`: the role of the
    component that this one is another compression of, by the specs `compress`."""

    role: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    sites: tuple[Site, ...] = ()
    flops_before: Count
    flops_after: Count
    variant_of: str | None = None
    compress: tuple[str, ...] = ()


class Floating(Strict):
    """A layer whose sensitivity accuracy control measured: signal to noise of the outputs in dB where it alone is quantised (None:
    they are exact), and the bytes that quantising it saves."""

    layer: str
    sqnr_db: float | None
    bytes: Count


class Quantisation(Strict):
    """How an artifact was quantised: the number of its layers, those that were `skipped` as asked, and what accuracy control did
    (`metric` None: there was none). `unquantised`, `all_quantised` and `result` are the metric on `held_out` samples of the
    artifact before, with every layer quantised, and as it is; `floating` are the layers that stay in floating point,
    `sensitivity` all that were measured, both the most sensitive first."""

    layers: Count
    skipped: tuple[str, ...] = ()
    floating: tuple[Floating, ...] = ()
    sensitivity: tuple[Floating, ...] = ()
    metric: str | None = None
    held_out: Count = 0
    unquantised: float | None = None
    all_quantised: float | None = None
    result: float | None = None


class Calibration(Strict):
    """The data of the statistics: its name, the number of samples, and their SHA-256."""

    data: str
    samples: Count
    digest: Digest


class Artifact(Strict):
    """What one target made of one component, with the versions of the tools that made it. `function`: which one of `files` it is,
    where they hold several. `states`: inputs of the component that this artifact keeps from run to run instead, in half precision,
    and writes itself (see `edgewise.bundle.pipeline`)."""

    target: str
    role: str
    precision: str
    files: tuple[str, ...] = Field(min_length=1)
    versions: dict[str, str] = {}
    warnings: tuple[str, ...] = ()
    threads: Annotated[int, Field(ge=1)] | None = None
    quantisation: Quantisation | None = None
    function: str | None = None
    states: tuple[str, ...] = ()

    @field_validator("files")
    @classmethod
    def _paths(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked_path(file) for file in files)

    @property
    def label(self) -> str:
        """The artifact's short name, unique in its bundle: `openvino/vision_encoder/fp16`."""
        return f"{self.target}/{self.role}/{self.precision}"

    @property
    def base_role(self) -> str:
        """The role of the component that this is one of several compressions of: `vision_encoder` of `vision_encoder.fast`."""
        return self.role if self.function is None else self.role.removesuffix(f".{self.function}")


class FileInfo(Strict):
    """Digest (SHA-256, hexadecimal) and size of one file of the bundle."""

    sha256: Digest
    bytes: Count


class Manifest(Strict):
    """All that a bundle says of itself.

    `files` holds every file of the bundle but `manifest.json`; `notes` what the export adjusted or left out, in words;
    `pipeline` how the components make one generative model (None: they are used one by one);
    `classes` the names of a classifier's classes by number, where the model has some.
    """

    format: Literal["edgewise-bundle"] = "edgewise-bundle"
    schema_version: Literal[1, 2, 3, 4, 5, 6, 7] = SCHEMA_VERSION
    edgewise_version: str
    model: ModelInfo
    compress: tuple[str, ...] = ()
    components: tuple[Component, ...]
    pipeline: Pipeline | None = None
    preprocessing: dict[str, Any] = {}
    targets: tuple[Artifact, ...] = ()
    verification: tuple[Rung, ...] = ()
    notes: tuple[str, ...] = ()
    calibration: Calibration | None = None
    classes: tuple[str, ...] = ()
    golden: dict[str, str] = {}
    seed: int = 0
    recipe: str = "recipe.yaml"
    files: dict[str, FileInfo] = {}

    @field_validator("recipe")
    @classmethod
    def _recipe_path(cls, recipe: str) -> str:
        return _checked_path(recipe)

    @field_validator("golden")
    @classmethod
    def _golden_paths(cls, golden: dict[str, str]) -> dict[str, str]:
        for path in golden.values():
            _checked_path(path)
        return golden

    @field_validator("files")
    @classmethod
    def _file_paths(cls, files: dict[str, FileInfo]) -> dict[str, FileInfo]:
        folded: dict[str, str] = {}
        for path in files:
            _checked_path(path)
            if path == MANIFEST_NAME:
                raise ValueError(f"{MANIFEST_NAME} cannot hold its own digest")
            # Two names that differ in case only are one file on macOS and Windows.
            other = folded.setdefault(path.casefold(), path)
            if other != path:
                raise ValueError(f"paths {other!r} and {path!r} are the same file on some systems")
        return files

    @model_validator(mode="after")
    def _unique(self) -> Manifest:
        for kind, names in (
            ("component", [component.role for component in self.components]),
            ("artifact", [artifact.label for artifact in self.targets]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{kind} {', '.join(twice)} is there more than once")
        if self.pipeline is not None:
            missing = set(self.pipeline.order) - {component.role for component in self.components}
            if missing:
                raise ValueError(f"the pipeline runs {', '.join(sorted(missing))}, which is no component")
            if self.pipeline.tokenizer is not None:
                _checked_path(self.pipeline.tokenizer)
        return self

    def listed_paths(self) -> tuple[str, ...]:
        """Every path that the manifest points at: artifacts, golden files, the recipe and a tokenizer."""
        paths = [file for artifact in self.targets for file in artifact.files]
        tokenizer = self.pipeline.tokenizer if self.pipeline is not None else None
        return (*paths, *self.golden.values(), self.recipe, *((tokenizer,) if tokenizer else ()))

    def component(self, role: str) -> Component:
        """The component with this role. Raises `InputError` with the nearest role if there is none."""
        for component in self.components:
            if component.role == role:
                return component
        raise unknown("role", role, [component.role for component in self.components])


def dump(manifest: Manifest) -> bytes:
    """Serialise a manifest: sorted keys, indent 1, trailing newline. Equal manifests give equal bytes."""
    document = manifest.model_dump(mode="json")
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (readable(text) + "\n").encode("utf-8")


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest from bytes; `where` names the file in messages.

    Raises `InputError` if the bytes are too many, not JSON, too deeply nested, name a key twice, are of
    another format or schema version, or do not fit the schema.
    """
    document = document_of(data, where, "manifest", limit=MAX_MANIFEST_BYTES, mend=_MEND)
    if document.get("format") != FORMAT:
        raise InputError(f'{where} is not the manifest of an edgewise bundle: it lacks "format": "{FORMAT}".')
    version = document.get("schema_version")
    if version not in range(1, SCHEMA_VERSION + 1) or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        mend = "Upgrade edgewise to read it." if newer else "Export the model again."
        raise InputError(
            f"{where} has schema_version {version!r}; this edgewise reads 1 to {SCHEMA_VERSION}. {mend}"
        )
    return validate(Manifest, data, where, "manifest", _MEND)


_MEND = "Copy the bundle again, or export the model again."
