"""From spec text to counts: the grammar, its errors, and exact totals."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_analysis import program_of

from edgewise.errors import EdgewiseError, InputError, Refused
from edgewise.passes.plan import make_plan, parse_spec
from edgewise.passes.program import Program, compress


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(depth=4, tokens=20, prefix=1)


def test_grammar() -> None:
    spec = parse_spec(" topk@encoder.block[3]:keep=64,score=column ")
    assert (spec.method.name, spec.site, spec.parameters) == (
        "topk",
        "encoder.block[3]",
        {"keep": 64, "score": "column"},
    )
    assert parse_spec("tome:r=[4, 2,0],prop_attn=off").parameters == {"r": [4, 2, 0], "prop_attn": False}
    assert parse_spec("tome:keep=0.5,schedule=decreasing").parameters == {"keep": 0.5, "schedule": "decreasing"}
    assert isinstance(parse_spec("tome:keep=1.0").parameters["keep"], float)
    assert isinstance(parse_spec("tome:keep=1").parameters["keep"], int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty compression spec"),
        ("tomee:keep=1", "did you mean 'tome'"),
        ("TOME:r=1", "did you mean 'tome'"),
        ("tome:keeep=1", "did you mean 'keep'"),
        ("tome:keep", "not key=value"),
        ("tome:keep=", "not key=value"),
        ("tome:keep=half", "not a number"),
        ("tome:r=1.5", "not a whole number"),
        ("tome:r=[1,b]", "list of whole numbers"),
        ("tome:keep=1,keep=2", "given twice"),
        ("tome:keep=1,r=2", "not both"),
        ("topk@:keep=1", "no site behind"),
        ("tome:schedule=constnt,r=1", "did you mean 'constant'"),
        ("topk:score=klass,keep=1", "did you mean 'class'"),
        ("tome:r=1,prop_attn=maybe", "true or false"),
        ("topk:r=1", "unknown parameter of topk 'r'"),
    ],
)
def test_grammar_errors(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_spec(text)
    assert message in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[
            (f"{m}:keep={k}", "keep=")
            for m in ("tome", "topk")
            for k in ("0", "0.0", "1.5", "-1", "-0.5", "nan", "inf", "21", "1e9")
        ],
        ("tome:r=0", "r="),
        ("tome:r=11", "r=11 is too large: at most 10"),
        ("tome:r=-1", "r=-1"),
        ("tome", "give keep"),
        ("topk", "give keep"),
        ("tome:keep=1,schedule=constant", "19 merges do not fit|merges"),
        ("tome:r=[1,1,1,1,1]", "lists 5 blocks"),
        ("tome:r=[1],schedule=constant", "leave schedule out"),
        ("tome:r=[20]", "too large"),
        ("topk@encodr.block[1]:keep=2", "did you mean 'encoder.block[1]'"),
        ("topk@encoder.block[9]:keep=2", "unknown site"),
        ("topk@encoder.block[x]:keep=2", "unknown site"),
        ("topk@encoder.block[,]:keep=2", "names no block"),
        ("merge-grid@encoder.block[1]:side=2", "no meaning at"),
    ],
)
def test_errors_name_the_range(program: Program, text: str, message: str) -> None:
    with pytest.raises(EdgewiseError) as caught:
        compress(program, text)
    assert any(part in str(caught.value) for part in message.split("|")), str(caught.value)


def counts(program: Program, *specs: str) -> list[int]:
    plan, _ = make_plan(program.analysis, [parse_spec(s) for s in specs])
    return [step.tokens_out for _, steps in plan for step in steps]


def test_counts(program: Program) -> None:
    assert counts(program, "tome:r=[4,2,0,1]") == [17, 15, 14]
    assert counts(program, "tome:r=4") == [17, 13, 9, 5]
    assert counts(program, "tome:r=10") == [11, 6, 4, 3]
    assert counts(program, "tome@encoder.block[1,3]:r=2") == [19, 17]
    assert counts(program, "tome@encoder.block[1:]:r=2") == [19, 17, 15]
    assert counts(program, "tome@encoder.block[*]:r=2") == [19, 17, 15, 13]
    assert counts(program, "topk:keep=3") == [4] and counts(program, "topk:keep=1.0") == []
    assert counts(program, "topk@encoder.block[0]:keep=0.5", "topk@encoder.block[2]:keep=0.5") == [11, 6]


def test_a_clipped_r_is_noted(program: Program) -> None:
    notes = compress(program, "tome:r=10").notes
    assert any("block[1]: r=10 clipped to 5" in note for note in notes)


def test_compressing_an_output_that_nobody_reads_is_refused() -> None:
    quiet = program_of(depth=2, ends="class")
    with pytest.raises(Refused, match=r"use topk@encoder.block\[i\]"):
        compress(quiet, "topk@encoder.out:keep=2")
    assert compress(quiet, "topk:keep=2").sites[-1].tokens_out == 3


@settings(max_examples=60, deadline=None)
@given(
    keep=st.one_of(st.integers(2, 20), st.floats(0.11, 1.0)),
    schedule=st.sampled_from(["constant", "increasing", "decreasing"]),
)
def test_totals_are_exact(keep: float, schedule: str) -> None:
    program = program_of(depth=4, tokens=20, prefix=1)
    left = keep if isinstance(keep, int) else max(1, int(keep * 20 + 1e-9))
    steps = counts(program, f"tome:keep={keep},schedule={schedule}")
    assert (steps or [21])[-1] == 1 + left
    assert steps == sorted(steps, reverse=True)
