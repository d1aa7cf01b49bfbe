"""Methods that prune inside a decoder: called on tensors, against loops in NumPy, and in Llama and Qwen2, against the model's own
layers run one by one with tokens taken out between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from method_graphs import EVERY, check_graph
from torch import Tensor, nn

import edgewise
from edgewise.errors import EdgewiseError, InputError, Refused
from edgewise.ops import METHODS, apply
from edgewise.passes.program import Program, compress

Array = Any
DECODER = ("fastv", "pyramiddrop", "sparsevlm", "dart")


# -- one sample, in NumPy: which of the tokens `first` to `stop` stay


def np_top(score: Array, keep: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:keep])


def np_softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_last_row(attention: Array, keep: int, first: int, stop: int) -> list[int]:
    """FastV and PyramidDrop: what the last row of `attention (heads, N, N)` pays."""
    return [first + i for i in np_top(attention[:, -1, first:stop].mean(0), keep)]


def np_sparsevlm(given: Array, attention: Array, keep: int, first: int, stop: int, text: int) -> list[int]:
    """`given` is what the first layer is given, with `text` tokens behind the visual ones."""
    relevance = np_softmax(given[first:-text] @ given[-text:].T).mean(0)
    raters = [t for t in range(len(relevance)) if relevance[t] > relevance.mean() + 1e-12] or list(
        range(len(relevance))
    )
    score = np.mean([attention[:, stop + t, first:stop].mean(0) for t in raters], axis=0)
    return [first + i for i in np_top(np.round(score, 9), keep)]


def np_dart(
    tokens: Array, keys: Array, keep: int, first: int, stop: int, image_pivots: int = 4, text_pivots: int = 4
) -> list[int]:
    def largest(tokens: range, count: int) -> list[int]:
        return sorted(tokens, key=lambda i: (-np.abs(keys[i]).sum(), i))[:count]

    def cosine(a: Array, b: Array) -> float:
        return float(a @ b / max(np.linalg.norm(a), 1e-12) / max(np.linalg.norm(b), 1e-12))

    chosen = largest(range(first, stop), min(image_pivots, keep))
    pivots = [*chosen, *largest(range(stop, len(tokens)), text_pivots)]
    share, more = divmod(keep - len(chosen), len(pivots))
    for turn, pivot in enumerate(pivots):
        free = [i for i in range(first, stop) if i not in chosen]
        unlike = sorted(free, key=lambda i: (round(cosine(tokens[i], tokens[pivot]), 9), i))
        chosen += unlike[: share + (turn < more)]
    return sorted(chosen)


def np_kept(
    name: str, tokens: Array, keys: Array, attention: Array, keep: int, first: int, stop: int, given: Array | None = None
) -> list[int]:
    if name == "sparsevlm":
        return np_sparsevlm(tokens if given is None else given, attention, keep, first, stop, len(tokens) - stop)
    if name == "dart":
        return np_dart(tokens, keys, keep, first, stop)
    return np_last_row(attention, keep, first, stop)


def drawn(kind: str, batch: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, keys and attention; `ties` are exact in floating point."""
    g = torch.Generator().manual_seed(seed)
    if kind == "zeros":
        return (
            torch.zeros(batch, count, 8).double(),
            torch.zeros(batch, count, 6).double(),
            torch.zeros(batch, 2, count, count).double(),
        )
    if kind == "ties":
        tokens = torch.eye(8, dtype=torch.float64)[torch.randint(3, (batch, count), generator=g)]
        keys = torch.randint(-1, 2, (batch, count, 6), generator=g).double()
        return tokens, keys, torch.randint(3, (batch, 2, count, count), generator=g).double() / 8
    return (
        torch.randn(batch, count, 8, generator=g).double(),
        torch.randn(batch, count, 6, generator=g).double(),
        torch.rand(batch, 2, count, count, generator=g).double(),
    )


