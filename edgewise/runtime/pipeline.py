"""A bundle whose components make one generative model, loaded whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from edgewise.bundle import Bundle
from edgewise.errors import InputError
from edgewise.runtime.generate import Decoder, Generation
from edgewise.runtime.session import load_session
from edgewise.runtime.text import TextStream, Tokenizer
from edgewise.targets import Session

OnText = Callable[[str], None]
"""Called with every piece of text as soon as it is known."""


class GenerativePipeline(ABC):
    """All components of a bundle's pipeline as sessions of one target. Use it as a context manager, or call `close`."""

    kind: ClassVar[str]

    def __init__(
        self,
        bundle: Bundle,
        target: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        sessions: Mapping[str, Session] | None = None,
    ) -> None:
        """`sessions`: of all components by their roles, instead of those that the bundle has."""
        self.check(bundle)
        assert bundle.manifest.pipeline is not None
        self.bundle, self.description = bundle, bundle.manifest.pipeline
        self.sessions: dict[str, Session] = dict(sessions or {})
        try:
            for role in () if sessions else self.description.order:
                self.sessions[role] = load_session(bundle, target, role, precision, threads)
        except BaseException:
            self.close()
            raise
        self.decoder = Decoder(self.sessions["prefill"], self.sessions["decode"], self.description)
        name = self.description.tokenizer
        self._tokenizer = None if name is None else Tokenizer(bundle.file(name))

    @abstractmethod
    def generate(self, *args: Any, **kwargs: Any) -> Generation:
        """Generate text; what it takes is said by each kind of pipeline."""

    @staticmethod
    def check(bundle: Bundle) -> None:
        """Raise InputError if the bundle holds no pipeline."""
        if bundle.manifest.pipeline is None:
            roles = ", ".join(component.role for component in bundle.manifest.components)
            raise InputError(f"{bundle.path} is no generative model: it holds {roles}. Run it on arrays with --inputs")

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises InputError if it has none."""
        if self._tokenizer is None:
            raise InputError(f"{self.bundle.path} has no tokenizer: give token ids (input_ids) instead of text")
        return self._tokenizer

    def _collect(self, tokens: Any, into: Generation, on_text: OnText | None) -> Generation:
        """Run a generation to its end, and give its text piece by piece."""
        stream = None if self._tokenizer is None else TextStream(self._tokenizer)
        for token in tokens:
            piece = "" if stream is None or not self._is_text(token) else stream.add(token)
            if piece and on_text is not None:
                on_text(piece)
        if stream is not None:
            rest = stream.end()
            if rest and on_text is not None:
                on_text(rest)
            into.text = self.tokenizer.decode([token for token in into.ids if self._is_text(token)])
        return into

    def _is_text(self, token: int) -> bool:
        """Whether a token is part of the text."""
        return token not in self.description.eos_ids

    def close(self) -> None:
        """Free all components. May be called twice."""
        for session in self.sessions.values():
            session.close()

    def __enter__(self) -> GenerativePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
