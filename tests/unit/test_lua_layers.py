"""The gate's Lua modules require only modules of lower layers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GATE = Path(__file__).parents[2] / "lua" / "gate"

# High to low. Modules of one layer do not know each other.
LAYERS = (
    {"phases"},
    {"duties", "pages"},
    {"hold", "health"},
    {"relay"},
    {"routing", "refusal", "rooms"},
    {"balancer", "bodies", "notifier", "payload", "cors", "idlers"},
    {"activity", "replays"},
    {"registry"},
    {"keys"},
    {"router", "picker", "prefer", "queue", "problem", "http", "limits", "events", "inner"},
    {"shapes", "store", "settings"},
    {"scanner", "multipart"},
    {"json_text"},
    {"clock", "client", "flows", "hops", "grammar", "body_file", "json"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PURE = ("router", "picker", "prefer", "queue", "shapes", "events", "json")

COMMENT = re.compile(r"--\[(=*)\[.*?\]\1\]|--[^\n]*", re.DOTALL)
REQUIRE = re.compile(r"""\brequire\b\s*\(?\s*(?:"([^"]*)"|'([^']*)'|(\S+))""")


def required(source: str) -> list[str]:
    """Names of what a module requires; anything but a literal name shows as ``?``."""
    code = COMMENT.sub("", source)
    return [double or single or "?" for double, single, _ in REQUIRE.findall(code)]


def modules() -> list[Path]:
    return sorted(GATE.glob("**/*.lua"))


def test_there_is_something_to_check():
    assert modules()


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_module_requires_only_lower_layers(path: Path):
    name = path.relative_to(GATE).with_suffix("").as_posix().replace("/", ".")
    assert name in LEVEL, f"lua/gate/{path.name} is in no layer; put it into LAYERS"
    names = required(path.read_text())
    assert "?" not in names, f"{name} requires something that is not a literal name"
    gate = [other.removeprefix("gate.") for other in names if other.startswith("gate.")]
    wrong = [other for other in gate if LEVEL.get(other, -1) <= LEVEL[name]]
    assert not wrong, f"{name} must not require {wrong}: not in a lower layer"


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_does_not_touch_ngx(name: str):
    code = COMMENT.sub("", (GATE / f"{name}.lua").read_text())
    assert not re.search(r"\bngx\b", code)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('local a = require "gate.store"', ["gate.store"]),
        ("local a = require('cjson.safe')", ["cjson.safe"]),
        ('-- require "gate.phases"\nlocal x', []),
        ("--[[ require 'gate.phases'\n]] local x", []),
        ('local a = require("gate." .. name)', ["gate."]),
        ("local a = require(name)", ["?"]),
    ],
)
def test_requires_are_found(source: str, expected: list[str]):
    assert required(source) == expected
