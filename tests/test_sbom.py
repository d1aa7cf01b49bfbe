"""The bill of materials fits CycloneDX's schema, and provenance names the bytes and the commit; neither holds a time."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from bundle_helpers import make
from conftest import Cli
from test_build import in_turn

from edgewise.builder.build import build
from edgewise.builder.provenance import source
from edgewise.builder.sbom import purl, sbom


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git(folder: Path, *args: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    return subprocess.run(["git", *who, *args], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_what_a_build_writes(cli: Cli, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "__kwdefaults__", {**(build.__kwdefaults__ or {}), "engine": in_turn})
    (tmp_path / "recipe.yaml").write_text(f"name: one\nmodel: {tiny}:make\ntargets: onnxruntime\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "First")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert cli("build", "recipe.yaml", "-o", "out").code == 0
    bill, statement = (json.loads((tmp_path / "out" / f"one.{kind}.json").read_text()) for kind in ("cdx", "provenance"))
    bundle = tmp_path / "out" / "one"
    here = {p.relative_to(bundle).as_posix(): digest(p) for p in bundle.rglob("*") if p.is_file()}
    assert {c["name"]: c["hashes"][0]["content"] for c in bill["components"] if c["type"] == "file"} == here
    assert {s["name"]: s["digest"]["sha256"] for s in statement["subject"]} == {f"one/{k}": v for k, v in here.items()}
    libraries = {c["name"]: c["version"] for c in bill["components"] if c["type"] == "library"}
    import onnx

    assert libraries["onnx"] == onnx.__version__
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["recipe"]["model"] == f"{tiny}:make"
    first = definition["resolvedDependencies"][0]
    assert first["digest"] == {"gitCommit": commit} and first["annotations"] == {"changed": False}
    # The same again, byte by byte; and a build that finds all there writes what is missing.
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.json")}
    (tmp_path / "out" / "one.cdx.json").unlink()
    assert cli("build", "recipe.yaml", "-o", "out").code == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.json")} == before


def test_the_bill_fits_the_schema(tmp_path: Path) -> None:
    pytest.importorskip("cyclonedx", reason="needs cyclonedx-python-lib")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    made = make(tmp_path / "b")
    bill = sbom("b", made.manifest, {"torch": "2.13.0+cpu", "Some_Name": "1!2.0"})
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(bill)) is None
    # The validator sees faults.
    assert validator.validate_str(json.dumps({**bill, "components": [{"type": "file"}]})) is not None
    assert bill == sbom("b", made.manifest, {"Some_Name": "1!2.0", "torch": "2.13.0+cpu"})
    references = [component["bom-ref"] for component in bill["components"]]
    assert len(set(references)) == len(references)


def test_package_urls() -> None:
    packageurl = pytest.importorskip("packageurl", reason="needs packageurl-python")
    for name, version in (("torch", "2.13.0+cpu"), ("Some_Name", "1!2.0")):
        parsed = packageurl.PackageURL.from_string(purl(name, version))
        assert (parsed.type, parsed.name, parsed.version) == ("pypi", name.lower().replace("_", "-"), version)


def test_the_source_of_a_checkout(tmp_path: Path) -> None:
    assert source(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert source(tmp_path) is None
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "First")
    for remote, uri in (
        ("https://user:secret@example.com/x.git", "git+https://example.com/x.git"),
        ("git@example.com:a/x.git", "git+ssh://git@example.com/a/x.git"),
    ):
        git(tmp_path, "config", "remote.origin.url", remote)
        found = source(tmp_path)
        assert found is not None and found["uri"] == uri
    (tmp_path / "new").write_text("untracked files are no change")
    assert source(tmp_path)["annotations"] == {"changed": False}  # type: ignore[index]
    (tmp_path / "a").write_text("2")
    assert source(tmp_path)["annotations"] == {"changed": True}  # type: ignore[index]
