"""Malformed requests, made in families; and a service that keeps every byte it was sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import string
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.gate.harness import free_port

WARM = "/llm/"
COLD = "/sleepy/"
MODEL = "sleepy-model"
STOWAWAY = b"GET /llm/stowaway HTTP/1.1\r\nHost: a\r\n\r\n"

# What a header's name may be made of; a colon ends it.
TOKEN = string.ascii_letters.encode() + string.digits.encode() + b"!#$%&'*+-.^_`|~:"
ANSWERED = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass(frozen=True)
class Case:
    """One connection's bytes. Refused ones must not reach anything; the others at most once."""

    name: str
    raw: bytes
    refused: bool


@dataclass
class Kept:
    """One request as the service read it."""

    head: bytes
    body: bytes

    @property
    def lines(self) -> list[bytes]:
        return self.head.split(b"\r\n")[1:-2]


@dataclass
class Keeper:
    """Reads requests by Content-Length alone and keeps them; what is none goes into ``odd``."""

    port: int = field(default_factory=free_port)
    kept: list[Kept] = field(default_factory=list)
    odd: list[bytes] = field(default_factory=list)

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(
            self._talk, "127.0.0.1", self.port, limit=1 << 20, backlog=1024
        )

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await self._take(reader):
                writer.write(ANSWERED)
                await writer.drain()
        writer.close()

    async def _take(self, reader: asyncio.StreamReader) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                self.odd.append(error.partial)
            return False
        body = b""
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                body = await reader.readexactly(int(line.partition(b":")[2]))
        if b"/health" not in head[:20]:
            self.kept.append(Kept(head, body))
        return True


def request(
    path: str,
    *lines: bytes,
    body: bytes = b"",
    method: bytes = b"POST",
    version: bytes = b"HTTP/1.1",
    host: bytes = b"Host: a",
) -> bytes:
    """A request of exactly these header lines."""
    head = [method + b" " + path.encode("latin-1") + b" " + version, *([host] if host else [])]
    return b"\r\n".join([*head, *lines, b"", body])


def corpus() -> list[Case]:
    """Every family, each case with a path of its own."""
    families = (
        lengths(),
        encodings(),
        chunks(),
        lines(),
        names_and_values(),
        request_lines(),
        hosts(),
        doubles(),
        giants(),
        truncated(),
        bodies(),
        forms(),
    )
    return [case for family in families for case in family]


def lengths() -> Iterator[Case]:
    bad = [b"", b"-1", b"+2", b"0x2", b"2,2", b"2, 2", b"2 2", b"2;", b"2.0", b"2e0", b"a", b'"2"']
    bad += [
        b"9" * 30,
        b"18446744073709551618",
        b"\xb2",
        b"1\x0b",
        b"\x0c2",
        b"NaN",
        b"-0",
        b"2\x00",
    ]
    for value in bad:
        yield Case(
            f"length {value!r}",
            request(COLD + "cl", b"Content-Length: " + value, body=STOWAWAY),
            True,
        )
    for first, second in ((b"2", b"2"), (b"0", b"40"), (b"40", b"0"), (b"2", b""), (b"", b"2")):
        both = [b"Content-Length: " + first, b"Content-Length: " + second]
        yield Case(
            f"lengths {first!r} {second!r}", request(COLD + "2cl", *both, body=STOWAWAY), True
        )
    for name in (b"Content-Length ", b"Content-Length\t", b" Content-Length", b"Content Length"):
        yield Case(
            f"length named {name!r}", request(COLD + "cl", name + b": 40", body=STOWAWAY), True
        )


def encodings() -> Iterator[Case]:
    values = [b"xchunked", b"identity", b"gzip", b"gzip, chunked", b"chunked, chunked", b"", b","]
    values += [
        b"chunked, identity",
        b"\x0bchunked",
        b"\x0cchunked",
        b'"chunked"',
        b"chunke",
        b"chu",
    ]
    values += [b"chunked;q=1", b"chunked\x0b", b"[chunked]", b"x: chunked", b"chunked chunked"]
    values += [b"c\xc5\xbfunked", b"chunked\x85", b"\xa0chunked", b"deflate", b"trailers", b"0"]
    for value in values:
        line = b"Transfer-Encoding: " + value
        yield Case(f"coding {value!r}", request(COLD + "te", line, body=b"0\r\n\r\n"), True)
        with_length = [line, b"Content-Length: 5"]
        yield Case(
            f"coding {value!r} and length",
            request(COLD + "te", *with_length, body=b"0\r\n\r\n" + STOWAWAY),
            True,
        )
    good = b"Transfer-Encoding: chunked"
    for line in (b"Content-Length: 5", b"Content-Length: 0", b"Transfer-Encoding: identity"):
        for pair in ([good, line], [line, good]):
            yield Case(
                f"chunked and {pair!r}", request(COLD + "te", *pair, body=b"0\r\n\r\n"), True
            )
    for line in (b"Transfer-Encoding : chunked", b"Transfer-Encoding\t: chunked"):
        yield Case(f"{line!r}", request(COLD + "te", line, body=b"0\r\n\r\n"), True)
    for line in (b" Transfer-Encoding: chunked", b"Transfer-Encoding:\r\n chunked"):
        yield Case(f"{line!r}", request(COLD + "te", line, body=b"0\r\n\r\n"), True)
    yield Case(
        "chunks in 1.0", request(COLD + "te", good, body=b"0\r\n\r\n", version=b"HTTP/1.0"), True
    )


