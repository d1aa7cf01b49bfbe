"""The bundle: the folder that is shipped. Its manifest, its reader and its writer; needs no torch."""

from edgewise.bundle.manifest import (
    Artifact,
    Component,
    FileInfo,
    Manifest,
    ModelInfo,
    Site,
    TensorInfo,
)
from edgewise.bundle.reader import Bundle, Golden
from edgewise.bundle.writer import write_bundle

__all__ = [
    "Artifact",
    "Bundle",
    "Component",
    "FileInfo",
    "Golden",
    "Manifest",
    "ModelInfo",
    "Site",
    "TensorInfo",
    "write_bundle",
]
