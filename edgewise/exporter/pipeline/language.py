"""What the runtime must know of a model's text: tokenizer, template, placeholder, end tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from edgewise import demos
from edgewise.exporter.sources import Source

FILE = "tokenizer.json"
_QUESTION = "EDGEWISE-PROMPT"
"""Stands for the prompt while the template is applied."""


def eos_ids(model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a text."""
    config: Any = model.config
    for settings in (getattr(model, "generation_config", None), config.get_text_config()):
        found: Any = getattr(settings, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()


def describe_text(source: Source, placeholder: int, folder: Path, kind: str = "image", items: int = 1) -> dict[str, Any]:
    """Write the tokenizer of a model that has one into the bundle's `folder`; gives the fields of `Pipeline` that it settles, for
    prompts with so many `items` of media. `kind` is how a chat calls them."""
    place = _place(source)
    if place is None:
        return {}
    tokenizer = _tokenizer(place, folder)
    mark = tokenizer.convert_ids_to_tokens(placeholder)
    fields: dict[str, Any] = {"tokenizer": FILE, "placeholder": mark}
    template = _template(place, tokenizer, mark, kind, items)
    if template is not None:
        bos = tokenizer.bos_token
        fields |= {"template": template, "settings": {"template_special": not (bos and template.startswith(bos))}}
    return fields


def write_tokenizer(source: Source, folder: Path) -> str | None:
    """Write the tokenizer of a model that has one into the bundle's `folder`; gives the name of its file."""
    place = _place(source)
    if place is None:
        return None
    _tokenizer(place, folder)
    return FILE


def _tokenizer(place: str, folder: Path) -> Any:
    """The tokenizer of a model, which is written into the bundle's `folder`."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place)
    (folder / FILE).write_text(tokenizer.backend_tokenizer.to_str(pretty=False), "utf-8")
    return tokenizer


def _place(source: Source) -> str | None:
    """Where the tokenizer of a model is: its folder or id; None for a model that comes without."""
    name = source.name
    if name.startswith("demo:"):
        name = str(demos.folder(name.removeprefix("demo:")))
    if name.startswith("py:") or not hasattr(source.module, "name_or_path") or not source.module.name_or_path:  # type: ignore[union-attr]
        return None
    if Path(name).exists() and not (Path(name) / FILE).is_file() and not (Path(name) / "tokenizer_config.json").is_file():
        return None
    return name


def _template(place: str, tokenizer: Any, mark: str, kind: str, items: int) -> str | None:
    """The text around a prompt with images or a recording, by the chat template of the processor or the tokenizer, or None."""
    text = tokenizer.chat_template
    if text is None:
        for name in ("chat_template.jinja", "chat_template.json"):
            path = Path(place) / name
            if path.is_file():
                import json

                text = path.read_text("utf-8") if path.suffix == ".jinja" else json.loads(path.read_text("utf-8"))["chat_template"]
                break
    if text is None:
        return None
    content = [*[{"type": kind}] * items, {"type": "text", "text": _QUESTION}]
    chat = [{"role": "user", "content": content}]
    whole = str(tokenizer.apply_chat_template(chat, chat_template=text, tokenize=False, add_generation_prompt=True))
    return whole.replace(_QUESTION, "{prompt}") if mark in whole else None