def chunks() -> Iterator[Case]:
    bad = [b"-2\r\nab", b"0x2\r\nab", b" 2\r\nab", b"+2\r\nab", b"g\r\nab", b"\r\nab", b";\r\nab"]
    bad += [b"f" * 17 + b"\r\nab", b"2\r\nabc", b"2\r\nab;", b"2\rab", b'"2"\r\nab', b"\x00\r\nab"]
    bad += [b"2,\r\nab", b"2\x00\r\nab", b"2.\r\nab", b"\xb2\r\nab", b"2\x0b\r\nab", b"_2\r\nab"]
    for text in bad:
        yield Case(
            f"chunk {text!r}",
            request(
                WARM + "chunk",
                b"Transfer-Encoding: chunked",
                body=text + b"\r\n0\r\n\r\n" + STOWAWAY,
            ),
            True,
        )
    odd = [b"2;a=b\r\nab", b"2 \r\nab", b"002\r\nab", b"2\nab", b"2;\xff\r\nab"]
    for text in odd:
        yield Case(
            f"odd chunk {text!r}",
            request(WARM + "chunk", b"Transfer-Encoding: chunked", body=text + b"\r\n0\r\n\r\n"),
            False,
        )
    for trailer in (b"X-Slurmgate-User: a", b"Content-Length: 3", b"Host: b", b"Authorization: c"):
        yield Case(
            f"trailer {trailer!r}",
            request(
                WARM + "trailer",
                b"Transfer-Encoding: chunked",
                body=b"2\r\nab\r\n0\r\n" + trailer + b"\r\n\r\n",
            ),
            False,
        )


def lines() -> Iterator[Case]:
    bad = [
        b"XA",
        b": x",
        b"X A: x",
        b"X-A: b\r\n c",
        b"X-A: b\r\n\tc",
        b"X-A: b\rX-B: c",
        b"\x00: x",
    ]
    bad += [b"X-A: b\nX-B: c", b"X-A: b\nTransfer-Encoding: chunked", b"X-A\x00: b", b"X-A: b\x00c"]
    for line in bad:
        yield Case(f"line {line!r}", request(COLD + "line", line, b"X-Z: z", method=b"GET"), True)
    for name in (b"Transfer_Encoding", b"Content_Length", b"transfer.encoding", b"Content~Length"):
        yield Case(f"like {name!r}", request(COLD + "like", name + b": 2", body=b"ab"), True)
    for name in (
        b"X_Slurmgate_User",
        b"X-Slurmgate_User",
        b"x_api_key",
        b"Content_Type",
        b"Ho\xadst",
    ):
        yield Case(f"like {name!r}", request(COLD + "like", name + b": a", method=b"GET"), True)
    for line in (b"content-length", b"transfer-encoding", b"host", b"x, Content-Length"):
        yield Case(
            f"connection names {line!r}",
            request(COLD + "line", b"Connection: " + line, b"Content-Length: 2", body=b"ab"),
            True,
        )
    for line in (b"close, X-A", b"keep-alive\r\nConnection: X-A", b"X-A", b"x-a,,,X-A", b'"X-A"'):
        yield Case(
            f"connection {line!r}",
            request(WARM + "line", b"Connection: " + line, b"X-A: b", method=b"GET"),
            False,
        )
    for name in (b"User", b"user", b"Service", b"Inner", b"Private", b"Anything", b"-"):
        line = b"X-Slurmgate-" + name + b": root"
        yield Case(f"own {name!r}", request(WARM + "own", line, line, method=b"GET"), False)


def names_and_values() -> Iterator[Case]:
    for code in range(256):
        byte = bytes([code])
        yield Case(
            f"name with {byte!r}",
            request(WARM + "name", b"X" + byte + b"A: v", b"X-Z: z", method=b"GET"),
            byte not in TOKEN,
        )
        yield Case(
            f"value with {byte!r}",
            request(WARM + "value", b"X-A: v" + byte + b"w", b"X-Z: z", method=b"GET"),
            code in b"\r\n\x00",
        )
        yield Case(
            f"path with {byte!r}",
            request(WARM + "p" + byte.decode("latin-1") + "q", method=b"GET"),
            code < 33 or code in b"#\\%\x7f",
        )


