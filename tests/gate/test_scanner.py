"""What the gate reads out of JSON bodies, against Python's json."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.gate.body_reader import JSON_TYPE, BodyReader

pytestmark = pytest.mark.timeout(300)  # thousands of bodies, on a busy machine too

# Python's opinion --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    model: str | None
    stream: bool


class _Pairs(list[tuple[str, Any]]):
    """An object, with keys that are there twice."""


def _no_constant(name: str) -> None:
    raise ValueError(name)


def opinion(body: bytes) -> Verdict | None:
    """What is to be found in a body; None if it is no JSON object."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_Pairs, parse_constant=_no_constant)
    except ValueError:
        return None
    if not isinstance(value, _Pairs):
        return None
    models = [item for key, item in value if key == "model"]
    streams = [item for key, item in value if key == "stream"]
    model = models[0] if len(models) == 1 and isinstance(models[0], str) else None
    if model is not None and any("\ud800" <= letter <= "\udfff" for letter in model):
        model = None
    return Verdict(model, bool(streams) and streams[-1] is True)


def agree(reader: BodyReader, body: bytes) -> None:
    expected = opinion(body)
    found = reader.look(body)
    if expected is None:
        assert "error" in found, (body, found)
        return
    assert "error" not in found, (body, found)
    assert Verdict(found.get("model"), found["stream"]) == expected, (body, found)
    assert (found.get("model") is None) == ("model_problem" in found)
    if expected.model is not None:
        assert json.loads(body[found["from"] : found["to"]]) == expected.model


# Bodies ------------------------------------------------------------------------------------------

LETTERS = st.characters() | st.sampled_from('\ud800\udc00\ude00"\\/\b\x7f\x00é漢😀')
TEXTS = st.text(LETTERS, max_size=40)
KEYS = st.sampled_from(["model", "stream", "messages", "prompt", "input"]) | TEXTS
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(TEXTS, inner, max_size=6),
    max_leaves=20,
)
SPACES = st.text(" \t\r\n", max_size=3)


def escaped(text: str, choose: Callable[[], bool]) -> str:
    """A JSON string with any of its characters written as escapes."""
    parts = []
    for letter in text:
        units = letter.encode("utf-16-be", "surrogatepass")
        must = letter in '"\\' or letter < " " or "\ud800" <= letter <= "\udfff"
        if must or choose():
            codes = [units[at : at + 2].hex() for at in range(0, len(units), 2)]
            parts += [f"\\u{code.upper() if choose() else code}" for code in codes]
        else:
            parts.append(letter)
    return '"' + "".join(parts) + '"'


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """An object as text, in one of the many ways to write it."""
    seed = draw(st.integers(0, 1000))
    how_often = draw(st.sampled_from([0.0, 0.3, 1.0]))
    dice = random.Random(seed)

    def choose() -> bool:
        return dice.random() < how_often

    parts = []
    for key, value in draw(st.lists(st.tuples(KEYS, VALUES), max_size=6)):
        if isinstance(value, str):
            text = escaped(value, choose)
        else:
            ascii_only = draw(st.booleans())
            text = json.dumps(
                value, ensure_ascii=ascii_only, indent=draw(st.sampled_from([None, 1]))
            )
            if not ascii_only:
                text = text.encode("utf-8", "replace").decode()
        name = escaped(key, choose)
        parts.append(f"{draw(SPACES)}{name}{draw(SPACES)}:{draw(SPACES)}{text}{draw(SPACES)}")
    body = draw(SPACES) + "{" + ",".join(parts) + "}" + draw(SPACES)
    return body.encode()


