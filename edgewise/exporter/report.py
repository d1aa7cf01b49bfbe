"""The bundle's report: what was compressed, what it cost, what it gained, as one self-contained page, and its figures as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from json import dumps
from pathlib import Path

from edgewise.bundle.manifest import Component, Manifest
from edgewise.bundle.pipeline import Pipeline
from edgewise.document import readable
from edgewise.exporter import report_plots as plots
from edgewise.exporter.report_figures import INTENDED, combined, figures
from edgewise.passes.program import Site
from edgewise.verify.ladder import Rung
from edgewise.verify.metrics import Errors

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--line:#d9dee5;--back:#fff;--card:#f5f7fa;--bar:#2f6fde;--gone:#c9d6ee;
--intended:#d98a1f;--good:#1a7f4b;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e8ecf1;--soft:#9aa6b5;--line:#333d4a;--back:#141a21;--card:#1d252f;--bar:#6ba1ff;
--gone:#2d3e5c;--intended:#f0b357;--good:#5fce95;--bad:#ff8a80}}
*{box-sizing:border-box}body{margin:0 auto;max-width:62rem;padding:1.5rem 1rem 4rem;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
p.sub{color:var(--soft);margin:.2rem 0 0;overflow-wrap:anywhere}.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin-top:1.2rem}
.card{background:var(--card);border-radius:.6rem;padding:.7rem 1rem;flex:1 1 11rem}.card b{display:block;font-size:1.35rem}
.card span{color:var(--soft);font-size:.85rem}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.35rem .7rem .35rem 0;border-bottom:1px solid var(--line);white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.good{color:var(--good)}.bad{color:var(--bad)}svg{width:100%;height:auto}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}code{overflow-wrap:anywhere}
"""


