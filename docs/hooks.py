"""What MkDocs makes of the program itself: a page for each method, the flags of each verb, and what each target needs.

The pages of the methods are the registry's entries with the text of `methods.md`; nothing is written twice. MkDocs calls the
functions that begin with `on_`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from edgewise import targets
from edgewise.cli import app
from edgewise.ops import METHODS, Method, Parameter

DOCS = Path(__file__).parent
SITES = {
    "block": "inside an encoder (`encoder.block[i]`)",
    "out": "its output (`encoder.out`)",
    "projector": "`projector.in`, `projector.out`",
    "decoder": "the input of a decoder's block (`decoder.block[i]`)",
}
SITUATIONS = {"image": "demo:digits", "video": "demo:motion", "audio": "demo:speech"}


def on_config(config: Any) -> Any:
    """Put the methods' pages under the page on methods, by mechanism."""
    groups: dict[str, list[str]] = {}
    for entry in METHODS.values():
        groups.setdefault(entry.mechanism, []).append(entry.name)
    pages = [
        {mechanism.capitalize(): [{name: f"methods/{name}.md"} for name in sorted(names)]}
        for mechanism, names in sorted(groups.items())
    ]
    (methods,) = (entry["Methods"] for entry in config["nav"] if "Methods" in entry)
    methods.extend(pages)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each method."""
    sections = semantics((DOCS / "methods.md").read_text("utf-8"))
    for entry in METHODS.values():
        if entry.name not in sections:
            raise SystemExit(f"docs/methods.md says nothing about {entry.name}")
        files.append(File.generated(config, f"methods/{entry.name}.md", content=method_page(entry, sections[entry.name])))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Add the flags to a verb's page, what it needs to a target's, and links to the methods' own pages."""
    path = page.file.src_uri
    if path.startswith("cli/"):
        return _inserted(markdown, flags(markdown))
    if path.startswith("targets/") and Path(path).stem in targets.names():
        return _inserted(markdown, needs(Path(path).stem))
    if path == "methods.md":
        return re.sub(r"^## .*$", lambda found: _heading(found[0]), markdown, flags=re.MULTILINE)
    return markdown


def semantics(text: str) -> dict[str, str]:
    """The text about each method in `methods.md`: below its name, or that of what it stands for."""
    found: dict[str, str] = {}
    for title, body in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        for name in title.split(", "):
            found[name] = _moved(body.strip())
    # A name of its own for what another method does with certain parameters.
    if "fastervlm" in METHODS and "fastervlm" not in found:
        found["fastervlm"] = found["topk"]
    return found


def method_page(entry: Method, text: str) -> str:
    """The page of a method, in Markdown."""
    demos = [SITUATIONS[name] for name in entry.modalities if name in SITUATIONS]
    rows = {
        "mechanism": entry.mechanism,
        "for": ", ".join(entry.modalities),
        "sites": "; ".join(SITES[name] for name in entry.sites) + (", at every block by default" if entry.every_block else ""),
        "needs": ", ".join(f"`{name}`" for name in entry.needs) or "nothing besides the tokens",
        "order": "kept" if entry.keeps_order else "not kept",
        "padding": "understood (`length=true`)" if entry.pads else "not understood",
        "paper": entry.paper,
        "limits": entry.limits,
    }
    lines = [f"# {entry.name}", "", f"{entry.summary[:1].upper()}{entry.summary[1:].rstrip('.')}.", ""]
    cells = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value]
    lines += [cells[0], "|---|---|", *cells[1:]]
    lines += ["", "## Parameters", ""]
    if entry.options:
        lines += ["| parameter | default | legal | meaning |", "|---|---|---|---|", *(_parameter(one) for one in entry.options)]
    else:
        lines += ["None besides `keep`."]
    demo = demos[0] if demos else "MODEL"
    if entry.sites == ("decoder",):
        demo, spec = "demo:vqa", f'"{entry.name}@decoder.block[2]:keep=0.5"'
    elif "block" in entry.sites and not entry.every_block:
        spec = f'"{entry.name}@encoder.block[2]:keep=0.5"'
    else:
        spec = f"{entry.name}:keep=0.5"
    lines += ["", "## How to call it", "", "```text", f"edgewise export {demo} --compress {spec} --target openvino -o BUNDLE"]
    if demo in demos:
        lines += [f"edgewise compare {demo} --calib {demo} --method {entry.name} --keep 0.5"]
    lines += ["```", ""]
    lines += ["Without `@SITE` it goes to its default site. Not every model has every site, and not every count is "]
    lines += ["legal: an error names what is. [Inspect](../cli/inspect.md) a model to see its sites.", ""]
    return "\n".join([*lines, "## What it computes", "", text, "", "All methods: [methods](../methods.md)", ""])


