"""Forms, long bodies, and another model put into them."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gate.body_reader import JSON_TYPE, BodyReader

# Forms -------------------------------------------------------------------------------------------

FORM = 'multipart/form-data; boundary="b-1"'


def part(disposition: str, value: bytes, *more: str) -> bytes:
    lines = [f"Content-Disposition: {disposition}", *more]
    return b"--b-1\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + value + b"\r\n"


MODEL_PART = part('form-data; name="model"', "wörd".encode())
FILE_PART = part(
    'form-data; name="file"; filename="a;\\"b.wav"', b"\r\n--b-\r\n--\r\n\x00\xff\r", "X: y"
)
END = b"--b-1--\r\n"


@pytest.mark.parametrize(
    "body",
    [
        MODEL_PART + END,
        FILE_PART + MODEL_PART + END,
        MODEL_PART + FILE_PART + END,
        b"preamble\r\n" + MODEL_PART + END + b"epilogue\r\n--b-1\r\nno part",
        part("form-data; name=model", "wörd".encode()) + END,
        part('FORM-DATA ;NAME = "model" ;', "wörd".encode()) + END,
        b'--b-1  \r\nX: y\r\ncontent-disposition: form-data;\r\n name="model"\r\n\r\n'
        + "wörd\r\n".encode()
        + END,
        part('form-data; name="x"', b'name="model"') + MODEL_PART + END[:-2],
    ],
)
def test_the_model_of_a_form_is_found(reader: BodyReader, body: bytes):
    for place in ("memory", "file"):
        found = reader.look(body, FORM, place)
        assert found["model"] == "wörd", found
        assert body[found["from"] : found["to"]] == "wörd".encode()
        assert found["stream"] is False


@pytest.mark.parametrize(("value", "stream"), [("true", True), ("True", True), ("false", False)])
def test_a_form_may_ask_for_a_stream(reader: BodyReader, value: str, stream: bool):
    body = FILE_PART + part('form-data; name="stream"', value.encode()) + MODEL_PART + END
    assert reader.look(body, FORM)["stream"] is stream


BAD_FORMS = {
    b"": "not a form: it ends too early, behind part 0",
    MODEL_PART: "not a form: it ends too early, behind part 1",
    MODEL_PART + b"--b-1": "not a form: it ends too early, behind part 1",
    MODEL_PART + b"--b-1x\r\n": "not a form: unreadable delimiter behind part 1",
    MODEL_PART + b"--b-1" + b" " * 100: "not a form: unreadable delimiter behind part 1",
    b"--b-1\r\n\r\nx\r\n" + END: "not a form: part 1 has no readable name",
    b"--b-1\nContent-Disposition: form-data; name=a\n\nx\n--b-1--": (
        "not a form: unreadable delimiter behind part 0"
    ),
    part("form-data", b"") + END: "not a form: part 1 has no readable name",
    part('form-data; name="model', b"") + END: "not a form: part 1 has no readable name",
    part('form-data; name="a"; name="model"', b"") + END: "not a form: part 1 has no readable name",
    part("attachment; name=model", b"") + END: "not a form: part 1 has no readable name",
    part("form-data; name=a", b"", "Content-Disposition: form-data; name=model") + END: (
        "not a form: part 1 has no readable name"
    ),
    part("form-data; name=a", b"", "X: " + "y" * 20000) + END: (
        "not a form: the headers of part 1 are too long"
    ),
    part("form-data; name=a", b"") * 2001 + END: "not a form: more than 2000 parts",
}


@pytest.mark.parametrize("body", BAD_FORMS, ids=lambda body: repr(body[:30]))
def test_a_form_that_may_be_read_in_two_ways_is_refused(reader: BodyReader, body: bytes):
    assert reader.look(body, FORM) == {"error": BAD_FORMS[body]}


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'Multipart/Form-Data; boundary="',
        "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; boundary=" + "x" * 300,
    ],
)
def test_a_form_needs_a_boundary(reader: BodyReader, kind: str):
    wanted = {"error": "multipart/form-data without a usable boundary"}
    assert reader.look(MODEL_PART + END, kind) == wanted


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (FILE_PART + END, '"model" is missing'),
        (MODEL_PART + FILE_PART + MODEL_PART + END, '"model" is given twice'),
        (part('form-data; name="model"; filename="x"', b"m") + END, "got a file"),
        (part('form-data; name="model"', b"m" * 4097) + END, "longer than 4096 bytes"),
        (part('form-data; name="model"', b"m" * 90000) + END, "longer than 4096 bytes"),
        (part('form-data; name="model"', b"m\xff") + END, "not UTF-8"),
        (part('form-data; name="model"', b"m\xc3") + END, "not UTF-8"),
    ],
)
def test_a_form_without_a_usable_model_says_why(reader: BodyReader, body: bytes, problem: str):
    found = reader.look(body, FORM)
    assert problem in found["model_problem"]
    assert "model" not in found


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_form_is_too_broken_to_be_refused(reader: BodyReader, data: st.DataObject):
    body = FILE_PART + MODEL_PART + END
    at = data.draw(st.integers(0, len(body)))
    to = data.draw(st.integers(at, len(body)))
    piece = data.draw(st.binary(max_size=4) | st.sampled_from([b"\r\n--b-1", b'"', b";", b"\\"]))
    found = reader.look(body[:at] + piece + body[to:], FORM)
    assert "error" in found or "model_problem" in found or found["model"] is not None


# Long bodies and other names ---------------------------------------------------------------------


def long_bodies() -> dict[str, tuple[bytes, str]]:
    image = b"QUJD" * 250_000
    message = b'{"role": "user", "content": "hi"}'
    return {
        "one long text": (b'{"messages": "%s", "model": "m"}' % image, JSON_TYPE),
        "many objects": (b'{"messages": [%s], "model": "m"}' % b", ".join([message] * 30_000), ""),
        "a form": (FILE_PART + part("form-data; name=f", image) + MODEL_PART + END, FORM),
        "short": (b'{"model": "m"}', JSON_TYPE),
    }


@pytest.mark.parametrize("name", long_bodies())
@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize("chunked", [False, True])
def test_another_model_reaches_the_service_whatever_the_body(
    reader: BodyReader, name: str, place: str, chunked: bool
):
    body, kind = long_bodies()[name]
    new = "org/mödel \\ 2"
    quoted = new if kind == FORM else json.dumps(new, ensure_ascii=False)
    answer = reader.post(f"/rename/{place}?to=org/m%C3%B6del%20%5C%202", body, kind, chunked)
    echoed = answer.read()
    old = "wörd".encode() if kind == FORM else b'"m"'
    head, _, tail = body.rpartition(old)
    assert echoed == head + quoted.encode() + tail
    assert answer.headers["X-Length"] == str(len(echoed))


def test_others_are_served_while_a_long_body_is_read(reader: BodyReader):
    message = b'{"role":"user","content":"hi"}'
    body = b'{"messages":[%s],"model":"m"}' % b",".join([message] * 400_000)
    other = http.client.HTTPConnection("127.0.0.1", reader.port, timeout=30)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(reader.look, body, JSON_TYPE, "file")
        short = 0
        while not long.done():
            other.request("GET", "/short")
            assert other.getresponse().read() == b""
            short += 1
        assert long.result()["model"] == "m"
    other.close()
    assert short > 1