def write_report(manifest: Manifest, sites: Sequence[Sequence[Site]], path: Path) -> None:
    """Write the page to `path`, beside the files of the bundle that it sums up, and its figures beside it (`.json`); `sites` are
    those of each component."""
    path.with_suffix(".json").write_text(dumps(figures(manifest, sites), indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8")
    sizes = {a.label: sum((path.parent / f).stat().st_size for f in a.files) for a in manifest.targets}
    spec = ", ".join(manifest.compress) or "no compression"
    body = [
        f"<h1>{escape(manifest.model.source)}</h1>",
        f"<p class=sub>{escape(manifest.model.class_name)}, {manifest.model.parameters:,} parameters · {escape(spec)} · "
        f"edgewise {escape(manifest.edgewise_version)}</p>",
    ]
    for component, own in zip(manifest.components, sites, strict=True):
        files = {a.label: sizes[a.label] for a in manifest.targets if a.role == component.role}
        if len(manifest.components) > 1:
            body.append(f"<h2>{escape(component.role)}</h2>")
        body += ["<div class=cards>", *_cards(component, own, files), "</div>"]
        if component.sites:
            body += [
                "<h2>Tokens at every site</h2>",
                plots.tokens(own),
                "<p class=sub>The full bar is what a site gets; the dark part is what it passes on.</p>",
            ]
    if manifest.pipeline is not None:
        if manifest.pipeline.stages:
            body += ["<h2>Stages</h2>", _stages(manifest.pipeline)]
        body += ["<h2>Caches</h2>", _caches(manifest.pipeline)]
    body += [
        "<h2>Artifacts</h2>",
        _table(
            ["artifact", "files", "MB", "made with"],
            [
                [
                    a.label,
                    ", ".join(a.files),
                    f"{sizes[a.label] / 1e6:.2f}",
                    ", ".join(f"{k} {v}" for k, v in sorted(a.versions.items())),
                ]
                for a in manifest.targets
            ],
            numbers={2},
        ),
        *_errors_apart(manifest),
        "<h2>Verification ladder</h2>",
        plots.ladder(manifest.verification),
        "<p class=sub>Relative errors. Orange: meant, of fewer tokens or fewer bits. Blue: two forms of the same; the red line is "
        "what is allowed.</p>",
        _table(
            ["step", "against", "error", "relative", "SQNR dB", "cosine", "allowed", ""],
            [_rung(r) for r in manifest.verification],
            numbers={3, 4, 5, 6},
            raw={7},
        ),
        "<p class=sub>Compression and fewer bits are meant to change the output, and have no limit here. Every other step "
        "compares two forms of the same: an error there would be a defect, and would have stopped the export.</p>",
    ]
    for artifact in manifest.targets:
        known = artifact.quantisation
        if known is not None and known.sensitivity:
            body += [
                f"<h2>Sensitivity of the layers of {escape(artifact.label)}</h2>",
                plots.sensitivity(known.sensitivity, [one.layer for one in known.floating]),
                "<p class=sub>Signal to noise of the outputs where a layer alone is quantised. Orange: the layer stayed in "
                "floating point.</p>",
            ]
    remarks = [
        *manifest.notes,
        *(r.note for r in manifest.verification if r.note),
        *(w for a in manifest.targets for w in a.warnings),
    ]
    if remarks:
        body += ["<h2>Notes</h2><ul>", *(f"<li>{escape(n)}</li>" for n in dict.fromkeys(remarks)), "</ul>"]
    page = (
        f'<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,'
        f'initial-scale=1"><title>{escape(manifest.model.source)} · edgewise</title><style>{_STYLE}</style>\n'
        + "\n".join(body)
        + "\n</html>\n"
    )
    path.write_text(readable(page), "utf-8")


def _cards(component: Component, sites: Sequence[Site], sizes: dict[str, int]) -> Iterable[str]:
    changed = [s for s in sites if s.methods]
    if changed:
        first, last = changed[0].tokens_in, changed[-1].tokens_out
        yield _card(f"{first} → {last}", f"tokens ({last / first:.0%} left)")
    before, after = component.flops_before, component.flops_after
    yield _card(f"{after / 1e9:.2f} GFLOP", f"of {before / 1e9:.2f} ({after / before:.0%})" if before else "")
    if after and after < before:
        yield _card(f"{before / after:.2f}×", "speed-up that the FLOP count promises; edgewise bench measures it")
    for label, size in sizes.items():
        yield _card(f"{size / 1e6:.2f} MB", label)


def _errors_apart(manifest: Manifest) -> Iterable[str]:
    """A card for each kind of error that is meant, and one for all that would be defects."""
    kinds = {**{kind: [kind] for kind in INTENDED}, "lowering": ["capture", "legalisation", "lowering"]}
    words = {"compression": "compression error", "precision": "rounding of weights to half precision",
             "quantisation": "quantisation error", "lowering": "largest error of capture and lowering"}
    cards = []
    for name, those in kinds.items():
        found = [(e.relative, e.sqnr_db) for r in manifest.verification if r.kind in those and (e := combined(r)) is not None]
        known = [(relative, sqnr) for relative, sqnr in found if relative is not None]
        if known:
            relative, sqnr = max(known)[0], min((sqnr for _, sqnr in known if sqnr is not None), default=None)
            cards.append(_card(f"{relative:.1e}", words[name] + ("" if sqnr is None else f" ({sqnr:.1f} dB SQNR)")))
    return ["<h2>Errors apart</h2><div class=cards>", *cards, "</div>"] if cards else []


def _stages(pipeline: Pipeline) -> str:
    rows = [
        [
            one.role,
            f"{one.tokens_before} → {one.tokens}",
            f"{one.flops_before / 1e9:.3f} → {one.flops / 1e9:.3f}",
            f"{one.cache_bytes_before / 1e6:.3f} → {one.cache_bytes / 1e6:.3f}" if one.cache_bytes else "",
        ]
        for one in pipeline.stages
    ]
    return _table(["stage", "media tokens", "GFLOP", "MB of caches"], rows, numbers={1, 2, 3})


def _caches(pipeline: Pipeline) -> str:
    rows = [
        [str(i), str(layer.media), str(layer.tokens), str(layer.slots), f"{layer.bytes / 1e6:.3f}"]
        for i, layer in enumerate(pipeline.caches)
    ]
    rows.append(["all", "", "", "", f"{pipeline.cache_bytes / 1e6:.3f}"])
    return _table(["layer", "media tokens", "tokens after prefill", "slots", "MB"], rows, numbers={1, 2, 3, 4})


def _card(value: str, label: str) -> str:
    return f"<div class=card><b>{escape(value)}</b><span>{escape(label)}</span></div>"


def _rung(rung: Rung) -> list[str]:
    errors = combined(rung)
    verdict = {True: "<span class=good>passed</span>", False: "<span class=bad>failed</span>", None: ""}[rung.passed]
    if rung.kept_overlap is not None:
        verdict += f" kept tokens agree {rung.kept_overlap:.1%}"
    return [
        rung.name,
        rung.against,
        rung.kind,
        *_figures(errors),
        "" if rung.threshold is None else f"{rung.threshold:.0e}",
        verdict,
    ]


def _figures(errors: Errors | None) -> list[str]:
    if errors is None:
        return ["", "", ""]
    exact = errors.finite and errors.relative == 0
    return [
        "" if errors.relative is None else f"{errors.relative:.2e}",
        "exact" if exact else "" if errors.sqnr_db is None else f"{errors.sqnr_db:.1f}",
        "" if errors.cosine is None else f"{errors.cosine:.6f}",
    ]


def _table(head: list[str], rows: list[list[str]], numbers: set[int] = frozenset(), raw: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    def cell(tag: str, i: int, text: str) -> str:
        return (
            f"<{tag}{' class=n' if i in numbers else ''}>{text if i in raw and tag == 'td' else escape(text)}</{tag}>"
        )

    lines = ["<tr>" + "".join(cell("th", i, t) for i, t in enumerate(head)) + "</tr>"]
    lines += ["<tr>" + "".join(cell("td", i, t) for i, t in enumerate(r)) + "</tr>" for r in rows]
    return "<div class=scroll><table>" + "\n".join(lines) + "</table></div>"