def request_lines() -> Iterator[Case]:
    versions = [b"HTTP/1.2", b"HTTP/1.10", b"HTTP/01.1", b"HTTP/2.0", b"HTTP/3.0", b"HTTP/9.9", b""]
    versions += [
        b"http/1.1",
        b"HTTP/1",
        b"HTTP/1.",
        b"HTTP/.1",
        b"HTTP/1.1a",
        b"HTTP /1.1",
        b"XTTP/1.1",
    ]
    for version in versions:
        raw = request(COLD + "version", method=b"GET", version=version)
        yield Case(f"version {version!r}", raw, True)
    yield Case("version 0.9", b"GET /sleepy/old\r\n", True)
    yield Case("no line", b"\r\n\r\n\r\n\r\n", True)
    for method in (
        b"get",
        b"G@T",
        b"G\x00T",
        b"GE\tT",
        b"G(T",
        b"\xffGET",
        b"",
        b"G\rT",
        b"CONNECT",
    ):
        yield Case(f"method {method!r}", request(COLD + "method", method=method), True)
    bad = [
        "/../",
        "/./",
        "/%2e%2e/",
        "/%2f",
        "/%5c",
        "/%00",
        "/%0d%0aX:y",
        "/%zz",
        "/%",
        "/%2",
    ]
    for path in bad:
        yield Case(f"path {path!r}", request("/sleepy" + path, method=b"GET"), True)
    for target in (
        "http://b/sleepy/x",
        "http://u@a/sleepy/x",
        "sleepy/x",
    ):
        yield Case(f"target {target!r}", request(target, method=b"GET"), True)
    for target in (
        "*",
        "a:80",
        "http:/sleepy",
        "http:///sleepy/x",
        "://",
        "?",
        "/sleepy/x y",
        "\x01",
    ):
        yield Case(f"target {target!r}", request(target, method=b"GET"), True)


def hosts() -> Iterator[Case]:
    bad = [
        "",
        " ",
        "a b",
        "a/b",
        "a\\b",
        "u:p@a",
        'a"b',
        "a<b>",
        "a:b",
        "a:99999",
        "a:1:2",
        "[::1",
        "a,b",
    ]
    bad += [
        "a\x01",
        "a\x7f",
        "\xff",
        "a;b",
        "a?b",
        "a#b",
        "a|b",
        "a'b",
        "a{b",
        "..",
        "[zz]",
        "a%00",
    ]
    for host in bad:
        raw = request(COLD + "host", method=b"GET", host=b"Host: " + host.encode("latin-1"))
        yield Case(f"host {host!r}", raw, True)
    yield Case("no host", request(COLD + "host", method=b"GET", host=b""), True)
    for second in (b"Host: b", b"Host: a", b"host: a", b"HOST: b", b"Host:"):
        yield Case(f"two hosts {second!r}", request(COLD + "host", second, method=b"GET"), True)


def doubles() -> Iterator[Case]:
    for name in (b"Authorization", b"x-api-key", b"Content-Type", b"Content-Encoding", b"Origin"):
        for other in (name, name.upper(), name.lower()):
            pair = [name + b": a", other + b": b"]
            yield Case(f"two {other!r}", request(COLD + "double", *pair, method=b"GET"), True)


def giants() -> Iterator[Case]:
    for size in (65_537, 100_000, 300_000):
        yield Case(
            f"line of {size}", request(COLD + "big", b"X-A: " + b"x" * size, method=b"GET"), True
        )
        yield Case(
            f"name of {size}", request(COLD + "big", b"x" * size + b": a", method=b"GET"), True
        )
        yield Case(f"path of {size}", request(COLD + "x" * size, method=b"GET"), True)
        yield Case(f"method of {size}", request(COLD + "big", method=b"X" * size), True)
    for count in (201, 1_000, 20_000):
        many = [b"X-%d: x" % i for i in range(count)]
        yield Case(f"{count} lines", request(COLD + "big", *many, method=b"GET"), True)
    yield Case("too large", request(COLD + "big", b"Content-Length: 9000000"), True)


def truncated() -> Iterator[Case]:
    whole = request(WARM + "cut", b"Content-Type: text/plain", b"Content-Length: 40", body=STOWAWAY)
    for end in range(len(whole) - 1):
        yield Case(f"cut at {end}", whole[:end], True)
    chunked = request(WARM + "cut", b"Transfer-Encoding: chunked", body=b"2\r\nab\r\n10\r\ncdef")
    for end in range(len(chunked) - 20, len(chunked)):
        yield Case(f"chunks cut at {end}", chunked[:end], True)


def by_model(body: bytes, *lines: bytes, path: str = "/v1/chat/completions") -> bytes:
    return request(path, *lines, b"Content-Length: %d" % len(body), body=body)


