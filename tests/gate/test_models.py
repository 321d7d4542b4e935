"""The service is found by the model that a request names in its body."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.gate.harness import Answer, EchoService, FakeBackend, Gate, replica, service, wait_until

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


def ask(gate: Gate, body: Any, path: str = CHAT, **headers: str) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return gate.get(path, "POST", data, {**JSON, **headers})


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}], "model": model, **more}


@pytest.fixture
def ready(gate: Gate, backend: FakeBackend, echo: EchoService) -> Gate:
    """Two services that are ready and one that is cold."""
    backend.publish(
        service(state="ready", models=["org/one", "alias"], replicas=[replica(echo.port, "r1")]),
        service(
            "Other",
            state="ready",
            models=["two"],
            api_paths=["/v1/chat", "/v1/messages"],
            upstream_model="inner name",
            replicas=[replica(echo.port, "r2")],
        ),
        service("Cold", models=["three"], hold_timeout=0.2),
    )
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    return gate


@pytest.mark.parametrize(
    "path",
    [
        CHAT,
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/v1/moderations",
        "/v1/images/generations",
        "/v1/tokenize",
        "/v1/messages",
        "/v1/messages/count_tokens",
    ],
)
def test_the_model_says_which_service_it_is_whatever_is_asked_of_it(ready: Gate, path: str):
    for model in ("org/one", "alias"):
        answer = ask(ready, chat(model), path + "?beta=true")
        assert answer.headers["X-Slurmgate-Service"] == "LLM"
        assert answer.json["path"] == path + "?beta=true"
        assert json.loads(answer.json["body"]) == chat(model)


def test_the_model_of_an_audio_form_is_found_behind_the_file(ready: Gate):
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        b"Content-Type: audio/wav\r\n\r\n" + b"\x00\xff--x\r\n" * 50_000,
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\norg/one',
        b"--x--\r\n",
    ]
    body = b"\r\n".join(parts)
    answer = ready.get(
        "/v1/audio/transcriptions",
        "POST",
        body,
        {"Content-Type": "multipart/form-data; boundary=x"},
    )
    assert answer.headers["X-Slurmgate-Service"] == "LLM"
    assert answer.json["length"] == len(body)


def test_the_service_is_told_the_name_it_knows(ready: Gate):
    for filler in ("", "x" * 300_000):
        answer = ask(ready, chat("two", filler=filler))
        assert answer.headers["X-Slurmgate-Service"] == "Other"
        sent = json.dumps(chat("inner name", filler=filler)).encode()
        assert answer.json["length"] == len(sent)
        assert answer.json["headers"]["Content-Length"] == str(len(sent))
        assert answer.json["body"].encode() == sent[:4096]


def test_a_path_the_service_does_not_open_is_not_open_by_model(ready: Gate):
    answer = ask(ready, chat("two"), "/v1/embeddings")
    assert answer.status == 404
    assert answer.json["error"]["code"] == "path-not-allowed"


def test_an_unknown_model_is_a_404_with_the_known_ones(ready: Gate, backend: FakeBackend):
    answer = ask(ready, chat("gpt-\u00e4\u0007" + "x" * 300))
    assert answer.status == 404
    error = answer.json["error"]
    assert (error["code"], error["param"]) == ("no-such-model", "model")
    assert error["type"] == "invalid_request_error"
    for known in ("org/one", "alias", "two", "three"):
        assert known in error["message"]
    assert len(error["message"]) < 400
    assert not backend.service_note("Cold").get("requests")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'"model"',
        b'{"model": 1}',
        b'{"model": null}',
        b'{"model": ["three"]}',
        b'{"messages": {"model": "three"}}',
        b'{"model": "three"} {}',
        b'{"model": "three"',
        b'{"model": "three", "model": "alias"}',
        b'{"Model": "three"}',
        b"model=three",
    ],
)
def test_a_body_without_one_model_is_a_400_and_wakes_nobody(
    ready: Gate, backend: FakeBackend, body: bytes
):
    answer = ask(ready, body)
    assert answer.status == 400
    assert answer.json["error"]["code"] == "bad-body"
    assert not backend.service_note("Cold").get("requests")


def test_anthropic_clients_get_errors_in_their_shape(ready: Gate):
    answer = ask(ready, chat("nobody"), "/v1/messages")
    assert answer.status == 404
    assert answer.json["type"] == "error"
    assert answer.json["error"]["type"] == "not_found_error"
    assert "three" in answer.json["error"]["message"]
    answer = ask(ready, chat("three"), "/v1/messages")
    assert answer.status == 503
    assert answer.json["error"]["type"] == "overloaded_error"


def test_a_cold_model_is_held_and_woken(ready: Gate, backend: FakeBackend, echo: EchoService):
    with ThreadPoolExecutor(1) as pool:
        backend.publish(service("Cold", models=["three"], state="waking"))
        wait_until(lambda: backend.notes[-1]["snapshot"] == backend.version, "snapshot taken")
        asked = pool.submit(ask, ready, chat("three"))
        wait_until(lambda: backend.service_note("Cold").get("waiting") == 1, "held")
        backend.publish(
            service("Cold", models=["three"], state="ready", replicas=[replica(echo.port)])
        )
        answer = asked.result()
    assert answer.status == 200
    assert json.loads(answer.json["body"]) == chat("three")
    assert float(answer.headers["X-Slurmgate-Waited"]) > 0


def test_before_the_first_snapshot_a_model_is_held_not_refused(
    gate: Gate, backend: FakeBackend, echo: EchoService
):
    with ThreadPoolExecutor(2) as pool:
        known = pool.submit(ask, gate, chat("one", filler="x" * 100_000))
        unknown = pool.submit(ask, gate, chat("two"))
        wait_until(lambda: len(backend.notes) > 5, "some calls")
        assert not known.done()
        assert not unknown.done()
        backend.publish(
            service(
                models=["one"],
                upstream_model="its own",
                state="ready",
                replicas=[replica(echo.port)],
            )
        )
        assert known.result().json["length"] == len(
            json.dumps(chat("its own", filler="x" * 100_000))
        )
        assert unknown.result().status == 404


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/models?limit=9"])
def test_all_models_are_listed_cold_ones_too(ready: Gate, path: str):
    listed = ready.get(path).json
    assert listed["object"] == "list"
    assert {(m["id"], m["state"]) for m in listed["data"]} == {
        ("org/one", "ready"),
        ("alias", "ready"),
        ("two", "ready"),
        ("three", "cold"),
    }
    assert {m["object"] for m in listed["data"]} == {"model"}
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (
        False,
        "org/one",
        "three",
    )


def test_one_model_can_be_asked_for_whatever_its_name_has(ready: Gate):
    for written in ("org/one", "org%2Fone"):
        answer = ready.get(f"/v1/models/{written}")
        assert (answer.json["id"], answer.json["owned_by"]) == ("org/one", "LLM")
    answer = ready.get("/v1/models/four")
    assert answer.status == 404
    assert answer.json["error"]["code"] == "no-such-model"
    assert ready.get("/v1/models", "POST", b"{}").status == 405


def test_without_models_the_list_is_empty_not_an_object(
    gate: Gate, backend: FakeBackend, echo: EchoService
):
    assert gate.get("/v1/models").status == 503
    backend.publish(service())
    wait_until(lambda: gate.get("/readyz").status == 200, "ready")
    assert gate.get("/v1/models").json["data"] == []


def test_other_methods_are_told_what_is_allowed(ready: Gate):
    answer = ready.get(CHAT)
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")