@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", DECODER)
def test_against_loops(name: str, batch: int, kind: str) -> None:
    count = 23
    tokens, keys, attention = drawn(kind, batch, count)
    size = torch.randint(1, 5, (batch, count, 1)).double()
    for first, stop in ((0, 15), (4, 17), (1, 22), (2, 23)):
        if name == "sparsevlm" and stop == count:
            continue
        for keep in sorted({1, 3, 9, stop - first}):
            out = apply(name, tokens, keep=keep, keys=keys, attention=attention, size=size, span=f"{first}:{stop}")
            for b in range(batch):
                inside = np_kept(name, tokens[b].numpy(), keys[b].numpy(), attention[b].numpy(), keep, first, stop)
                kept = [*range(first), *inside, *range(stop, count)]
                assert out.kept[b].tolist() == kept, (first, stop, keep)
                assert torch.equal(out.tokens[b], tokens[b, kept]) and torch.equal(out.size[b], size[b, kept])
                assert [out.assignment[b, k].item() for k in kept] == list(range(len(kept)))
                assert (out.assignment[b] < 0).sum() == count - len(kept)


@pytest.mark.parametrize("pivots", [(1, 0), (3, 2), (20, 20)])
@pytest.mark.parametrize("keep", [1, 2, 7, 13])
def test_pivots_of_dart(pivots: tuple[int, int], keep: int) -> None:
    tokens, keys, _ = drawn("random", 2, 20)
    out = apply("dart", tokens, keep=keep, keys=keys, span="3:16", image_pivots=pivots[0], text_pivots=pivots[1])
    for b in range(2):
        inside = np_dart(tokens[b].numpy(), keys[b].numpy(), keep, 3, 16, *pivots)
        assert out.kept[b].tolist() == [*range(3), *inside, *range(16, 20)]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(DECODER),
    kind=st.sampled_from(["random", "ties", "zeros", "nan", "huge"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    count=st.integers(3, 24),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_invariants(name: str, kind: str, dtype: torch.dtype, count: int, seed: int, data: Any) -> None:
    stop = data.draw(st.integers(1, count - 1))
    first = data.draw(st.integers(0, stop - 1))
    keep = data.draw(st.integers(1, stop - first))
    tokens, keys, attention = drawn(kind, 2, count, seed)
    if kind in ("nan", "huge"):
        value = torch.nan if kind == "nan" else 6e4
        tokens, keys, attention = (torch.full_like(t, value) for t in (tokens, keys, attention))
    known = {"keys": keys.to(dtype), "attention": attention.to(dtype)}
    out = apply(name, tokens.to(dtype), keep=keep, span=f"{first}:{stop}", **known)
    for b in range(2):
        kept = out.kept[b].tolist()
        assert kept == sorted(set(kept)) and len(kept) == count - (stop - first) + keep
        assert set(range(first)) | set(range(stop, count)) <= set(kept)
    assert out.tokens.dtype == dtype


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_padding_goes_first(name: str) -> None:
    tokens, _, attention = drawn("random", 2, 12)
    out = apply(name, tokens, keep=5, attention=attention, span="1:10", length=torch.tensor([4, 8]))
    assert set(out.kept[0].tolist()) >= {1, 2, 3} and max(out.kept[1, 1:6].tolist()) < 8


def test_last_row_alone() -> None:
    """Only the row that scores is needed, and queries with keys do as well."""
    tokens, _, attention = drawn("random", 2, 12)
    whole = apply("fastv", tokens, keep=4, attention=attention, span="2:9")
    row = apply("fastv", tokens, keep=4, attention=attention[:, :, -1:], span="2:9")
    assert torch.equal(whole.kept, row.kept)
    queries = torch.randn(2, 12, 8).double()
    rows = (queries[:, -1:] @ tokens.transpose(1, 2) / math.sqrt(8)).softmax(-1)[:, None]
    scored = apply("fastv", tokens, keep=4, queries=queries, keys=tokens, span="2:9")
    assert torch.equal(scored.kept, apply("fastv", tokens, keep=4, attention=rows, span="2:9").kept)


def test_calls_that_cannot_be() -> None:
    tokens, _, attention = drawn("random", 1, 12)
    for name, known, message in [
        ("sparsevlm", {"keep": 3, "span": "2:12"}, "rates by text tokens"),
        ("sparsevlm", {"keep": 3}, "rates by text tokens"),
        ("fastv", {"keep": 8, "span": "2:9"}, "keep=8 is out of range.*1 and 7"),
        ("fastv", {"span": "2:9"}, "give keep"),
        ("fastv", {"keep": 3, "span": "9:2"}, "span=9:2 is out of range"),
        ("fastv", {"keep": 3, "span": "2:13"}, "span=2:13 is out of range"),
        ("fastv", {"keep": 3, "span": "2"}, "span=2 is not START:STOP"),
        ("dart", {"keep": 3, "span": "2:9", "image_pivots": 0}, "image_pivots=0 is out of range: at least 1"),
        ("dart", {"keep": 3, "span": "2:9", "text_pivots": -1}, "text_pivots=-1 is out of range: at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply(name, tokens, attention=attention, **known)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("name", DECODER)
def test_graph(name: str, target: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    known: dict[str, Any] = {"keep": 9, "span": "3:30"}
    if name != "dart":
        known["attention"] = torch.rand(1, 2, 36, 36, generator=generator)
    check_graph(name, known, target, tmp_path, batches=(1,))


# -- in models

COUNT, FIRST, STOP = 40, 5, 29
SPAN = f"span={FIRST}:{STOP}"


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "use_cache": False,
    "attn_implementation": "sdpa",
    "initializer_range": 0.3,
}
MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "qwen2": qwen2}
READY: dict[tuple[str, int], tuple[nn.Module, Tensor, Program]] = {}


def prepared(name: str, batch: int = 1) -> tuple[nn.Module, Tensor, Program]:
    if (name, batch) not in READY:
        torch.manual_seed(0)
        model = MODELS[name]().eval().requires_grad_(False)
        x = torch.randn(batch, COUNT, 64, generator=torch.Generator().manual_seed(batch))
        READY[name, batch] = model, x, edgewise.capture(model, (), {"inputs_embeds": x})
    return READY[name, batch]


Drop = tuple[str, int]


def eager(
    model: Any, x: Tensor, drops: dict[int, list[Drop]], text: int = COUNT - STOP, seen: Tensor | None = None
) -> Tensor:
    """The layers one by one. `drops` are the methods before a layer, and how many of the visual tokens they keep; `seen (B, N)` is
    0 where a token is hidden from the others."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inner, batch = model.model, len(x)
    heads, width = model.config.num_attention_heads, inner.layers[0].self_attn.head_dim
    positions, given = torch.arange(x.shape[1]).expand(batch, -1), x
    keys = torch.zeros(batch, model.config.num_key_value_heads, x.shape[1], width)
    weights = torch.zeros(batch, heads, x.shape[1], x.shape[1])

    hidden = torch.zeros(x.shape[:2], dtype=torch.bool) if seen is None else seen == 0

    def mask() -> Tensor:
        n = hidden.shape[1]
        return torch.zeros(batch, 1, n, n).masked_fill(
            hidden[:, None, None] | torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf
        )

    def attention(h: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        z, n = layer.input_layernorm(h), h.shape[1]
        q, k = (
            p(z).view(batch, n, -1, width).transpose(1, 2) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *inner.rotary_emb(h, positions))
        logits = q @ k.repeat_interleave(heads // k.shape[1], 1).transpose(2, 3) / math.sqrt(width)
        return k, (logits + mask()).softmax(-1)

    for i, layer in enumerate(inner.layers):
        for name, keep in drops.get(i, []):
            k, w = attention(x, layer) if METHODS[name].scored_by == "next" else (keys, weights)
            flat, stop = k.transpose(1, 2).flatten(2), x.shape[1] - text
            kept = torch.tensor(
                [
                    [
                        *range(FIRST),
                        *np_kept(name, x[b].numpy(), flat[b].numpy(), w[b].numpy(), keep, FIRST, stop, given[b].numpy()),
                        *range(stop, x.shape[1]),
                    ]
                    for b in range(batch)
                ]
            )
            x = x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))
            hidden = hidden.gather(1, kept)
            keys = keys.gather(2, kept[:, None, :, None].expand(-1, keys.shape[1], -1, width))
            weights = weights.gather(3, kept[:, None, None].expand(-1, heads, weights.shape[2], -1))
            weights = weights.gather(2, kept[:, None, :, None].expand(-1, heads, -1, weights.shape[3]))
            dense = METHODS[name].positions == "dense"
            positions = torch.arange(kept.shape[1]).expand(batch, -1) if dense else positions.gather(1, kept)
        keys, weights = attention(x, layer)
        rotary = inner.rotary_emb(x, positions)
        x = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=mask())[0]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(inner.norm(x))


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


CASES: dict[str, tuple[list[str], dict[int, list[Drop]]]] = {
    "fastv": ([f"fastv:keep=7,{SPAN}"], {2: [("fastv", 7)]}),
    "fastv_early": ([f"fastv@decoder.block[1]:keep=0.5,{SPAN}"], {1: [("fastv", 12)]}),
    "fastv_twice": ([f"fastv@decoder.block[1,3]:keep=0.5,{SPAN}"], {1: [("fastv", 12)], 3: [("fastv", 6)]}),
    "pyramiddrop": (
        [f"pyramiddrop:{SPAN}"],
        {1: [("pyramiddrop", 12)], 2: [("pyramiddrop", 6)], 3: [("pyramiddrop", 3)]},
    ),
    "pyramiddrop_first": ([f"pyramiddrop@decoder.block[0]:keep=9,{SPAN}"], {0: [("pyramiddrop", 9)]}),
    "pyramiddrop_stages": (
        [f"pyramiddrop@decoder.block[0,2]:stages=[0.75,0.2],{SPAN}"],
        {0: [("pyramiddrop", 18)], 2: [("pyramiddrop", 4)]},
    ),
    "sparsevlm": (
        [f"sparsevlm@decoder.block[1,2,3]:{SPAN}"],
        {1: [("sparsevlm", 12)], 2: [("sparsevlm", 8)], 3: [("sparsevlm", 4)]},
    ),
    "sparsevlm_counts": (
        [f"sparsevlm@decoder.block[1,3]:stages=[20,6],{SPAN}"],
        {1: [("sparsevlm", 20)], 3: [("sparsevlm", 6)]},
    ),
    "dart": ([f"dart:keep=11,{SPAN}"], {2: [("dart", 11)]}),
    "fastv_then_pyramiddrop": (
        [f"fastv@decoder.block[1]:keep=15,{SPAN}", "pyramiddrop@decoder.block[2]:keep=6"],
        {1: [("fastv", 15)], 2: [("pyramiddrop", 6)]},
    ),
    "pyramiddrop_then_fastv": (
        [f"pyramiddrop@decoder.block[1]:keep=15,{SPAN}", "fastv@decoder.block[2]:keep=6"],
        {1: [("pyramiddrop", 15)], 2: [("fastv", 6)]},
    ),
    "same_site": (
        [f"fastv@decoder.block[2]:keep=15,{SPAN}", "sparsevlm@decoder.block[2]:keep=6"],
        {2: [("fastv", 15), ("sparsevlm", 6)]},
    ),
    "same_site_positions": (
        [f"pyramiddrop@decoder.block[2]:keep=15,{SPAN}", "fastv@decoder.block[2]:keep=6"],
        {2: [("pyramiddrop", 15), ("fastv", 6)]},
    ),
    "same_site_keys": (
        [f"fastv@decoder.block[2]:keep=15,{SPAN}", "dart@decoder.block[2]:keep=10"],
        {2: [("fastv", 15), ("dart", 10)]},
    ),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_in_models(case: str, model: str, batch: int) -> None:
    specs, drops = CASES[case]
    module, x, program = prepared(model, batch)
    compressed = compress(program, *specs)
    with torch.no_grad():
        ours = compressed.module()(inputs_embeds=x).logits
        theirs = eager(module, x, drops)
    assert error(ours, theirs) < 1e-5
    assert compressed.sites[-1].tokens_out == ours.shape[1]


def test_the_loop_is_the_model() -> None:
    for name in MODELS:
        module, x, _ = prepared(name, 2)
        assert error(eager(module, x, {}), module(inputs_embeds=x).logits) < 1e-5


@pytest.mark.parametrize("case", ["fastv", "pyramiddrop", "sparsevlm", "dart", "same_site"])
def test_hidden_tokens(case: str) -> None:
    """A mask of the model's own: text that is hidden in one sample, before and behind the span."""
    module, x, _ = prepared("llama", 2)
    seen = torch.ones(2, COUNT, dtype=torch.int64)
    seen[1, [2, STOP + 3]] = 0
    inputs = {"inputs_embeds": x, "attention_mask": seen}
    specs, drops = CASES[case]
    compressed = compress(edgewise.capture(module, (), inputs), *specs)
    assert error(compressed.module()(**inputs).logits, eager(module, x, drops, seen=seen)) < 1e-5


@pytest.mark.parametrize("case", ["fastv_twice", "sparsevlm", "dart", "same_site"])
def test_attention_that_is_spelled_out(case: str) -> None:
    model, x, _ = prepared("llama", 2)
    model.config._attn_implementation = "eager"
    try:
        program = edgewise.capture(model, (), {"inputs_embeds": x})
    finally:
        model.config._attn_implementation = "sdpa"
    specs, drops = CASES[case]
    assert error(compress(program, *specs).module()(inputs_embeds=x).logits, eager(model, x, drops)) < 1e-5
    with pytest.raises(Refused, match="only a fused one can be computed ahead"):
        compress(program, f"pyramiddrop:{SPAN}")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", ["fastv", "pyramiddrop", "sparsevlm", "dart"])
def test_exports(case: str, model: str, tmp_path: Path) -> None:
    module, x, _ = prepared(model, 2)
    bundle = edgewise.export(
        module, tmp_path / "b", example={"inputs_embeds": x}, targets=EVERY, compress=CASES[case][0], cache=False
    )
    rungs = [rung for rung in bundle.manifest.verification if rung.kind == "lowering"]
    assert {rung.name.split("/")[0] for rung in rungs} == set(EVERY)
    for rung in rungs:
        assert all(e.relative is not None and e.relative <= 1e-4 for e in rung.outputs.values()), rung


def test_no_tail() -> None:
    """A span to the end: the last visual token is the query."""
    module, x, program = prepared("llama")
    compressed = compress(program, f"fastv:keep=9,span={FIRST}:{COUNT}")
    with torch.no_grad():
        assert error(compressed.module()(inputs_embeds=x).logits, eager(module, x, {2: [("fastv", 9)]}, text=0)) < 1e-5
        compressed = compress(program, f"dart:keep=9,span={FIRST}:{COUNT}")
        assert error(compressed.module()(inputs_embeds=x).logits, eager(module, x, {2: [("dart", 9)]}, text=0)) < 1e-5


class LastToken(nn.Module):
    """What a prefill gives: the scores behind the last token alone, read by its position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.model(inputs_embeds=inputs_embeds).logits[:, -1]


@pytest.mark.parametrize("case", ["fastv", "pyramiddrop", "sparsevlm", "dart"])
def test_the_last_tokens_are_read(case: str) -> None:
    module, x, _ = prepared("llama", 2)
    specs, drops = CASES[case]
    theirs = eager(module, x, drops)
    program = edgewise.capture(module, (), {"inputs_embeds": x, "logits_to_keep": 3})
    ours = compress(program, *specs).module()(inputs_embeds=x).logits
    assert ours.shape[1] == 3 and error(ours, theirs[:, -3:]) < 1e-5
    program = edgewise.capture(LastToken(module), (x,))
    assert program.analysis.streams[0].trailing == 1
    assert error(compress(program, *specs).module()(x), theirs[:, -1]) < 1e-5


def test_a_span_leaves_the_last_tokens() -> None:
    module, x, _ = prepared("llama")
    program = edgewise.capture(module, (), {"inputs_embeds": x, "logits_to_keep": 3})
    compress(program, f"fastv:keep=9,span={FIRST}:{COUNT - 3}")
    with pytest.raises(InputError, match=f"the last 3 of the tokens by position: end the span at {COUNT - 3}"):
        compress(program, f"fastv:keep=9,span={FIRST}:{COUNT - 2}")


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("fastv:keep=7", InputError, "say which tokens .* span=START:STOP"),
        ("fastv:keep=7,span=29:5", InputError, r"span=29:5 is out of range: 0 <= START < STOP <= 40"),
        ("fastv:keep=7,span=5:41", InputError, r"span=5:41 is out of range: 0 <= START < STOP <= 40"),
        ("fastv:keep=7,span=5", InputError, "span=5 is not START:STOP"),
        ("fastv:keep=25,span=5:29", InputError, "keep=25 is out of range: .* 1 and 24"),
        ("fastv:span=5:29", InputError, "give keep"),
        ("fastv@decoder.block[0]:keep=7,span=5:29", InputError, "no attention comes before the first block"),
        ("dart@decoder.block[0]:keep=7,span=5:29", InputError, "no attention comes before the first block"),
        ("fastv@decoder.block[4]:keep=7,span=5:29", InputError, r"decoder.block\[4\]"),
        (
            "pyramiddrop:span=5:29,stages=[0.25,0.5]",
            InputError,
            "stage 1 keeps 12 tokens, and 6 are left: ratios may not rise",
        ),
        (
            "pyramiddrop@decoder.block[1,2,3]:span=5:29,stages=[0.5]",
            InputError,
            "it has 1 stages, and is placed at more",
        ),
        ("pyramiddrop@decoder.block[1,2]:span=5:29,stages=[0.5,0]", InputError, "stage 1 is 0: give a share above 0"),
        ("pyramiddrop@decoder.block[1]:span=5:29,stages=[-0.5]", InputError, "stage 0 is -0.5: give a share above 0"),
        ("pyramiddrop@decoder.block[1]:span=5:29,stages=[nan]", InputError, "stage 0 is nan: give a share above 0"),
        ("pyramiddrop@decoder.block[1]:span=5:29,stages=[inf]", InputError, "stage 0 is inf: give a share above 0"),
        ("sparsevlm@decoder.block[1]:keep=7,span=5:40", InputError, "rates by text tokens behind"),
        ("tome:keep=0.5", Refused, "the attention at .* is causal.* use dart, fastv, pyramiddrop, sparsevlm"),
        ("topk@decoder.block[1]:keep=7", Refused, "the attention at decoder.block.1. is causal.* use dart, fastv"),
        ("pool:stride=2", EdgewiseError, "decoder"),
    ],
)
def test_specs_that_cannot_be(spec: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"(?s){message}"):
        compress(prepared("llama")[2], spec)


def test_one_span_for_all() -> None:
    program = prepared("llama")[2]
    first = f"fastv@decoder.block[1]:keep=9,{SPAN}"
    assert len(compress(program, first, f"fastv@decoder.block[2]:keep=3,{SPAN}").steps) == 2
    with pytest.raises(InputError, match="span=1:4 is not the span of fastv before it, 5:29"):
        compress(program, first, "fastv@decoder.block[2]:keep=3,span=1:4")


@pytest.mark.parametrize("name", DECODER)
def test_a_model_without_a_decoder(name: str) -> None:
    model, inputs = build("vit", small=True)
    program = edgewise.capture(model, (), inputs)
    with pytest.raises(Refused, match="no causal attention over embedded tokens was found"):
        compress(program, f"{name}:keep=7,span=1:20")
    with pytest.raises(InputError, match=f"{name} has no meaning at encoder.block.1.: it goes to decoder.block"):
        compress(program, f"{name}@encoder.block[1]:keep=7,span=1:20")