def bodies() -> Iterator[Case]:
    model = f'"model": "{MODEL}"'
    texts = [
        "",
        " ",
        "null",
        "true",
        "1",
        '""',
        "[]",
        "{}",
        f"[{{{model}}}]",
        f"{{{model}",
        f"{model}",
    ]
    texts += [f'{{"a": {{{model}}}}}', f'{{"a": [{{{model}}}]}}', f"{{{model},}}", f"{{{model}}}}}"]
    texts += [
        f"{{{model}}} x",
        f"{{{model}}}{{}}",
        f"{{{model}, {model}}}",
        f'{{"model": [{model}]}}',
    ]
    texts += [
        f"{{{model}, 'a': 1}}",
        f'{{{model} "a": 1}}',
        f'{{{model}, "a": }}',
        f'{{{model}, "a" 1}}',
    ]
    texts += [
        f'{{"model": "x", {model}}}',
        f'{{{model}, "mode\\u006c": "x"}}',
        f"\ufeff{{{model}}}",
    ]
    texts += [
        f'{{{model}, "a": {bad}}}' for bad in ("NaN", "Infinity", "-", "01", "1.", ".5", "1e", "+1")
    ]
    texts += [
        f'{{{model}, "a": {bad}}}'
        for bad in ("tru", "nul", "0x1", "1_0", "--1", "'a'", "[1,]", "[")
    ]
    texts += [f'{{{model}, "a": "{bad}"}}' for bad in ("\\x", "\\u12", "\\", "\n", "\t", "\0", '"')]
    texts += [f'{{"model": {bad}}}' for bad in ("null", "1", "true", "{}", "[]", '""', '"\\ud800"')]
    texts += [f'{{"Model": "{MODEL}"}}', f'{{"model ": "{MODEL}"}}', f'{{model: "{MODEL}"}}']
    texts += [
        f'{{"model": "{MODEL}\\u0000"}}',
        f'{{"model": "{MODEL} "}}',
        f'{{"model":: "{MODEL}"}}',
    ]
    texts += [f'{{{model}, "a": {"[" * 2000}{"]" * 2000}}}', f'{{{model}, "a": {"[" * 100000}']
    texts += [
        f"/* */{{{model}}}",
        f'{{{model}, // a\n"b": 1}}',
        f"model={MODEL}",
        f"<model>{MODEL}</model>",
    ]
    for text in texts:
        yield Case(f"body {text[:60]!r}", by_model(text.encode("utf-8")), True)
    good = json.dumps({"model": MODEL})
    for coding in ("utf-16", "utf-16-le", "utf-32", "utf-32-be"):
        yield Case(f"body in {coding}", by_model(good.encode(coding)), True)
    for letter in (
        b"\xff",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xf5\x80\x80\x80",
        b"\x80",
        b"\xe2\x82",
    ):
        spoilt = f'{{{model}, "a": "'.encode() + letter + b'"}'
        yield Case(f"body with {letter!r}", by_model(spoilt), True)
    for packing in (b"gzip", b"br", b"deflate", b"x", b"gzip, gzip"):
        yield Case(
            f"body coded {packing!r}",
            by_model(good.encode(), b"Content-Encoding: " + packing),
            True,
        )
    for path in ("/v1/../v1/chat/completions", "/v1/%2e/chat", "/v1/chat%2fcompletions", "/v1/a#b"):
        yield Case(f"api path {path!r}", by_model(good.encode(), path=path), True)
    for end in range(1, len(good)):
        yield Case(f"body cut at {end}", by_model(good[:end].encode()), True)


def forms() -> Iterator[Case]:
    part = f'Content-Disposition: form-data; name="model"\r\n\r\n{MODEL}\r\n'
    texts = [
        "",
        "--b",
        "--b--",
        "--b\r\n",
        "--b\r\n\r\n",
        f"--b\r\n{part}",
        f"--c\r\n{part}--c--\r\n",
    ]
    texts += [
        f"--b\r\n{part}--b\r\n{part}--b--\r\n",
        f"--b\r\n{part[:-9]}",
        "x" * 5000,
        "\r\n" * 3000,
    ]
    texts += [f"--b\r\nX: {'y' * 100_000}\r\n\r\n{MODEL}\r\n--b--\r\n", f"--b{part}--b--\r\n"]
    for text in texts:
        kind = b"Content-Type: multipart/form-data; boundary=b"
        yield Case(
            f"form {text[:60]!r}",
            by_model(text.encode(), kind, path="/v1/audio/transcriptions"),
            True,
        )
    whole = f"--b\r\n{part}--b--\r\n".encode()
    for wanting in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary="',
    ):
        line = b"Content-Type: " + wanting.encode()
        yield Case(
            f"form of {wanting!r}", by_model(whole, line, path="/v1/audio/transcriptions"), True
        )
