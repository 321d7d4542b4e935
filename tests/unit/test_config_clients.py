"""The configuration of what clients see: models, keys, heartbeats, origins, proxies in front."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slurmgate.config import Findings, examine, validate
from slurmgate.config.clients import origin_problem
from slurmgate.errors import ConfigError
from slurmgate.keys import Key, digest, serialise
from slurmgate.model import Config, ServiceSpec

Document = dict[str, Any]

SERVICE: Document = {
    "name": "LLM",
    "route_name": "llm",
    "api_paths": ["/v1"],
    "bash_file": "serve.sh",
    "check_health_path": "/health",
    "timeout": 60,
    "launcher": "process",
}
KEYED: Document = {"keys_file": "keys.json"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "serve.sh").touch()
    return tmp_path


def service(**fields: object) -> Document:
    return {"Services": [SERVICE | fields]}


def gate(**fields: object) -> Document:
    return service() | {"gate": fields}


def accepted(document: Document, folder: Path) -> Config:
    return validate(document, folder / "services.json")


def only_service(document: Document, folder: Path) -> ServiceSpec:
    [spec] = accepted(document, folder).services
    return spec


def problems(document: Document, folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        accepted(document, folder)
    return list(caught.value.problems)


def warnings(document: Document, folder: Path) -> tuple[str, ...]:
    return accepted(document, folder).warnings


# What is accepted


def test_fields_that_are_left_out_have_their_defaults(folder: Path):
    spec = only_service(service(), folder)
    assert (spec.models, spec.upstream_model, spec.heartbeat) == ((), None, 15.0)
    assert (spec.public, spec.upstream_key, spec.prefix_affinity) == (False, False, False)
    assert (spec.max_idle_connection, spec.cors) == (0.0, None)
    config = accepted(service(), folder)
    assert (config.keys_file, config.gate.trusted_proxies, config.gate.cors) == (None, (), ())


def test_every_field_reaches_the_specification(folder: Path):
    fields: Document = {
        "models": ["qwen3-32b", "Qwen/Qwen3-32B"],
        "upstream_model": "/models/qwen",
        "heartbeat": 0,
        "public": True,
        "upstream_key": True,
        "max_idle_connection": 300,
        "cors": ["https://chat.example.org"],
        "affinity": "prefix",
        "replicas": {"max": 2},
    }
    document = service(**fields) | KEYED
    document["gate"] = {"trusted_proxies": ["10.1.0.7", "fd00::/8"], "cors": ["*"]}
    (folder / "keys.json").touch()
    config = accepted(document, folder)
    [spec] = config.services
    assert (spec.models, spec.upstream_model) == (("qwen3-32b", "Qwen/Qwen3-32B"), "/models/qwen")
    assert (spec.heartbeat, spec.max_idle_connection) == (0.0, 300.0)
    assert (spec.public, spec.upstream_key, spec.prefix_affinity) == (True, True, True)
    assert spec.cors == ("https://chat.example.org",)
    assert (config.gate.trusted_proxies, config.gate.cors) == (("10.1.0.7", "fd00::/8"), ("*",))
    assert config.keys_file == folder / "keys.json"


def test_a_service_may_allow_no_origin_although_the_gate_does(folder: Path):
    assert only_service(service(cors=[]) | {"gate": {"cors": ["*"]}}, folder).cors == ()


@pytest.mark.parametrize("path", ["/etc/keys", "~/keys", "../keys"])
def test_the_keys_file_is_relative_to_the_configuration(
    folder: Path, path: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", "/home/alice")
    expected = {"/etc/keys": Path("/etc/keys"), "~/keys": Path("/home/alice/keys")}
    config = accepted(service() | {"keys_file": path}, folder)
    assert config.keys_file == expected.get(path, folder.parent / "keys")


def test_keys_let_the_gate_listen_beyond_loopback(folder: Path):
    listening: Document = {"gate": {"listen": "0.0.0.0:8080"}}
    [problem] = problems(service() | listening, folder)
    assert problem.startswith("gate.listen: ")
    assert '"keys_file"' in problem
    assert '"open": true' in problem
    config = accepted(service() | listening | KEYED, folder)
    assert (config.gate.listen, config.gate.open) == ("0.0.0.0:8080", False)


# What is refused


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (service(models="m"), 'Services[0].models: "m" is a string; it should be a list of model'),
        (service(models=[""]), "Services[0].models[0]: is empty; it should be a model name"),
        (service(models=["a\nb"]), 'Services[0].models[0]: "a\\nb" is not right; it should be a m'),
        (service(upstream_model=""), "Services[0].upstream_model: is empty"),
        (service(heartbeat=-1), "Services[0].heartbeat: -1 is too small; it should be a number of"),
        (service(heartbeat=None), "Services[0].heartbeat: is null; it should be a number of seco"),
        (service(public="yes"), 'Services[0].public: "yes" is a string; it should be true or fa'),
        (service(upstream_key=1), "Services[0].upstream_key: 1 is a number; it should be true or"),
        (service(max_idle_connection=-1), "Services[0].max_idle_connection: -1 is too small"),
        (service(cors="*"), 'Services[0].cors: "*" is a string; it should be a list of origins'),
        (service(cors=[1]), "Services[0].cors[0]: 1 is a number; it should be an origin, such as"),
        (service(cors=["x"]), 'Services[0].cors[0]: "x" is no origin; it should be like "https'),
        (gate(cors=["*", ""]), 'gate.cors[1]: "" is no origin; it should be like "https'),
        (gate(trusted_proxies=["proxy"]), 'gate.trusted_proxies[0]: "proxy" is no IP address'),
        (gate(trusted_proxies=["10.1.0.7/8"]), 'gate.trusted_proxies[0]: "10.1.0.7/8" has bits se'),
        (service() | {"keys_file": ""}, "keys_file: is empty; it should be a path"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder: Path, document: Document, line: str):
    [problem] = problems(document, folder)
    assert problem.startswith(line)


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "https://chat.example.org",
        "http://localhost:3000",
        "http://127.0.0.1:8080",
        "http://[::1]:8080",
        "https://xn--bcher-kva.example",
        "https://a_b.example",
        "http://a.example:443",
        "chrome-extension://abcdefghijklmnop",
        "tauri://localhost",
    ],
)
def test_origins_as_browsers_send_them_are_right(origin: str):
    assert origin_problem(origin) is None


@pytest.mark.parametrize(
    ("origin", "meant"),
    [
        ("https://chat.example.org/", "https://chat.example.org"),
        ("https://chat.example.org/app?x=1", "https://chat.example.org"),
        ("HTTPS://Chat.Example.org", "https://chat.example.org"),
        ("chat.example.org", "https://chat.example.org"),
        ("chat.example.org:8443/app", "https://chat.example.org:8443"),
        ("https://chat.example.org:443", "https://chat.example.org"),
        ("http://chat.example.org:80/", "http://chat.example.org"),
    ],
)
def test_an_origin_that_never_comes_is_refused_with_the_one_that_was_meant(origin: str, meant: str):
    assert origin_problem(origin) == f'is not what browsers send; did you mean "{meant}"?'


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "https://",
        "https://*.example.org",
        "https://a b.example",
        "https://b\u00fccher.example",
        "https://user@chat.example.org",
        "https://chat.example.org:0",
        "https://chat.example.org:65536",
        "https://chat.example.org:" + "9" * 5000,
        "https://chat.example.org:x",
        "http://[::g]",
        "http://[0:0:0:0:0:0:0:1]",
        'https://x";add_header',
        "https://a.example\nb",
        "//chat.example.org:x/",
    ],
)
def test_what_is_no_origin_is_refused_with_the_form(origin: str):
    text = origin_problem(origin)
    assert text is not None
    assert "https://chat.example.org" in text


# Warnings


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (
            service(models=["m"], api_paths=["/generate", "/v10"]),
            'Services[0].models: no request reaches them: "api_paths" allows nothing under "/v1"',
        ),
        (service(upstream_model="m"), 'Services[0].upstream_model: has no effect without "models"'),
        (service(public=True), 'Services[0].public: has no effect without "keys_file"'),
        (service(cors=["*", "https://a.example"]), 'Services[0].cors: the others beside "*" have'),
        (
            gate(trusted_proxies=["0.0.0.0/0"]),
            "gate.trusted_proxies[0]: believes everybody: any client can say",
        ),
    ],
)
def test_what_has_no_effect_or_another_than_it_seems_is_a_warning(
    folder: Path, document: Document, line: str
):
    [warning] = warnings(document, folder)
    assert warning.startswith(line)


@pytest.mark.parametrize(
    "fields",
    [
        {"models": ["m"], "api_paths": ["/"]},
        {"models": ["m"], "api_paths": ["v1/"]},
        {"models": ["m"], "api_paths": ["/v2", "/v1/chat"]},
        {"models": ["m"], "upstream_model": "m"},
        {"models": []},
        {"public": False, "upstream_key": False, "heartbeat": 0, "max_idle_connection": 0},
        {"upstream_key": True},
    ],
)
def test_what_makes_sense_is_no_warning(folder: Path, fields: Document):
    assert warnings(service(**fields), folder) == ()


def examined(document: Document, folder: Path) -> Findings:
    file = folder / "services.json"
    file.write_text(json.dumps(document))
    return examine(file)


def test_a_missing_keys_file_is_a_warning_that_says_how_to_make_it(folder: Path):
    found = examined(service() | KEYED, folder)
    assert found.problems == ()
    [warning] = found.warnings
    assert warning.startswith(f"keys_file: {folder / 'keys.json'} is not there: every request is")
    assert "`slurmgate keys add NAME` makes it" in warning


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "not valid JSON"),
        ('{"keys": [{"name": "a"}]}', "keys[0] (a): sha256: is missing"),
        ("[]", 'should be {"keys": [...]}'),
    ],
)
def test_a_broken_keys_file_is_a_warning_that_says_what_is_wrong(
    folder: Path, content: str, text: str
):
    (folder / "keys.json").write_text(content)
    [warning] = examined(service() | KEYED, folder).warnings
    assert warning.startswith(f"keys_file: {folder / 'keys.json'}: ")
    assert text in warning


def test_a_key_for_a_service_that_is_not_there_is_a_warning(folder: Path):
    services = {"a": ["LLM"], "b": ["LLM", "LLMM"], "c": ["zzz"], "d": None}
    made = tuple(
        Key(name, digest(name), None if names is None else tuple(names))
        for name, names in services.items()
    )
    (folder / "keys.json").write_bytes(serialise(made))
    assert examined(service() | KEYED, folder).warnings == (
        'keys_file: key b: "LLMM" is no service here (did you mean "LLM"?)',
        'keys_file: key c: "zzz" is no service here',
    )
    broken = service() | KEYED
    broken["Services"].append({"name": 7})
    assert not [line for line in examined(broken, folder).warnings if "keys_file" in line]


def test_an_open_gate_with_keys_is_not_open(folder: Path):
    found = warnings(service() | KEYED | {"gate": {"open": True}}, folder)
    assert any(line.startswith('gate.open: has no effect: "keys_file"') for line in found)


def test_a_keys_file_that_is_wrong_itself_leads_to_no_other_complaint(folder: Path):
    document = service(public=True) | {"keys_file": 7, "gate": {"listen": "0.0.0.0:80"}}
    found = examined(document, folder)
    assert [line.partition(":")[0] for line in found.problems] == ["keys_file"]
    assert found.warnings == ()