ODD_BYTES = st.sampled_from(
    [
        bytes([b])
        for b in b'{}[]:,"\\ \n\t\r\x00\x1f/0123456789.eE+-tfnu\x7f\x80\xbf\xc0\xc2\xe0\xed'
    ]
    + [b"true", b"null", b"\\u", b"\\ud83d", b'"model":', b'"stream":true', b"\xed\xa0\x80", b"01"]
    + [b"\xf0\x9f\x98\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"//", b"'"]
)


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """An object after some bytes were lost, doubled, exchanged or put in."""
    body = draw(objects())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(body)))
        to = draw(st.integers(at, min(len(body), at + 8)))
        how = draw(st.sampled_from(["cut", "lose", "double", "put in", "exchange"]))
        if how == "cut":
            body = body[:at]
        elif how == "lose":
            body = body[:at] + body[to:]
        elif how == "double":
            body = body[:to] + body[at:]
        elif how == "put in":
            body = body[:at] + draw(ODD_BYTES) + body[at:]
        else:
            body = body[:at] + draw(ODD_BYTES) + body[to:]
    return body


FEW_HUNDRED = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@FEW_HUNDRED
@given(body=objects())
@example(body=b"{}")
@example(body=b'{"\\u006dodel": "\\ud83d\\ude00", "stream": true}')
@example(body=b'{"model": "\\ud83d", "stream": false}')
@example(body=b'{"model": "\\ud83d\\u0041"}')
@example(body=b'{"stream": true, "stream": null, "model": ""}')
@example(body=b'{"a": {"model": "x"}, "model": "y"}')
def test_in_every_object_the_same_is_found_as_python_finds(reader: BodyReader, body: bytes):
    agree(reader, body)


@FEW_HUNDRED
@given(body=broken())
def test_of_every_broken_object_the_verdict_is_pythons(reader: BodyReader, body: bytes):
    agree(reader, body)


@FEW_HUNDRED
@given(body=st.lists(ODD_BYTES | st.binary(max_size=3), max_size=12).map(b"".join))
def test_of_any_bytes_the_verdict_is_pythons(reader: BodyReader, body: bytes):
    agree(reader, body)
    agree(reader, b'{"a":' + body + b"}")
    agree(reader, b'{"a":"' + body + b'","model":"m"}')


def test_every_edge_of_utf8_is_where_python_has_it(reader: BodyReader):
    leads = b"\x7f\x80\xbf\xc0\xc1\xc2\xdf\xe0\xe1\xec\xed\xee\xef\xf0\xf1\xf3\xf4\xf5\xff"
    for lead in leads:
        for second in b"\x22\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0":
            for more in (b"", b"\x80", b"\xbf\x80", b"\x80\xbf\xbf"):
                agree(reader, b'{"model":"%s"}' % (bytes([lead, second]) + more))


# By hand -----------------------------------------------------------------------------------------

NOT_OBJECTS = {
    b"": "the body is empty",
    b"  ": "the body is empty",
    b"[1]": "not a JSON object: it does not begin with { (byte 1)",
    b"\xef\xbb\xbf{}": "not a JSON object: it does not begin with { (byte 1)",
    b"{": "not JSON: it ends too early, after byte 1",
    b'{"model": "secret': "not JSON: it ends too early, after byte 17",
    b'{"a": 01}': "not JSON: unexpected character at byte 8",
    b'{"a": NaN}': "not JSON: unexpected character at byte 7",
    b'{"a": -Infinity}': "not JSON: unexpected character at byte 8",
    b'{"a": 1,}': "not JSON: unexpected character at byte 9",
    b"{'a': 1}": "not JSON: unexpected character at byte 2",
    b'{"a": [1}': "not JSON: unexpected character at byte 9",
    b'{"a": "\n"}': "not JSON: control character in a string at byte 8",
    b'{"a": "\\x"}': "not JSON: bad escape in a string at byte 9",
    b'{"a": "\\u12g4"}': "not JSON: bad escape in a string at byte 12",
    b'{"a": "\xff"}': "not JSON: not UTF-8 at byte 8",
    b'{"a": "\xed\xa0\x80"}': "not JSON: not UTF-8 at byte 9",
    b'{"a": "\xc3"}': "not JSON: not UTF-8 at byte 9",
    b"{} {}": "not JSON: more after the object at byte 4",
    b'{"a":' + b"[" * 1000: "not accepted: more than 1000 levels (byte 1005)",
}


