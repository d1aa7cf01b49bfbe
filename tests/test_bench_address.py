"""Addresses of devices, and the answers that a device may give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgewise
from edgewise.bench import remote
from edgewise.bench.remote import AdbAddress, SshAddress, device, parse_address
from edgewise.errors import InputError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://board", SshAddress("board")),
        ("ssh://me@board.lan:2222", SshAddress("board.lan", "me", 2222)),
        ("ssh://me@10.0.0.7/mnt/card/edgewise/", SshAddress("10.0.0.7", "me", None, "/mnt/card/edgewise")),
        ("ssh://[fe80::1%eth0]:22", SshAddress("fe80::1%eth0", None, 22)),
        ("adb", AdbAddress()),
        ("adb:emulator-5554", AdbAddress("emulator-5554")),
        ("adb:192.168.1.7:5555", AdbAddress("192.168.1.7:5555")),
        ("adb/data/local/tmp/x/", AdbAddress(None, "/data/local/tmp/x")),
        ("adb:0123/sdcard", AdbAddress("0123", "/sdcard")),
    ],
)
def test_addresses(text: str, address: object) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "board",
            "ssh://",
            "ssh:board",
            "ssh://-oProxyCommand=x",
            "ssh://-l@board",
            "ssh://a b",
            "ssh://me@@board",
        ),
        *(
            "ssh://board:0",
            "ssh://board:65536",
            "ssh://board:x",
            "ssh://board/$(x)",
            "ssh://board/a b",
            "ssh://board/a/../b",
        ),
        *(
            "ssh://board;x",
            "ssh://me;x@board",
            "ssh://board\n",
            "ssh://board/\n",
            "adb:",
            "adb:-s",
            "adb: x",
            "adb:x/../y",
            "adb:x/$(y)",
            "adbx",
            "http://board",
        ),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InputError, match=r"address|folder"):
        parse_address(text)


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=30))
def test_no_address_holds_what_a_shell_reads(text: str) -> None:
    for whole in (f"ssh://{text}", f"ssh://board/{text}", f"ssh://{text}@board", f"adb:{text}"):
        try:
            address = parse_address(whole)
        except InputError:
            continue
        for part in vars(address).values():
            assert not set(str(part)) & set(" \t\n;&|$`'\"\\<>(){}*?!#~") and not str(part).startswith("-")


def test_what_a_device_installs_is_what_edgewise_needs() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads the project file")
    root = Path(edgewise.__file__).parents[1]
    if not (root / "pyproject.toml").exists():
        pytest.skip("edgewise is installed, and its project is elsewhere")
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    assert {*remote.DEPENDENCIES} == {one for one in project["dependencies"] if not one.startswith("typer")}


def test_what_goes_to_a_device_is_small() -> None:
    files = remote.package_files()
    assert sum(path.stat().st_size for path in files.values()) < 2 * 2**20
    assert "edgewise/bench/schemas/record.json" in files and "edgewise/version.py" in files
    assert not [name for name in files if "exporter" in name or "passes" in name]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
)


@settings(deadline=None)
@given(json_values | st.fixed_dictionaries({"folder": st.text() | json_values, "missing": json_values}))
def test_whatever_a_device_answers(answer: Any) -> None:
    try:
        folder, missing = remote._answer(answer, {})
    except InputError:
        return
    assert folder.startswith("/") and ".." not in folder and missing == {}


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()), max_size=5))
def test_whatever_a_device_says(lines: list[bytes]) -> None:
    import io

    for message in device.messages(io.BytesIO(b"\n".join(lines)), "device"):
        assert isinstance(message, dict)


def test_deep_nesting_from_a_device_is_passed_over() -> None:
    import io

    assert list(device.messages(io.BytesIO(b"[" * 10**6 + b"\n" + b'{"a":' * 10**5 + b"\n{}\n"), "device")) == [{}]


def test_what_a_device_says_does_nothing_to_a_terminal() -> None:
    assert device.plain("a\x1b[2J\x07b\r\nc\u202e") == "a[2Jbc"
    assert device.plain("a\nb", lines=True) == "a\nb" and len(device.plain("x" * 10**6)) <= 500
