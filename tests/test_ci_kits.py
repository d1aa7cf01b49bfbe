"""The CI kits: what their steps do is done here, as far as a shell can."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY

import edgewise
from edgewise.bundle import Bundle
from edgewise.exporter.matrix import read_recipes

ROOT = Path(__file__).parents[1]
KITS = ROOT / "examples" / "ci"
RECIPE = """
name: tiny
model: py:tiny_models:make
targets: onnxruntime
compress: tome:r=2
gates: {tokens: 13}
regressions: {record: none.json, size: 1}
"""


def load(name: str) -> Any:
    return yaml.safe_load((KITS / name).read_text("utf-8"))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a model, a recipe and the kits where they are to be copied."""
    folder = tmp_path / "a repository"
    shutil.copytree(KITS, folder / ".github" / "actions" / "edgewise")
    (folder / "ci").mkdir()
    shutil.copy(KITS / "build.sh", folder / "ci")
    (folder / "tiny_models.py").write_text(TINY)
    (folder / "recipe.yaml").write_text(RECIPE.replace("regressions: {record: none.json, size: 1}\n", ""))
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """`edgewise` is this package."""
    tools = tmp_path / "tools"
    tools.mkdir()
    command = tools / "edgewise"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgewise.cli "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    path = [str(Path(edgewise.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(path)}


def fill(text: str, inputs: dict[str, str], temporary: Path) -> str:
    """The expressions of a composite action, as GitHub fills them in."""

    def value(match: re.Match[str]) -> str:
        kind, name = match[1].split(".")
        return {"runner": {"temp": str(temporary), "os": "Linux"}, "inputs": inputs}[kind][name]

    return re.sub(r"\$\{\{\s*([\w.]+)\s*\}\}", value, text)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_kits_run(repository: Path, environment: dict[str, str], tmp_path: Path) -> None:
    action = load("action.yml")
    inputs = {name: one["default"] for name, one in action["inputs"].items()}
    temporary, summary = tmp_path / "runner", tmp_path / "summary.md"
    temporary.mkdir()
    workflow = load("github-workflow.yml")
    (step,) = [step for step in workflow["jobs"]["bundles"]["steps"] if step.get("uses", "").startswith("./")]
    assert (repository / step["uses"] / "action.yml").is_file()
    assert set(step["with"]) <= set(inputs)
    inputs |= step["with"]
    steps = [one for one in action["runs"]["steps"] if "run" in one]
    assert [one["name"] for one in steps] == ["Install edgewise", "Build"]
    install, build = steps
    assert install["run"] == 'python -m pip install "$PACKAGE"'  # CI installs the package before its tests
    assert all("${{" not in one["run"] for one in steps), "inputs in a script are an injection"
    github = {
        **environment,
        **{name: fill(value, inputs, temporary) for name, value in build["env"].items()},
        "GITHUB_ACTION_PATH": str(repository / step["uses"]),
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    done = run(["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", build["run"]], repository, github)
    assert done.returncode == 0, done.stderr
    Bundle.open(repository / "build" / "bundles" / "tiny")
    assert "all is well" in summary.read_text()
    uploaded = workflow["jobs"]["bundles"]["steps"][-1]
    assert uploaded["if"] == "always()" and (repository / uploaded["with"]["path"]).is_dir()
    cache = next(one for one in action["runs"]["steps"] if one.get("uses", "").startswith("actions/cache"))
    assert fill(cache["with"]["path"], inputs, temporary) == github["EDGEWISE_CACHE"] and os.listdir(github["EDGEWISE_CACHE"])

    # GitLab, in the same checkout: nothing is left to build.
    job = load("gitlab-ci.yml")["bundles"]
    gitlab = {**environment, **job["variables"], "EDGEWISE_CACHE": github["EDGEWISE_CACHE"]}
    done = run(["sh", "-e", "-c", "\n".join(job["script"])], repository, gitlab)
    assert done.returncode == 0 and "current" in done.stdout, done.stderr
    assert (repository / job["artifacts"]["reports"]["junit"]).is_file()
    assert job["variables"]["EDGEWISE_CACHE"].removeprefix("$CI_PROJECT_DIR/") in job["cache"]["paths"]

    # The plain script: against the record of an earlier run, and with a gate that is missed.
    record = tmp_path / "record.json"
    shutil.copy(repository / "build" / "reports" / "record.json", record)
    (repository / "recipe.yaml").write_text(RECIPE)
    plain = {**gitlab, "EDGEWISE_BASELINE": str(record), "EDGEWISE_REPORTS": "other reports", "EDGEWISE_JOBS": "1"}
    done = run(["sh", "ci/build.sh"], repository, plain)
    assert done.returncode == 0 and "regression.size <= 1" in done.stdout, done.stderr
    (repository / "recipe.yaml").write_text(RECIPE.replace("tokens: 13", "tokens: 12"))
    done = run(["sh", "ci/build.sh"], repository, plain)
    assert done.returncode == 1 and "MISSED" in done.stdout
    assert "tokens is 13" in (repository / "other reports" / "gates.xml").read_text()
    assert run(["sh", "ci/build.sh", "none.yaml"], repository, plain).returncode == 2


def test_the_example_recipe_is_read() -> None:
    names = [entry.name for entry in read_recipes(KITS / "recipe.yaml").entries]
    assert names == ["plain-fp32", "plain-fp16", "merged-fp32", "merged-fp16"]
