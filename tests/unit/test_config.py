"""Validation of a configuration: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from slurmgate.config import Findings, examine, listen_problem, parse_listen, validate
from slurmgate.errors import ConfigError
from slurmgate.model import (
    Config,
    HealthSpec,
    LauncherKind,
    ReplicaBounds,
    ServiceSpec,
    SshSpec,
    TunnelMode,
)
from slurmgate.share import schema_file

Document = dict[str, Any]

CONFIG = Path(__file__).parents[2] / "config"

SERVICE: Document = {
    "name": "LLM",
    "route_name": "llm",
    "api_paths": ["/v1"],
    "bash_file": "serve.sh",
    "check_health_path": "/health",
    "timeout": 60,
    "launcher": "process",
}
SLURM = SERVICE | {"launcher": "slurm"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "serve.sh").touch()
    return tmp_path


def service(**fields: object) -> Document:
    """A configuration of one service, with these fields beside the required ones."""
    return {"Services": [SERVICE | fields]}


def slurm(**fields: object) -> Document:
    return {"Services": [SLURM | fields]}


def gate(**fields: object) -> Document:
    return service() | {"gate": fields}


def two(first: Document, second: Document) -> Document:
    """Two services that differ in name and route, and in these fields."""
    other = {"name": "Other", "route_name": "other"}
    return {"Services": [SERVICE | first, SERVICE | other | second]}


def accepted(document: object, folder: Path) -> Config:
    return validate(document, folder / "services.json")


def only_service(document: object, folder: Path) -> ServiceSpec:
    [spec] = accepted(document, folder).services
    return spec


def problems(document: object, folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        accepted(document, folder)
    return refused.value.problems


def findings(document: object, folder: Path) -> Findings:
    file = folder / "services.json"
    file.write_text(json.dumps(document))
    return examine(file)


# What is accepted


def test_the_required_fields_are_enough_and_everything_else_has_its_default(folder: Path):
    config = accepted(service(), folder)
    assert config.path == folder / "services.json"
    assert (config.instance, config.watch, config.admin_token_file) == (None, True, None)
    assert config.warnings == ()
    assert config.services == (
        ServiceSpec(
            name="LLM",
            route_name="llm",
            api_paths=("/v1",),
            bash_file="serve.sh",
            check_health_path="/health",
            timeout=60.0,
            folder=folder,
            launcher=LauncherKind.PROCESS,
        ),
    )
    assert config.gate.listen == "127.0.0.1:8080"
    assert config.gate.workers == min(len(os.sched_getaffinity(0)), 4)
    assert (config.gate.max_body, config.gate.max_held_bytes) == (1 << 30, 10 << 30)


def test_no_service_at_all_is_a_configuration(folder: Path):
    assert accepted({"Services": []}, folder).services == ()


def test_the_file_of_the_original_system_is_accepted_unchanged():
    found = examine(CONFIG / "examples" / "original.json")
    assert found.problems == ()
    assert found.config is not None
    first = found.config.services[0]
    assert first.launcher is LauncherKind.SLURM
    assert first.ssh is not None
    assert (first.ssh.host, first.ssh.username) == ("login.cluster.example", "alice")
    assert (first.remote_port, first.local_host, first.local_port) == (8000, "localhost", 8001)
    texts = "\n".join(found.warnings)
    assert "nginxFile: is ignored" in texts
    assert "appPort: is ignored" in texts
    assert "launcher" not in texts


def test_every_field_reaches_the_specification(folder: Path):
    fields: Document = {
        "remote_host": "login.example",
        "ssh_username": "alice",
        "ssh_key_file": "key",
        "ssh_port": 2222,
        "ssh_known_hosts": "/etc/known",
        "ssh_jump": "alice@jump.example:22",
        "ssh_control_path": "control",
        "remote_port": 8000,
        "local_host": "127.0.0.1",
        "local_port": 8001,
        "description": "words",
        "remote_setup": ["module load slurm"],
        "tunnel": "none",
        "sbatch_args": ["--gres=gpu:1"],
        "env": {"B": "2", "A": "1"},
        "port_range": [3000, 3001],
        "replicas": {"min": 1, "max": 3, "target_in_flight": 4, "max_in_flight": 6},
        "scale_up_after": 2.5,
        "affinity": "header:X-Session",
        "renew_before": 90,
        "max_starts_per_hour": 20,
        "max_pending": 2,
        "hold_timeout": 1,
        "start_timeout": 2,
        "queue_timeout": 3,
        "abandon_timeout": 4,
        "drain_timeout": 5,
        "max_waiting": 6,
        "health": {"interval": 7, "start_interval": [0.5, 8], "timeout": 9, "failures": 10},
        "replace_after": 11,
        "no_wake": ["/metrics"],
        "replay": 0,
        "read_timeout": 12.5,
    }
    spec = only_service(slurm(**fields), folder)
    assert spec.ssh == SshSpec(
        host="login.example",
        username="alice",
        key_file=folder / "key",
        port=2222,
        known_hosts=Path("/etc/known"),
        jump="alice@jump.example:22",
        control_path=folder / "control",
    )
    assert (spec.remote_port, spec.port_range) == (8000, (3000, 3001))
    assert (spec.local_host, spec.local_port) == ("127.0.0.1", 8001)
    assert spec.tunnel is TunnelMode.NONE
    assert (spec.description, spec.env) == ("words", (("B", "2"), ("A", "1")))
    assert (spec.remote_setup, spec.sbatch_args) == (("module load slurm",), ("--gres=gpu:1",))
    assert (spec.hold_timeout, spec.start_timeout, spec.queue_timeout) == (1.0, 2.0, 3.0)
    assert (spec.abandon_timeout, spec.drain_timeout, spec.max_waiting) == (4.0, 5.0, 6)
    assert spec.health == HealthSpec(7.0, (0.5, 8.0), 9.0, 10)
    assert (spec.replace_after, spec.replay, spec.read_timeout) == (11.0, 0, 12.5)
    assert spec.no_wake == ("/metrics",)
    assert spec.replicas == ReplicaBounds(1, 3, 4, 6)
    assert (spec.scale_up_after, spec.affinity, spec.renew_before) == (2.5, "X-Session", 90.0)
    assert (spec.max_starts_per_hour, spec.max_pending) == (20, 2)


def test_the_top_level_and_the_gate_reach_the_specification(folder: Path):
    document = service() | {
        "$schema": "services.schema.json",
        "instance": "vm-1",
        "watch": False,
        "admin_token_file": "token",
        "gate": {
            "listen": "[::]:80",
            "open": True,
            "private": ["10.0.0.0/8"],
            "workers": 3,
            "max_body": "5 MiB",
            "max_held_bytes": 6000000,
            "tls": {"certificate": "c.pem", "key": "/k.pem"},
        },
    }
    config = accepted(document, folder)
    assert (config.instance, config.watch) == ("vm-1", False)
    assert config.admin_token_file == folder / "token"
    assert (config.gate.listen, config.gate.open) == ("[::]:80", True)
    assert config.gate.private == ("10.0.0.0/8",)
    assert (config.gate.workers, config.gate.max_body) == (3, 5 << 20)
    assert config.gate.max_held_bytes == 6000000
    assert config.gate.tls is not None
    assert config.gate.tls.certificate == folder / "c.pem"
    assert config.gate.tls.key == Path("/k.pem")


def test_every_field_of_the_schema_has_a_title_and_a_description():
    schema = json.loads(schema_file().read_text())
    objects = [schema, schema["$defs"]["service"], schema["$defs"]["gate"]]
    objects += [o for parent in objects for o in parent["properties"].values() if "properties" in o]
    for described in objects:
        assert described["additionalProperties"] is False
        for name, field in described["properties"].items():
            definition = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
            assert "title" in field or "title" in definition, name
            assert "description" in field or "description" in definition, name


def test_paths_get_the_leading_slash_they_lack_and_lose_a_trailing_one(folder: Path):
    document = service(
        api_paths=["v1", "/v1/", "/a/b"], no_wake=["metrics"], check_health_path="health?x=1"
    )
    spec = only_service(document, folder)
    assert spec.api_paths == ("/v1", "/a/b")
    assert spec.no_wake == ("/metrics",)
    assert spec.check_health_path == "/health?x=1"
    assert only_service(service(api_paths=["/"]), folder).api_paths == ("/",)


def test_whole_numbers_may_be_written_with_a_point(folder: Path):
    spec = only_service(service(remote_port=8000.0, replay=2.0), folder)
    assert (spec.remote_port, spec.replay) == (8000, 2)
    assert isinstance(spec.remote_port, int)


def test_the_home_directory_is_expanded_and_paths_are_relative_to_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(folder / "home"))
    spec = only_service(service(bash_file="~/serve.sh"), folder)
    assert spec.bash_file == str(folder / "home/serve.sh")
    ssh = only_service(slurm(remote_host="h", ssh_key_file="../key"), folder).ssh
    assert ssh is not None
    assert ssh.key_file == folder.parent / "key"
    assert only_service(slurm(bash_file="~/serve.sh"), folder).bash_file == "~/serve.sh"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        ("17", 17),
        ("2K", 2 << 10),
        ("2KiB", 2 << 10),
        ("3 M", 3 << 20),
        ("3 MiB", 3 << 20),
        ("4G", 4 << 30),
        ("4GiB", 4 << 30),
    ],
)
def test_sizes_are_bytes_or_have_a_unit(folder: Path, size: object, expected: int):
    assert accepted(gate(max_body=size), folder).gate.max_body == expected


# What is refused


def test_every_problem_is_told_at_once_in_the_order_of_the_file(folder: Path):
    document = {
        "Services": [
            SERVICE | {"timeout": "60", "replay": 9},
            {key: value for key, value in SERVICE.items() if key != "bash_file"},
        ],
        "gate": {"listen": "everywhere"},
    }
    paths = [line.partition(": ")[0] for line in problems(document, folder)]
    assert paths == [
        "Services[0].replay",
        "Services[0].timeout",
        "Services[1].bash_file",
        "Services[1].name",
        "Services[1].route_name",
        "gate.listen",
    ]


@pytest.mark.parametrize(
    ("document", "line"),
    [
        ([], "$: is a list; it should be a Slurmgate configuration: "),
        ({}, "Services: is missing; it should be a list of services"),
        ({"Services": {}}, "Services: is an object; it should be a list of services"),
        ({"Services": [7]}, "Services[0]: 7 is a number; it should be an object that describes"),
        (service(timeout="60"), 'Services[0].timeout: "60" is a string; it should be a number of'),
        (service(timeout=True), "Services[0].timeout: true is true or false; it should be a num"),
        (service(timeout=None), "Services[0].timeout: is null; it should be a number of seconds"),
        (service(timeout=0), "Services[0].timeout: 0 is too small; it should be a number of sec"),
        (service(timeout=1e300), "Services[0].timeout: 1e+300 is too large; "),
        (service(name=""), "Services[0].name: is empty; it should be a string of 1 to 200 char"),
        (service(name="a\n"), 'Services[0].name: "a\\n" is not right; it should be a string of'),
        (service(api_paths=["/", 5]), "Services[0].api_paths[1]: 5 is a number; it should be a"),
        (service(api_paths=["/a?b"]), 'Services[0].api_paths[0]: "/a?b" is not right; '),
        (service(api_paths=["/a/../b"]), 'Services[0].api_paths[0]: "/a/../b" is not right; '),
        (service(check_health_path="/a b"), 'Services[0].check_health_path: "/a b" is not right'),
        (service(remote_port=70000), "Services[0].remote_port: 70000 is not right; it should be"),
        (service(remote_port=True), "Services[0].remote_port: true is not right; it should be a"),
        (service(launcher="proces"), 'Services[0].launcher: "proces" is not known (did you mean'),
        (service(route_name="a/b"), 'Services[0].route_name: "a/b" is not right; it should be o'),
        (service(route_name="a\n"), 'Services[0].route_name: "a\\n" is not right; it should be'),
        (service(route_name=".."), 'Services[0].route_name: ".." is not right; it should be one'),
        (service(port_range=[1]), "Services[0].port_range: has 1 elements; it should be two por"),
        (service(port_range=[9, 8]), "Services[0].port_range: [9, 8] has the larger number firs"),
        (service(health={"start_interval": [2, 1]}), "Services[0].health.start_interval: [2, 1]"),
        (service(health={"failures": 0}), "Services[0].health.failures: 0 is too small; it shou"),
        (service(env={"A B": "x"}), 'Services[0].env["A B"]: is not a possible name; it should'),
        (service(env={"A": 1}), "Services[0].env.A: 1 is a number; it should be a string withou"),
        (service(env={"SLURMGATE_PORT": "1"}), "Services[0].env.SLURMGATE_PORT: is set by the g"),
        (service(env={"SLURMGATE_API_KEY": ""}), "Services[0].env.SLURMGATE_API_KEY: is set by"),
        (slurm(remote_host="-oProxyCommand=x"), 'Services[0].remote_host: "-oProxyCommand=x" is'),
        (gate(max_body="1TB"), 'gate.max_body: "1TB" is not right; it should be a number of byt'),
        (gate(max_body=0), "gate.max_body: 0 is not right; it should be a number of bytes"),
        (gate(max_body="9999999999G"), 'gate.max_body: "9999999999G" is too large'),
        (gate(private=["10.0.0.1/8"]), 'gate.private[0]: "10.0.0.1/8" has bits set beyond its p'),
        (gate(private=["x"]), 'gate.private[0]: "x" is no IP address or network'),
        (gate(tls={"key": "k"}), "gate.tls.certificate: is missing; it should be a path"),
        (service() | {"instance": "VM"}, 'instance: "VM" is not right; it should be 1 to 32 of'),
    ],
)
def test_a_problem_says_where_what_and_what_would_be_right(
    folder: Path, document: object, line: str
):
    [problem] = problems(document, folder)
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (service(time_out=1), 'Services[0].time_out: unknown field; did you mean "timeout"?'),
        (service(Timeout=1), 'Services[0].Timeout: unknown field; did you mean "timeout"?'),
        (service(zzzzzz=1), "Services[0].zzzzzz: unknown field"),
        (service(health={"intervall": 1}), "Services[0].health.intervall: unknown field; did you"),
        (service(health={"zzz": 1}), "Services[0].health.zzz: unknown field; known are interval"),
        (gate(port=80), "gate.port: unknown field"),
        (gate(keys_file="k"), "gate.keys_file: unknown field here; it belongs to the top level"),
        (gate(models=[]), "gate.models: unknown field here; it belongs to a service"),
        (service(listen="a"), 'Services[0].listen: unknown field here; it belongs to "gate"'),
        (service() | {"cors": []}, 'cors: unknown field here; it belongs to a service or "gate"'),
        (service() | {"service": []}, 'service: unknown field; did you mean "Services"?'),
        (service() | {"a b": 1}, '["a b"]: unknown field'),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(
    folder: Path, document: object, line: str
):
    [problem] = problems(document, folder)
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (two({}, {"name": "LLM"}), 'Services[1].name: "LLM" is the name of Services[0] already'),
        (two({}, {"route_name": "llm"}), 'Services[1].route_name: "llm" is the route of Services'),
        (
            two({"remote_port": 8000}, {"remote_port": 8000}),
            "Services[1].remote_port: 8000 is the fixed port of Services[0] already; it should",
        ),
        (
            two(SLURM | {"local_port": 1}, {"launcher": "slurm", "local_port": 1}),
            "Services[1].local_port: 1 is the local port of Services[0] already",
        ),
    ],
)
def test_what_must_be_unique_is_refused_the_second_time(folder: Path, document: object, line: str):
    [problem] = problems(document, folder)
    assert problem.startswith(line)


def test_a_model_given_twice_is_a_problem_of_its_own(folder: Path):
    found = problems(two({"models": ["m"]}, {"models": ["m"]}), folder)
    assert any("Services[1].models[0]" in line and "is the model of" in line for line in found)


def test_the_same_fixed_port_on_different_nodes_of_a_cluster_is_no_conflict(folder: Path):
    first = {"launcher": "slurm", "remote_port": 8000, "sbatch_args": ["--nodelist=n1"]}
    assert len(accepted(two(first, {**first, "sbatch_args": ["-w", "n2"]}), folder).services) == 2
    [problem] = problems(two(first, first), folder)
    assert "is the fixed port of Services[0]" in problem


def test_the_same_fixed_port_on_different_hosts_is_no_conflict(folder: Path):
    here = {"remote_port": 8000}
    there = {"remote_port": 8000, "launcher": "slurm", "remote_host": "login.example"}
    assert len(accepted(two(here, there), folder).services) == 2


@pytest.mark.parametrize(
    "route",
    [
        "v1",
        "info",
        "admin",
        "healthz",
        "readyz",
        "metrics",
        "check_x",
        "demand_x",
        "enable_service_management",
        "disable_service_management",
        "kill_disable_service_management",
    ],
)
def test_words_of_the_gate_are_no_routes(folder: Path, route: str):
    [problem] = problems(service(route_name=route), folder)
    assert problem.startswith(f'Services[0].route_name: "{route}" is a word the gate uses itself')


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--job-name=x"], '[0]: "--job-name=x" Slurmgate knows its jobs by their names'),
        (["-J", "x"], '[0]: "-J" Slurmgate knows its jobs'),
        (["-HJx"], '[0]: "-HJx" Slurmgate knows its jobs'),
        (["--job", "x"], '[0]: "--job" Slurmgate knows its jobs'),
        (["--mem=1G", "--array=1-3"], '[1]: "--array=1-3" a replica is one job'),
        (["-a1"], '[0]: "-a1" a replica is one job'),
        (["--wait"], '[0]: "--wait" makes sbatch wait'),
        (["-W"], '[0]: "-W" makes sbatch wait'),
        (["--test-only"], '[0]: "--test-only" makes sbatch print'),
        (["--parsable"], '[0]: "--parsable" is passed by Slurmgate'),
        (["--wrap=x"], '[0]: "--wrap=x" the job is "bash_file"'),
        (["-h"], '[0]: "-h" makes sbatch print'),
        (["-V"], '[0]: "-V" makes sbatch print'),
        (["-Q"], '[0]: "-Q" keeps sbatch from telling the id'),
        (["--uid", "0"], '[0]: "--uid" the job belongs to the user'),
        (["-M", "other"], '"remote_setup": ["export SLURM_CLUSTERS=..."]'),
        (["-p", "a", ":", "-p", "b"], '[2]: ":" makes a job of several parts'),
        (["--mem=1G", "serve.sh"], '[1]: "serve.sh" would be run as the script'),
        (["--mem=1G", "--"], '[1]: "--" would be run as the script'),
        (["--mem=1G", "-p"], '[1]: "-p" needs a value'),
        (["--mem"], '[0]: "--mem" needs a value'),
        (["-p gpu"], '[0]: "-p gpu" is one argument; write the option and its value'),
        (["--partition gpu"], '[0]: "--partition gpu" is one argument'),
    ],
)
def test_arguments_that_would_break_a_submission_are_refused(
    folder: Path, words: list[str], text: str
):
    [problem] = problems(slurm(sbatch_args=words), folder)
    assert problem.startswith("Services[0].sbatch_args[")
    assert text in problem


@pytest.mark.parametrize(
    "words",
    [
        ["--hold", "-p", "gpu", "--gres", "gpu:1", "--get-user-env", "-vv", "-H"],
        ["--export=NONE", "-o", "log-%j", "--wait-all-nodes=1", "--comment=a b"],
        ["--an-option-of-tomorrow", "value", "--exclusive", "-N1", "-x", "-J"],
        ["--nice", "--propagate=NONE", "--oversubscribe", "-O", "-Cgpu&big"],
    ],
)
def test_other_arguments_are_left_to_slurm(folder: Path, words: list[str]):
    config = accepted(slurm(sbatch_args=words), folder)
    assert config.services[0].sbatch_args == tuple(words)
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"remote_host": "-oProxyCommand=x"}, "remote_host"),
        ({"remote_host": "a b"}, "remote_host"),
        ({"remote_host": "$(id)"}, "remote_host"),
        ({"remote_host": "bob@h"}, "remote_host"),
        ({"remote_host": "h;id"}, "remote_host"),
        ({"remote_host": "h", "ssh_username": "-l"}, "ssh_username"),
        ({"remote_host": "h", "ssh_username": "a\tb"}, "ssh_username"),
        ({"remote_host": "h", "ssh_username": "`id`"}, "ssh_username"),
        ({"remote_host": "h", "ssh_jump": "-x"}, "ssh_jump"),
        ({"remote_host": "h", "ssh_jump": "bob@-x"}, "ssh_jump"),
        ({"remote_host": "h", "ssh_jump": "a,b"}, "ssh_jump"),
        ({"remote_host": "h", "ssh_jump": "a:99999"}, "ssh_jump"),
        ({"remote_host": "h", "ssh_jump": "a:b"}, "ssh_jump"),
        ({"remote_setup": ["module load slurm\nid"]}, "remote_setup[0]"),
        ({"remote_setup": ["a\0b"]}, "remote_setup[0]"),
        ({"ssh_port": 22}, "ssh_port"),
        ({"ssh_control_path": "x"}, "ssh_control_path"),
        ({"tunnel": "node-loopback"}, "tunnel"),
        ({"env": {"SBATCH_PARTITION": "x"}}, "env.SBATCH_PARTITION"),
        ({"env": {"SLURM_CONF": "x"}}, "env.SLURM_CONF"),
        ({"env": {"UID": "x"}}, "env.UID"),
    ],
)
def test_what_ssh_or_the_shell_would_misread_is_refused(folder: Path, fields: Document, path: str):
    [problem] = problems(slurm(**fields), folder)
    assert problem.startswith(f"Services[0].{path}: ")


def test_a_wrong_login_host_does_not_make_its_other_fields_wrong(folder: Path):
    document = slurm(remote_host=5, ssh_username="u", tunnel="node-loopback")
    [problem] = problems(document, folder)
    assert problem.startswith("Services[0].remote_host: ")


def test_a_key_that_others_may_read_is_a_warning(folder: Path):
    key = folder / "key"
    key.touch(mode=0o600)
    document = slurm(remote_host="h", ssh_key_file="key")
    assert findings(document, folder).warnings == ()
    key.chmod(0o640)
    [warning] = findings(document, folder).warnings
    assert warning == (
        f"Services[0].ssh_key_file: {key} is open to others (mode 0640), so ssh refuses it; "
        "chmod 600 helps"
    )


def test_a_garbled_file_gives_a_bounded_number_of_problems(folder: Path):
    found = problems({"Services": [0] * 100_000}, folder)
    assert len(found) == 1001
    assert "more problems" in found[-1]


def test_a_problem_in_one_service_does_not_hide_those_between_others(folder: Path):
    document = two({}, {"name": "LLM"})
    document["Services"].insert(1, {"name": 5})
    assert any(
        line.startswith('Services[2].name: "LLM" is the name of Services[0]')
        for line in problems(document, folder)
    )


def test_the_document_is_not_changed(folder: Path):
    document = service(name=5, health={"intervall": 1}, api_paths=["/", 5])
    before = copy.deepcopy(document)
    problems(document, folder)
    assert document == before


# Listening


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("[::1]:80", ("::1", 80)),
        ("localhost:1", ("localhost", 1)),
        ("gate.example:65535", ("gate.example", 65535)),
        ("8080", None),
        (":8080", None),
        ("127.0.0.1:", None),
        ("127.0.0.1:0", None),
        ("127.0.0.1:65536", None),
        ("::1:80", None),
        ("[127.0.0.1]:80", None),
        ("[fe80::1%eth0]:80", None),
        ("[x]:80", None),
        ("a b:80", None),
        ("x; return 200:80", None),
        ("127.0.0.1:80\n", None),
    ],
)
def test_addresses_are_split_into_host_and_port(listen: str, expected: tuple[str, int] | None):
    assert parse_listen(listen) == expected


@pytest.mark.parametrize("listen", ["127.0.0.1:80", "127.8.8.8:80", "[::1]:80", "localhost:80"])
def test_loopback_needs_no_opening(listen: str):
    assert listen_problem(listen, is_open=False) is None


@pytest.mark.parametrize("listen", ["0.0.0.0:80", "[::]:80", "10.0.0.1:80", "gate.example:80"])
def test_other_addresses_need_to_be_opened_on_purpose(folder: Path, listen: str):
    [problem] = problems(gate(listen=listen), folder)
    assert problem.startswith(f'gate.listen: "{listen}" is not a loopback address')
    assert '"open": true' in problem
    assert accepted(gate(listen=listen, open=True), folder).gate.listen == listen


# Warnings


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (service(bash_file="gone.sh"), "Services[0].bash_file: "),
        (service(remote_host="h"), 'Services[0].remote_host: is not used with launcher "process"'),
        (service(ssh_key_file="k"), 'Services[0].ssh_key_file: is not used with launcher "proces'),
        (service(local_port=1), 'Services[0].local_port: is not used with launcher "process"'),
        (service(sbatch_args=[]), 'Services[0].sbatch_args: is not used with launcher "process"'),
        (service(api_paths=[]), "Services[0].api_paths: is empty: no request is allowed"),
        (slurm(sbatch_args=["--a=b -c"]), "Services[0].sbatch_args[0]: is one argument"),
        (slurm(bash_file="~bob/x.sh"), 'Services[0].bash_file: only "~/" means a home'),
        (slurm(local_host="h"), 'Services[0].local_host: is not used without "local_port"'),
        (slurm(remote_host="h", ssh_key_file="k"), "Services[0].ssh_key_file: "),
        (gate(tls={"certificate": "c", "key": "/dev"}), "gate.tls.key: /dev is not on this mach"),
        (gate(max_held_bytes=1), 'gate.max_held_bytes: "max_body" is larger'),
        (service() | {"admin_token_file": "t"}, "admin_token_file: "),
        (service() | {"appPort": [1]}, "appPort: is ignored"),
        (service() | {"nginxPort": 8090}, "nginxPort: is ignored"),
    ],
)
def test_what_is_odd_but_usable_is_a_warning(folder: Path, document: object, line: str):
    found = findings(document, folder)
    assert found.problems == ()
    assert found.config is not None
    assert found.config.warnings == found.warnings
    assert any(warning.startswith(line) for warning in found.warnings)


def test_unused_fields_of_a_process_do_not_reach_its_specification(folder: Path):
    document = service(remote_host="h", ssh_username="u", local_host="h", local_port=1)
    spec = only_service(document, folder)
    assert (spec.ssh, spec.local_host, spec.local_port) == (None, None, None)


def test_warnings_are_told_beside_problems(folder: Path):
    found = findings(service(remote_host="h", timeout=0), folder)
    assert found.config is None
    assert len(found.problems) == 1
    assert len(found.warnings) == 1


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (service(host="a"), 'the nearest is "local_host"'),
        (service(qqq=1), "those needed are name, route_name, api_paths"),
        ({"Services": [], "foo": 1}, "known are $schema, Services"),
    ],
)
def test_an_unknown_field_unlike_all_others_is_refused_with_what_is_known(
    folder: Path, document: object, words: str
):
    [problem] = problems(document, folder)
    assert "unknown field" in problem
    assert words in problem


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\x7f", "\x85", "\x9b"])
def test_a_control_character_in_a_name_is_refused(folder: Path, character: str):
    [problem] = problems(service(name=f"a{character}b"), folder)
    assert problem.startswith("Services[0].name: ")


def test_a_wrong_launcher_is_not_taken_for_slurm(folder: Path):
    found = findings(service(launcher="proces"), folder)
    assert len(found.problems) == 1
    assert 'did you mean "process"' in found.problems[0]
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("/größe", 'as "/gr%C3%B6%C3%9Fe"'),
        ("/a%2eb", "%"),
        ("/a%2Fb", "%"),
        ("/100%", "%"),
        ("/%0a", "%"),
    ],
)
@pytest.mark.parametrize("field", ["api_paths", "no_wake"])
def test_a_prefix_that_no_request_can_have_is_warned_about(
    folder: Path, field: str, prefix: str, words: str
):
    fields: Document = {field: ["/good%20one", prefix]}
    [warning] = findings(service(**fields), folder).warnings
    assert warning.startswith(f"Services[0].{field}[1]: no request has this")
    assert words in warning
