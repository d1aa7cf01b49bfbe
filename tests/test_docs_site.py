"""The site of the documentation: it builds without a warning, no link is broken, and it is made of the program as it is."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from edgewise import targets
from edgewise.cli import app
from edgewise.ops import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


class Page(HTMLParser):
    """What a page links to, what it loads, its anchors and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loads, self.anchors, self.words = list[str](), list[str](), set[str](), list[str]()
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value for key, value in attrs if value is not None}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") != "canonical" and "href" in given:
            self.loads.append(given["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the site needs the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="the site needs the extra `docs`")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**environment, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def site(folder: Path) -> dict[str, Page]:
    """The pages of the site by their path; `DIR/index.html` is `DIR/`."""
    found = {path.relative_to(folder).as_posix(): Page(path.read_text("utf-8")) for path in sorted(folder.rglob("*.html"))}
    return {name.removesuffix("index.html"): page for name, page in found.items()}


def test_the_navigation_has_every_page() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        return [page for one in inner for page in pages(one)]  # type: ignore[attr-defined]

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert sorted(pages(settings["nav"])) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_no_link_of_the_site_is_broken(folder: Path, site: dict[str, Page]) -> None:
    faults = []
    for name, page in site.items():
        if name == "404.html":
            continue
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = (folder / name.rpartition("/")[0] / unquote(parts.path)).resolve() if parts.path else folder / name
            place = path.relative_to(folder).as_posix() + "/" if path.is_dir() else path.relative_to(folder).as_posix()
            place = "" if place == "./" else place
            there = place in site if path.is_dir() else path.exists()
            anchors = site[place].anchors if place in site else ()
            if not there or (parts.fragment and unquote(parts.fragment) not in anchors):
                faults.append(f"{name}: {link}")
    assert not faults


def test_nothing_is_loaded_from_elsewhere(site: dict[str, Page]) -> None:
    assert not [load for page in site.values() for load in page.loads if urlsplit(load).netloc]


def test_every_method_verb_and_target_has_a_page_of_the_program(site: dict[str, Page]) -> None:
    for method in METHODS.values():
        text = site[f"methods/{method.name}/"].text
        for words in (method.summary[1:].rstrip("."), method.mechanism, *(one.name for one in method.options)):
            assert " ".join(words.split()) in text, (method.name, words)
        assert len(text.partition("What it computes")[2]) > 200, method.name
    listings = {"methods", "targets", "models", "sys"}
    for command in app.registered_commands:
        name = command.name or ""
        text = site["cli/listings/" if name in listings else f"cli/{name}/"].text
        assert f"Flags of {name}" in text if name in listings else f"edgewise {name}" in text
        assert "--json" in text and "--debug" in text, name
    assert not [place for place, page in site.items() if "flags_1" in page.anchors]  # two sections of one name
    assert "--compress" in site["cli/export/"].text and "--no-cold" in site["cli/bench/"].text
    for name in targets.names():
        if not name.startswith("coreml-"):  # on the page of coreml
            text = site[f"targets/{name}/"].text
            for one in targets.get(name).requirements:
                assert f"{one.package} {one.minimum} {one.tested}" in text, name


def test_the_python_page_has_the_docstrings(site: dict[str, Page]) -> None:
    import edgewise

    text = site["python/"].text
    for name in ("capture", "compress", "export", "load"):
        first = (getattr(edgewise, name).__doc__ or "").strip().splitlines()[0].split("`")[0].strip()
        assert first and first in text, name


def test_every_message_on_troubleshooting_is_one_of_the_program() -> None:
    said = []
    for path in (ROOT / "edgewise").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                said.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
    messages = re.findall(r"^#+ [^`\n]*`(.+?)`", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        assert any(message in text for text in said), f"nothing says {message!r} any more"