@pytest.mark.parametrize("body", NOT_OBJECTS, ids=lambda body: repr(body[:20]))
def test_what_is_wrong_with_a_body_is_said_with_its_place(reader: BodyReader, body: bytes):
    assert reader.look(body) == {"error": NOT_OBJECTS[body]}


MODEL_PROBLEMS = {
    "{}": '"model" is missing',
    '{"Model": "a", "messages": [{"model": "a"}]}': '"model" is missing',
    '{"model": 7}': '"model" must be a string, got a number',
    '{"model": -7}': '"model" must be a string, got a number',
    '{"model": true}': '"model" must be a string, got true',
    '{"model": null}': '"model" must be a string, got null',
    '{"model": ["a"]}': '"model" must be a string, got a list',
    '{"model": {"model": "a"}}': '"model" must be a string, got an object',
    '{"model": "a", "model": "a"}': '"model" is given twice',
    '{"model": 7, "\\u006Dodel": "a"}': '"model" is given twice',
    '{"model": "a", "model": 7}': '"model" is given twice',
    '{"model": "\\udc00"}': '"model" has half a surrogate pair',
    json.dumps({"model": "x" * 4097}): '"model" is longer than 4096 bytes',
}


@pytest.mark.parametrize("body", MODEL_PROBLEMS, ids=lambda body: body[:40])
def test_an_object_without_a_usable_model_says_why(reader: BodyReader, body: str):
    found = reader.look(body.encode())
    assert found["model_problem"] == MODEL_PROBLEMS[body]
    assert "model" not in found


@pytest.mark.parametrize("levels", [1, 31, 32, 33, 500, 999])
def test_as_many_as_a_thousand_levels_are_read(reader: BodyReader, levels: int):
    for begin, end in ((b"[", b"]"), (b'{"a":[{"b":', b"}]}")):
        deep = levels * begin if begin == b"[" else levels // 3 * begin
        close = levels * end if begin == b"[" else levels // 3 * end
        body = b'{"a":' + deep + b"1" + close + b',"model":"m"}'
        assert reader.look(body)["model"] == "m"


def place_of(text: bytes) -> int:
    return zlib.crc32(text[:256])


@pytest.mark.parametrize("length", [0, 1, 253, 254, 255, 256, 1000])
def test_the_place_is_that_of_the_beginning_of_the_value(reader: BodyReader, length: int):
    texts = [json.dumps("x" * length), json.dumps([{"role": "user", "content": "y" * length}])]
    for text in texts:
        for key in ("messages", "prompt", "input"):
            body = b'{"a": 1, "%s": %s, "model": "m"}' % (key.encode(), text.encode())
            assert reader.look(body)["place"] == place_of(text.encode())


def test_messages_come_before_prompt_and_prompt_before_input(reader: BodyReader):
    values = {"messages": b"[1]", "prompt": b'"p"', "input": b"{}"}
    for keys in (["input", "messages", "prompt"], ["prompt", "input"], ["input", "prompt"]):
        body = b",".join(b'"%s":%s' % (key.encode(), values[key]) for key in keys)
        best = next(key for key in values if key in keys)
        assert reader.look(b"{" + body + b"}")["place"] == place_of(values[best])
    assert "place" not in reader.look(b'{"prompt": 1, "input": null}')


def test_a_compressed_body_is_refused_with_advice(reader: BodyReader):
    headers = {"Content-Type": JSON_TYPE, "Content-Encoding": "gzip"}
    reader.connection.request("POST", "/memory", b"\x1f\x8b", headers)
    found = json.loads(reader.connection.getresponse().read())
    assert found == [{"error": "the body has a Content-Encoding; send it without one"}]