def flags(markdown: str) -> str:
    """A table of the flags of every verb that the title of the page names."""
    title = re.search(r"^# edgewise (.+)$", markdown, re.MULTILINE)
    assert title, "the page of a verb begins with its name"
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    # Some pages say more of the flags that matter, by hand.
    one = "## All flags" if re.search(r"^## Flags$", markdown, re.MULTILINE) else "## Flags"
    made = []
    for verb in title[1].split(", "):
        rows = [_flag(parameter) for parameter in commands[verb].params]
        heading = f"## Flags of {verb}" if "," in title[1] else one
        made += [heading, "", "| flag | meaning |", "|---|---|", *(row for row in rows if row), ""]
    return "\n".join(made)


def needs(name: str) -> str:
    """A table of the packages that a target needs, and what it can be asked for."""
    target = targets.get(name)
    lines = ["## What it needs", "", "| package | least | tested | extra | |", "|---|---|---|---|---|"]
    for one in (*target.requirements, *target.quantiser_requirements):
        use = "to run artifacts" if one.runtime else "to make them"
        lines.append(f"| {one.package} | {one.minimum} | {one.tested} | `{one.extra}` | {use} |")
    lines += ["", f"Precisions: {', '.join(f'`{precision}`' for precision in target.precisions)}."]
    return "\n".join([*lines, ""])


def _flag(parameter: Any) -> str | None:
    if parameter.name == "help" or getattr(parameter, "hidden", False):
        return None
    argument = parameter.param_type_name == "argument"
    names = [name.strip() for name in (*parameter.opts, *parameter.secondary_opts) if name.strip()]
    value = parameter.metavar or ("" if getattr(parameter, "is_flag", False) else "VALUE")
    label = f"`{value or parameter.name.upper()}`" if argument else ", ".join(f"`{name}`" for name in names)
    if not argument and value:
        label += f" `{value}`"
    meaning, default = parameter.help or "", parameter.default
    if not (default in (None, False, True, ()) or callable(default) or "Default" in meaning):
        meaning = f"{meaning.rstrip('.')}. Default: {default}."
    return f"| {label} | {_cell(meaning)} |"


def _parameter(one: Parameter) -> str:
    legal = ", ".join(f"`{choice}`" for choice in one.choices or ())
    if one.least is not None or one.most is not None:
        ends = [f"{end:g}" if end is not None else "" for end in (one.least, one.most)]
        legal = f"{ends[0]} to {ends[1]}" if all(ends) else f"at least {ends[0]}" if ends[0] else f"at most {ends[1]}"
    default = "none" if one.default is None else str(one.default).lower() if isinstance(one.default, bool) else str(one.default)
    return f"| `{one.name}` | `{default}` | {legal or one.type.__name__} | {_cell(one.help)} |"


def _inserted(markdown: str, table: str) -> str:
    """The page with a table before its first section, or before that behind its synopsis."""
    place = next(found for found in re.finditer(r"^## (?!Synopsis$)", markdown, re.MULTILINE))
    return f"{markdown[: place.start()]}{table}\n{markdown[place.start() :]}"


def _heading(line: str) -> str:
    names = [name for name in line.removeprefix("## ").split(", ") if name in METHODS]
    links = ", ".join(f"[{name}](methods/{name}.md)" for name in names)
    return f"{line}\n\nParameters and limits: {links}" if links else line


def _moved(text: str) -> str:
    """Links of a page in `docs`, as they are one folder below."""
    text = re.sub(r"\]\(#", "](../methods.md#", text)
    return re.sub(r"\]\((?!\w+:|\.\./methods\.md#)", "](../", text)


def _cell(text: str) -> str:
    """Text in a table: `<` is no tag, a bracket no link, and a bar ends no cell."""
    plain = {"<": "&lt;", "[": "&#91;"}
    return re.sub(r"(`[^`]*`)|[<\[]", lambda found: found[1] or plain[found[0]], " ".join(text.split())).replace("|", "\\|")
