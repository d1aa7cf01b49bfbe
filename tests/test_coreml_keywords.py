"""Keywords and options of ops that are not their defaults: each is lowered as it is meant, or refused by name, and never lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_programs import case
from torch import Tensor, nn

from edgewise import targets
from edgewise.errors import InputError
from edgewise.verify import compare

pytest.importorskip("coremltools")

Expression = Callable[[Tensor], Any]


def image(x: Tensor) -> Tensor:
    return x.reshape(1, 2, 8, 6)


def heads(x: Tensor) -> Tensor:
    return x.reshape(1, 4, 4, 6)


KERNEL = torch.linspace(-1, 1, 36).reshape(2, 2, 3, 3)
ROWS = torch.tensor([3, 0, 3, 1])

KEYWORDS: dict[str, Expression] = {
    "gelu approximate": lambda x: F.gelu(2 * x, approximate="tanh"),
    "add alpha": lambda x: torch.add(x, x.flip(0), alpha=0.5),
    "add whole alpha": lambda x: torch.add(x.long(), 3, alpha=2),
    "sub alpha": lambda x: torch.sub(x, x.flip(0), alpha=3),
    "sub alpha of a number": lambda x: torch.sub(x, 0.3, alpha=3),
    "rsub alpha": lambda x: torch.rsub(x, x.flip(0), alpha=2),
    "div floor": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "div trunc": lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    "div floor by a tensor": lambda x: torch.div(x, x.flip(0).abs() + 0.3, rounding_mode="floor"),
    "round decimals": lambda x: torch.round(x, decimals=1),
    "sum dtype": lambda x: (x > 0).sum(-1, dtype=torch.float32),
    "sum keepdim": lambda x: x.sum((0, 1), keepdim=True),
    "mean dtype": lambda x: (x > 0).mean(0, dtype=torch.float32),
    "prod dtype": lambda x: (x > 0).prod(1, dtype=torch.int64),
    "cumsum dtype": lambda x: (x > 0).cumsum(1, dtype=torch.float32),
    "softmax dtype": lambda x: (4 * x).long().softmax(-1, dtype=torch.float32),
    "log_softmax dtype": lambda x: (4 * x).long().log_softmax(-1, dtype=torch.float32),
    "zeros_like dtype": lambda x: torch.zeros_like(x, dtype=torch.int64) + (x > 0),
    "full_like": lambda x: torch.full_like(x, 2) * x,
    "new_full": lambda x: torch.cat([x, x.new_full((1, x.shape[1]), -1)]),
    "new_full dtype": lambda x: x.new_full((2, 3), 2.7, dtype=torch.int64) + (x[:2, :3] > 0),
    "new_zeros": lambda x: torch.cat([x, x.new_zeros(1, x.shape[1])]),
    "new_ones dtype": lambda x: x.new_ones(2, 3, dtype=torch.int64) + (x[:2, :3] > 0),
    "full dtype": lambda x: torch.full((1, x.shape[1]), 2, dtype=torch.float32) * x,
    "full_like dtype": lambda x: torch.full_like(x, 2.7, dtype=torch.int64) + (x > 0),
    "arange dtype": lambda x: x + torch.arange(1, 7, dtype=torch.float32),
    "var correction": lambda x: x.var(-1, correction=0),
    "var unbiased": lambda x: x.var(-1, unbiased=True, keepdim=True),
    "std correction": lambda x: x.std((0, 1), correction=2),
    "norm ord": lambda x: torch.linalg.vector_norm(x, 1, -1, keepdim=True),
    "norm infinite": lambda x: torch.linalg.vector_norm(x, float("inf"), -1),
    "norm three": lambda x: torch.linalg.vector_norm(x, 3, -1),
    "norm dtype": lambda x: torch.linalg.vector_norm(x, 2, -1, dtype=torch.float32),
    "argmax keepdim": lambda x: x.argmax(1, keepdim=True),
    "amax keepdim": lambda x: x.amax((0, 1), keepdim=True),
    "topk smallest": lambda x: x.topk(3, 0, largest=False)[0],
    "sort stable": lambda x: (x * 2).round().sort(dim=1, descending=True, stable=True)[1],
    "sort descending": lambda x: x.sort(0, descending=True),
    "argsort stable": lambda x: (x * 2).round().argsort(dim=1, stable=True),
    "sdpa scale": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), scale=0.3),
    "sdpa causal": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True),
    "sdpa causal and scale": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True, scale=0.2),
    "sdpa grouped": lambda x: F.scaled_dot_product_attention(heads(x), heads(x)[:, :2], heads(x)[:, :2], enable_gqa=True),
    "clamp max": lambda x: x.clamp(max=0.2),
    "clamp whole": lambda x: x.clamp(-1, 1),
    "clamp of whole numbers": lambda x: (9 * x).to(torch.int64).clamp(0.5, float("inf")),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.7),
    "leaky_relu": lambda x: F.leaky_relu(x, negative_slope=0.3),
    "elu alpha": lambda x: F.elu(x, alpha=0.7),
    "celu alpha": lambda x: F.celu(x, alpha=0.7),
    "softplus": lambda x: F.softplus(x, beta=2.0, threshold=1.0),
    "softshrink": lambda x: F.softshrink(x, 0.3),
    "hardshrink": lambda x: F.hardshrink(x, 0.3),
    "threshold": lambda x: F.threshold(x, 0.1, -2.0),
    "logit eps": lambda x: torch.logit(x, eps=0.1),
    "nan_to_num": lambda x: torch.nan_to_num(torch.log(x), nan=3.0, posinf=2.0, neginf=-1.0),
    "glu dim": lambda x: F.glu(x, dim=0),
    "layer_norm eps": lambda x: F.layer_norm(0.01 * x, (6,), eps=0.1),
    "group_norm eps": lambda x: F.group_norm(0.01 * image(x), 2, eps=0.1),
    "rms_norm eps": lambda x: F.rms_norm(0.01 * x, (6,), eps=0.1),
    "normalize": lambda x: F.normalize(x, p=1, dim=0, eps=3.0),
    "cosine eps": lambda x: F.cosine_similarity(0.01 * x, x.flip(0), dim=1, eps=2.0),
    "cosine spread": lambda x: F.cosine_similarity(x[:, None], x[:, :1], dim=1),
    "addmm": lambda x: torch.addmm(x[:, :4], x, x[:6, :4], beta=0.5, alpha=2.0),
    "baddbmm": lambda x: torch.baddbmm(heads(x)[0][:, :, :4], heads(x)[0], heads(x)[0].mT, beta=2, alpha=0.5),
    "addcmul": lambda x: torch.addcmul(x, x.flip(0), x, value=0.3),
    "addcdiv": lambda x: torch.addcdiv(x, x.flip(0), x.abs() + 1, value=0.3),
    "lerp": lambda x: torch.lerp(x, x.flip(0), 0.3),
    "conv stride": lambda x: F.conv2d(image(x), KERNEL, stride=(2, 1), padding=(1, 2)),
    "conv dilation": lambda x: F.conv2d(image(x), KERNEL, dilation=2),
    "conv groups": lambda x: F.conv2d(image(x), KERNEL[:, :1], groups=2),
    "conv same": lambda x: F.conv2d(image(x), KERNEL, padding="same"),
    "transposed conv": lambda x: F.conv_transpose2d(image(x), KERNEL, stride=2, padding=1, output_padding=1),
    "avg_pool ceil": lambda x: F.avg_pool2d(image(x), 3, 2, ceil_mode=True),
    "avg_pool without padding": lambda x: F.avg_pool2d(image(x), 3, 2, 1, count_include_pad=False),
    "avg_pool divisor": lambda x: F.avg_pool2d(image(x), 2, divisor_override=3),
    "max_pool dilation": lambda x: F.max_pool2d(image(x), 2, 1, dilation=2),
    "max_pool ceil": lambda x: F.max_pool2d(image(x), 3, 2, ceil_mode=True),
    "pad value": lambda x: F.pad(x, (1, 2), value=0.7),
    "pad reflect": lambda x: F.pad(image(x), (1, 2, 1, 1), mode="reflect"),
    "pad replicate": lambda x: F.pad(image(x), (1, 2, 1, 1), mode="replicate"),
    "pad circular": lambda x: F.pad(image(x), (1, 2, 1, 1), mode="circular"),
    "bilinear corners": lambda x: F.interpolate(image(x), (5, 9), mode="bilinear", align_corners=True),
    "bilinear": lambda x: F.interpolate(image(x), scale_factor=2.0, mode="bilinear", align_corners=False),
    "bilinear antialias": lambda x: F.interpolate(image(x), (4, 3), mode="bilinear", antialias=True),
    "bicubic": lambda x: F.interpolate(image(x), (5, 9), mode="bicubic"),
    "nearest": lambda x: F.interpolate(image(x), (5, 9), mode="nearest"),
    "nearest exact": lambda x: F.interpolate(image(x), (5, 9), mode="nearest-exact"),
    "embedding padding": lambda x: F.embedding(ROWS, x, padding_idx=0),
    "scatter reduce": lambda x: x.scatter(0, ROWS[:, None].expand(4, 6), x[:4], reduce="add"),
    "scatter_reduce": lambda x: x.scatter_reduce(0, ROWS[:, None].expand(4, 6), x[:4], reduce="amax", include_self=False),
    "index_add alpha": lambda x: x.index_add(0, ROWS, x[:4], alpha=0.5),
    "index_put accumulate": lambda x: x.index_put((ROWS,), x[:4], accumulate=True),
    "searchsorted right": lambda x: torch.searchsorted(torch.tensor([-1.0, 0, 0, 1]), (x * 2).round(), right=True),
    "bucketize right": lambda x: torch.bucketize((x * 2).round(), torch.tensor([-1.0, 0, 0, 1]), right=True),
    "tril diagonal": lambda x: x.tril(diagonal=-1) + x.triu(diagonal=2),
    "one of several": lambda x: F.one_hot(x.argmax(1), 9),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "roll": lambda x: x.roll((1, 2), (0, 1)),
    "isclose": lambda x: torch.isclose(x, x.round(), rtol=0.1, atol=0.1, equal_nan=True),
    "linspace": lambda x: x + torch.linspace(-1, 1, 6),
    "diff": lambda x: x.diff(n=2, dim=0),
    "quantile": lambda x: x.quantile(0.3, dim=1, interpolation="lower"),
    "cross_entropy smoothing": lambda x: F.cross_entropy(x, ROWS.repeat(2), label_smoothing=0.2),
    "grid_sample": lambda x: F.grid_sample(image(x), image(x).reshape(1, 8, 6, 2).clamp(-1, 1), align_corners=True),
    "grid_sample border": lambda x: F.grid_sample(
        image(x), image(x).reshape(1, 8, 6, 2), padding_mode="border", align_corners=False
    ),
    "grid_sample nearest": lambda x: F.grid_sample(
        image(x), image(x).reshape(1, 8, 6, 2), mode="nearest", padding_mode="reflection", align_corners=False
    ),
    "grid_sample reflection": lambda x: F.grid_sample(
        image(x), 2 * image(x).reshape(1, 8, 6, 2), padding_mode="reflection", align_corners=True
    ),
    "grid_sample zeros": lambda x: F.grid_sample(image(x), image(x).reshape(1, 8, 6, 2), align_corners=False),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(image(x), 2),
    "masked_fill": lambda x: x.masked_fill(x > 0, float("-inf")).softmax(1),
    "pow of a number": lambda x: 2.0**x,
}
"""What may be lost when a program is read: an example of each, whose value shows it."""


REFUSED = {
    *("round decimals", "prod dtype", "softmax dtype", "log_softmax dtype", "lerp", "avg_pool divisor", "max_pool dilation"),
    *("pad circular", "bilinear antialias", "nearest exact", "scatter_reduce", "searchsorted right", "bucketize right", "isclose"),
    *("diff", "quantile", "cross_entropy smoothing"),
}
"""What cannot be said in ops that coremltools reads. All else is lowered."""


class Written(nn.Module):
    """A module that is one expression."""

    def __init__(self, expression: Expression) -> None:
        super().__init__()
        self.expression = expression

    def forward(self, x: Tensor) -> Any:
        return self.expression(x)


def given(expression: Expression) -> Any:
    x = torch.randn(16 if "heads" in expression.__code__.co_names or "image" in expression.__code__.co_names else 8, 6,
                    generator=torch.Generator().manual_seed(5))  # fmt: skip
    return case(Written(expression), x)


def lowered_or_refused(name: str, folder: Path) -> str | None:
    """Lower an example and compare its numbers; gives the message if it is refused."""
    one = given(KEYWORDS[name])
    names = {"input_names": one.input_names, "output_names": one.output_names}
    try:
        files = targets.get("coreml").lower(one.exported, folder, "m", precision="fp32", **names)
    except InputError as refused:
        return str(refused)
    with targets.get("coreml").load(files) as session:
        outputs = session.run(one.feeds)
    for output, expected in one.expected.items():
        found = compare(expected, outputs[output])
        assert outputs[output].dtype == expected.dtype
        assert found.finite and found.relative is not None and found.relative <= 1e-5, f"{name} is lowered as something else"
    return None


@pytest.mark.parametrize("name", KEYWORDS)
def test_an_option_is_never_lost(name: str, tmp_path: Path) -> None:
    refused = lowered_or_refused(name, tmp_path)
    assert (refused is not None) == (name in REFUSED), refused
    if refused is not None:
        assert refused.startswith("target coreml cannot lower this program") and "test_coreml_keywords.py" in refused
        assert list(tmp_path.iterdir()) == []


GUARDED = [
    *("gelu approximate", "add alpha", "sub alpha", "sub alpha of a number", "rsub alpha", "sdpa grouped"),
    *("sum dtype", "mean dtype", "norm dtype", "cumsum dtype"),
]


@pytest.mark.parametrize("name", GUARDED)
def test_keywords_are_refused_where_no_pass_of_ours_says_them_otherwise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard alone: what coremltools does not ask for is refused, or is right."""
    from edgewise.targets.coreml import legal

    monkeypatch.setattr(legal, "REWRITES", {})
    refused = lowered_or_refused(name, tmp_path)
    assert refused is None or "target coreml cannot lower this program" in refused
    if name in ("gelu approximate", "add alpha", "sub alpha", "sdpa grouped"):
        assert refused is not None and " node " in refused
