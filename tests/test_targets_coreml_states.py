"""Core ML packages that keep state: a decoder with its cache, step by step, against the whole sequence at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, cache_utils

import edgewise
from edgewise.errors import InputError
from edgewise.targets import get
from edgewise.targets.base import Cache

WORDS, SLOTS, STEPS = 101, 32, 8
IDS = torch.randint(0, WORDS, (1, STEPS), generator=torch.Generator().manual_seed(1))


class Slots(cache_utils.Cache):
    """Keys and values of all steps, in buffers of a fixed number of slots, one of which each token is written to."""

    def __init__(self, owner: Decoder, at: Tensor) -> None:
        self.owner, self.at = owner, at

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        hot = (torch.arange(SLOTS)[:, None] == self.at).to(key.dtype)
        old = 1 - hot.sum(1)[:, None]
        made = []
        for name, new in (("key", key), ("value", value)):
            buffer = getattr(self.owner, f"{name}{layer}")
            buffer.copy_(buffer * old + torch.einsum("lt,bhtd->bhld", hot, new))
            made.append(buffer)
        return made[0], made[1]


class Decoder(nn.Module):
    """Two layers of a Llama with fewer heads for keys than for queries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": WORDS}
        self.model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        for i in range(2):
            self.register_buffer(f"key{i}", torch.zeros(1, 2, SLOTS, 16))
            self.register_buffer(f"value{i}", torch.zeros(1, 2, SLOTS, 16))

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        mask = torch.where(torch.arange(SLOTS) <= at[:, None], 0.0, -1e4)[None, None]
        x = self.model.model.embed_tokens(ids)
        turned, cache = self.model.model.rotary_emb(x, at[None]), Slots(self, at)
        for layer in self.model.model.layers:
            x = layer(x, attention_mask=mask, position_ids=at[None], past_key_values=cache, position_embeddings=turned)
        return self.model.lm_head(self.model.model.norm(x))


def export(model: nn.Module, out: Path, precision: str, tokens: int = 1, target: str = "coreml", **given: Any) -> edgewise.Bundle:
    example = (IDS[:, :tokens], torch.arange(tokens))
    return edgewise.export(model.eval(), out, example=example, targets=[target], precision=precision, cache=False, **given)


def steps(bundle: edgewise.Bundle, tokens: int, again: bool = False) -> np.ndarray:
    (artifact,) = bundle.manifest.targets
    made = []
    with get(artifact.target).load([bundle.file(one) for one in artifact.files]) as session:
        for first in [*((range(0, STEPS, tokens)) if again else ()), *range(0, STEPS, tokens)]:
            if first == 0:
                session.reset()
                made.clear()
            at = np.arange(first, first + tokens)
            made.append(session.run({"ids": IDS[:, first : first + tokens].numpy(), "at": at})["output"])
    return np.concatenate(made, axis=1)


def whole() -> np.ndarray:
    with torch.no_grad():
        return Decoder().eval().model(IDS).logits.numpy()


@pytest.mark.parametrize(("precision", "tokens", "least"), [("fp16", 1, 1e-3), ("fp16", 4, 1e-3), ("fp32", 1, 2e-4)])
def test_steps_equal_the_whole_sequence(precision: str, tokens: int, least: float, tmp_path: Path) -> None:
    """The cache is in half precision either way."""
    bundle = export(Decoder(), tmp_path / "b", precision, tokens)
    assert all(rung.passed is not False for rung in bundle.manifest.verification)
    made = steps(bundle, tokens)
    assert np.abs(made - whole()).max() < least
    # After a reset all is as it was at first.
    np.testing.assert_array_equal(steps(bundle, tokens, again=True), made)


def test_a_cache_makes_the_difference(tmp_path: Path) -> None:
    """Without what earlier steps left, the later ones are others."""
    bundle = export(Decoder(), tmp_path / "b", "fp16")
    (artifact,) = bundle.manifest.targets
    with get("coreml").load([bundle.file(one) for one in artifact.files]) as session:
        feeds = [{"ids": IDS[:, i : i + 1].numpy(), "at": np.array([i])} for i in range(2)]
        kept = [session.run(feed)["output"] for feed in feeds][1]
        alone = session.run_anew(feeds[1])["output"]
    assert np.abs(kept - alone).max() > 1e-2


