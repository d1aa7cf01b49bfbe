"""Every code block and command of the documentation runs as it is written.

The blocks of a page run in order, in one folder that starts empty. A `pip install` is what CI does before the
tests, so that here only what follows it runs; `pytest` is what runs this.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Cli

import edgewise
from edgewise.ops import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in found]


def without_installs(text: str) -> str:
    """A shell block without `pip install ... &&`, and without `pytest`."""
    lines = [re.sub(r"^pip install [^&]*(&& )?", "", line) for line in text.splitlines()]
    return "\n".join(line for line in lines if line.strip() and line.strip() != "pytest")


@pytest.fixture
def environment(tmp_path: Path, cache_folder: Path) -> dict[str, str]:
    """An environment in which `edgewise` is this package, installed or not."""
    tools = tmp_path / "tools"
    tools.mkdir()
    command = tools / "edgewise"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgewise.cli "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    package = str(Path(edgewise.__file__).parents[1])
    return {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "EDGEWISE_CACHE": str(cache_folder),
        "HF_HUB_OFFLINE": "1",
    }


def test_blocks_of_the_readme_run(tmp_path: Path, environment: dict[str, str]) -> None:
    """By a real shell, with a process for each command."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for language, text in blocks(ROOT / "README.md"):
        if language == "python":
            command = [sys.executable, "-c", text]
        else:
            assert language == "bash"
            command = ["bash", "-euo", "pipefail", "-c", without_installs(text)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        # Nothing of what packages underneath have to say, such as kernels that do not load here.
        assert not re.search("failed to load|deprecated|warn", done.stderr, re.IGNORECASE) or language == "python", done.stderr


@pytest.fixture
def registry() -> Iterator[None]:
    """A page may register a method of its own, which is gone afterwards."""
    known = set(METHODS)
    yield
    for name in set(METHODS) - known:
        del METHODS[name]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES[1:] if any(language in ("bash", "python") for language, _ in blocks(page))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_blocks_of_the_docs_run(page: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which has torch already: plain commands and nothing of a shell."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
        elif language == "bash":
            for line in text.splitlines():
                verb, *args = shlex.split(line)
                assert verb == "edgewise"
                assert not {"|", "&&", ";", ">", "<"} & set(args), f"{page}: {line} needs a shell"
                said = cli(*args)
                assert said.code == 0, f"{line}\n{said.err}"
        elif language == "yaml":
            name = re.match(r"# ([\w.-]+)\n", text)
            assert name, f"{page}: a YAML file begins with a comment that names it"
            (tmp_path / name[1]).write_text(text)
        else:
            assert language == "text", f"{page}: a block of {language or 'no language'} is not run"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        if not link.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_every_verb_has_a_page() -> None:
    from edgewise.cli import app

    pages = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs" / "cli").glob("*.md"))
    for command in app.registered_commands:
        assert f"edgewise {command.name}" in pages, command.name


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    commands = [line for _, text in blocks(ROOT / "README.md") for line in text.splitlines() if "pip install" in line]
    assert len(commands) == 2
    for command in commands:
        assert f"\n{command} || exit 1\n" in script


def test_a_method_takes_few_lines() -> None:
    entry = blocks(ROOT / "docs" / "adding-a-method.md")[0][1]
    assert "@method(" in entry and len(entry.splitlines()) < 30
