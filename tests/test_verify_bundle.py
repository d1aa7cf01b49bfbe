from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tiny_programs
import torch
from bundle_helpers import ROLE, component, manifest
from tiny_bundles import build, infos, make

from edgewise import targets
from edgewise.bundle import Bundle, Golden, Manifest, write_bundle
from edgewise.errors import InputError, MissingExtra
from edgewise.verify.bundle import SAME_CHOICES, batched, run_all, threshold, verify_bundle
from edgewise.verify.ladder import Rung


@pytest.fixture(scope="module")
def one() -> tiny_programs.Case:
    torch.manual_seed(0)
    return tiny_programs.block()


@pytest.fixture(scope="module")
def bundle(one: tiny_programs.Case, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make(tmp_path_factory.mktemp("bundles") / "good", one)


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Let packages be absent."""
    version = metadata.version

    def lookup(package: str) -> str:
        if package in packages:
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", lookup)


def test_every_artifact_is_run_and_judged(bundle: Bundle) -> None:
    labels: list[str] = []
    rungs = verify_bundle(bundle, progress=labels.append)
    assert labels == [f"openvino/{ROLE}/fp32", f"onnxruntime/{ROLE}/fp32"]
    assert [rung.name for rung in rungs] == labels
    for rung in rungs:
        assert (rung.kind, rung.passed, rung.threshold) == ("lowering", True, 1e-4)
        assert rung.outputs["o1"].top1 == 1.0
        assert rung.outputs["o0"].top1 is None


def test_some_targets_only(bundle: Bundle) -> None:
    assert [rung.name for rung in verify_bundle(bundle, ["openvino"], threads=1)] == [f"openvino/{ROLE}/fp32"]
    with pytest.raises(InputError, match="did you mean 'openvino'"):
        verify_bundle(bundle, ["openvno"])


def test_a_wrong_artifact_fails(one: tiny_programs.Case, tmp_path: Path) -> None:
    wrong = make(tmp_path / "wrong", one, kinds=[("openvino", "fp32")], shift=0.5)
    assert [rung.passed for rung in verify_bundle(wrong)] == [False]


def test_without_a_threshold_nothing_passes(one: tiny_programs.Case, tmp_path: Path) -> None:
    rungs = verify_bundle(make(tmp_path / "b", one, kinds=[("openvino", "fp32")], threshold=None))
    assert [rung.passed for rung in rungs] == [None]
    assert "no threshold" in rungs[0].note
    assert rungs[0].outputs


def test_a_missing_runtime_is_skipped_and_does_not_pass(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "openvino")
    skipped, ran = verify_bundle(bundle)
    assert (skipped.passed, skipped.outputs) == (None, {})
    assert skipped.note.startswith("skipped: openvino is not installed")
    assert 'pip install "edgewise[openvino]"' in skipped.note
    assert ran.passed is True


def test_no_runtime_at_all(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "openvino", "onnxruntime")
    with pytest.raises(MissingExtra, match=r"(?s)no artifact.*edgewise\[onnxruntime\].*edgewise\[openvino\]"):
        verify_bundle(bundle)


def test_a_bundle_without_artifacts(one: tiny_programs.Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no artifacts"):
        verify_bundle(make(tmp_path / "b", one, kinds=[]))


def test_an_artifact_that_the_manifest_describes_wrongly(one: tiny_programs.Case, tmp_path: Path) -> None:
    def lies(folder: Path) -> Manifest:
        built = build(one, [("openvino", "fp32")])(folder)
        renamed = {f"other_{name}": value for name, value in one.expected.items()}
        return built.model_copy(
            update={"components": (component(inputs=infos(one.feeds), outputs=infos(renamed)),)}
        )

    with pytest.raises(InputError, match=r"outputs of .* are not those that the manifest gives"):
        verify_bundle(write_bundle(tmp_path / "b", lies))


def test_golden_inputs_that_do_not_fit(bundle: Bundle) -> None:
    golden = Golden({"i0x": np.ones((1, 1))}, {"o0": np.ones((1, 1))}, {}, 1)
    with (
        targets.load(bundle, bundle.manifest.targets[0]) as session,
        pytest.raises(InputError, match="unknown input 'i0x': did you mean 'i0'"),
    ):
        run_all(session, golden)


def test_samples_become_rows() -> None:
    stacked = {
        "scores": np.ones((2, 3, 10)),
        "tokens": np.ones((2, 3, 7, 10)),
        "flat": np.ones((2, 10)),
        "one": np.ones(2),
    }
    shapes = {name: value.shape for name, value in batched(stacked).items()}
    assert shapes == {"scores": (6, 10), "tokens": (6, 7, 10), "flat": (2, 10), "one": (2,)}


def test_a_target_of_the_future(bundle: Bundle, tmp_path: Path) -> None:
    artifact = bundle.manifest.targets[0].model_copy(update={"target": "warpdrive"})
    newer = Bundle(bundle.path, manifest(targets=(artifact,), components=bundle.manifest.components))
    with pytest.raises(InputError, match="unknown target 'warpdrive'"):
        verify_bundle(newer)


def test_other_choices_have_a_limit_of_their_own(one: tiny_programs.Case, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", one, kinds=[("openvino", "fp32")], threshold=None)
    artifact = bundle.manifest.targets[0]
    errors = verify_bundle(bundle)[0].outputs["o0"].model_copy(update={"relative": 0.002})
    own = Rung(name=artifact.label, against="compressed", kind="lowering", outputs={"o0": errors})
    alike = Rung(name=artifact.label + SAME_CHOICES, against="compressed", kind="lowering", threshold=1e-4, passed=True)
    for rungs, limit in (((own, alike), 0.02), ((own,), None), ((alike,), None)):
        manifest = bundle.manifest.model_copy(update={"verification": rungs})
        assert threshold(manifest, artifact) == limit