@pytest.mark.parametrize(("precision", "least"), [("w8a16", 25), ("w8a8", 20)])
def test_quantised_packages_keep_state_too(precision: str, least: float, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    if precision == "w8a8":
        given["calibration"] = {"ids": IDS[0, :, None].numpy(), "at": np.zeros(STEPS, np.int64)}
    bundle = export(Decoder(), tmp_path / "b", precision, **given)
    wanted, made = whole(), steps(bundle, 1)
    assert 20 * np.log10(np.linalg.norm(wanted) / np.linalg.norm(made - wanted)) > least


class Counter(nn.Module):
    """Adds up what it is given."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.register_buffer("total", first)

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x.to(self.total.dtype))
        return x * 2 + self.total


def test_a_capture_leaves_buffers_as_they_were(tmp_path: Path) -> None:
    model = Counter(torch.zeros(3)).eval()
    made = edgewise.export(model, tmp_path / "b", example=(torch.ones(3),), targets=["coreml"], cache=False)
    assert not model.total.any()
    with get("coreml").load([made.file(one) for one in made.manifest.targets[0].files]) as session:
        x = {"x": np.arange(3, dtype=np.float32)}
        for turn in range(1, 4):
            np.testing.assert_array_equal(session.run(x)["output"], x["x"] * (2 + turn))


@pytest.mark.parametrize(
    ("first", "target", "message"),
    [
        (torch.tensor([0.0, 1.0]), "coreml", "holds other values than zeros at first"),
        (torch.zeros(2, dtype=torch.int64), "coreml", "total, of type int64, and states of Core ML hold floating-point"),
        (torch.zeros(2), "openvino", "writes to total; artifacts of this target keep no state. .* use the target coreml"),
        (torch.zeros(2), "onnxruntime", "writes to total"),
    ],
)
def test_what_cannot_be_a_state_is_refused(first: Tensor, target: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        edgewise.export(Counter(first).eval(), tmp_path / "b", example=(torch.ones(2),), targets=[target], cache=False)
    assert not (tmp_path / "b").exists()


class Step(nn.Module):
    """A token that is made of two caches of different lengths, for both."""

    def forward(self, x: Tensor, past_a: Tensor, past_b: Tensor, step: Tensor) -> dict[str, Tensor]:
        seen = past_a.sum(2, keepdim=True) + past_b.amax(2, keepdim=True)
        return {"a": x + 1.0, "b": x * 2.0 + seen, "out": seen.sum(-1)}


CACHES = [Cache("past_a", "a", "step", 3), Cache("past_b", "b", "step", 1)]


def step_session(folder: Path, precision: str, caches: list[Cache] | None = None) -> Any:
    inputs = (torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, dtype=torch.int64))
    target = get("coreml-ios18").for_caches(CACHES if caches is None else caches)
    exported = torch.export.export(Step(), inputs, strict=False).run_decompositions({})
    names = ["x", "past_a", "past_b", "step"]
    files = target.lower(exported, folder, "m", precision=precision, input_names=names, output_names=["a", "b", "out"])
    return target.load(files)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_caches_are_written_at_their_slots(precision: str, tmp_path: Path) -> None:
    """What is fed is written before the run, the token of the run behind it, and the next run sees both: numbers that half
    precision holds."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 8, (1, 2, slots, 4)).astype(np.float32) for slots in (6, 4))
    with step_session(tmp_path, precision) as session:
        assert [info.name for info in session.inputs] == ["x", "step"]
        assert [(info.name, info.shape, info.dtype) for info in session.kept] == [
            ("past_a", (1, 2, 6, 4), "float32"),
            ("past_b", (1, 2, 4, 4), "float32"),
        ]
        fed: dict[str, np.ndarray] = {"past_a": a.copy(), "past_b": b.copy()}
        for step in (0, 2, 1):
            x = np.full((1, 2, 1, 4), 2.0 + step, np.float32)
            made = session.run({"x": x, "step": np.array([step]), **fed})
            fed = {}
            seen = a.sum(2, keepdims=True) + b.max(2, keepdims=True)
            np.testing.assert_array_equal(made["out"], seen.sum(-1))
            a[:, :, 3 + step], b[:, :, 1 + step] = made["a"][:, :, 0], made["b"][:, :, 0]
            np.testing.assert_array_equal(made["b"], x * 2 + seen)
        again = session.run_anew({"x": x, "step": np.array([0])})
        assert not again["out"].any(), "a session that begins anew has empty caches"
        feeds = {"x": x, "step": np.array([0])}
        with pytest.raises(InputError, match=r"state 'past_b' has shape \(1, 2, 5, 4\).*\(1, 2, 4, 4\)"):
            session.run({**feeds, "past_b": np.zeros((1, 2, 5, 4), np.float32)})
        with pytest.raises(InputError, match="state 'past_a' has dtype float64 and must be float32"):
            session.run({**feeds, "past_a": np.zeros((1, 2, 6, 4))})
        with pytest.raises(InputError, match="'x' has shape"):
            session.run({**feeds, "x": x[:, :1], "past_a": np.ones((1, 2, 6, 4), np.float32)})
        unchanged = session.run({**feeds, "past_b": np.zeros((1, 2, 4, 4), np.float32)})["out"]
        session.reset()
        session.run(feeds)
        np.testing.assert_array_equal(unchanged, session.run({**feeds, "past_b": np.zeros((1, 2, 4, 4), np.float32)})["out"])


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (Cache("past_c", "a", "step", 0), "has no cache past_c"),
        (Cache("past_a", "out", "step", 0), r"out, \(1, 2, 1\), is no token of it"),
        (Cache("past_a", "a", "step", 6), r"cache past_a is \(1, 2, 6, 4\)"),
    ],
)
def test_what_is_no_cache_is_refused(cache: Cache, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        step_session(tmp_path, "fp32", [cache])
    assert not list(tmp_path.iterdir())
