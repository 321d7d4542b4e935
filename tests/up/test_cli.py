"""The commands, as people type them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from slurmgate.launchers import logs
from tests.up.product import ROOT
from tests.waiting import until


def slurmgate(*args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "slurmgate", *args]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_status_is_a_table_for_people_and_json_for_programs(product):
    product.probe()
    product.up()
    product.get("/probe/")
    table = product.run("status").stdout.splitlines()
    assert table[0].split()[:3] == ["SERVICE", "ROUTE", "STATE"]
    assert table[1].split()[:3] == ["probe", "/probe/", "ready"]
    assert product.status()["services"][0]["state"] == "ready"


def test_start_stop_and_logs(product):
    product.probe()
    product.up()
    product.run("start", "probe")
    product.until_state("ready")
    assert "probe on" in product.run("logs", "probe", "-n", "5").stdout
    product.run("stop", "probe")
    product.until_state("cold")
    assert product.replicas() == []


def test_logs_can_be_followed(product):
    product.service("loud", product.script("loud.sh", "while :; do echo tick; sleep 0.1; done"))
    product.up()
    product.run("start", "loud")
    until(lambda: product.replicas())
    argv = product.command("logs", "loud", "-f", "--state-dir", str(product.state_dir))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        for _ in range(5):
            assert following.stdout.readline() == "tick\n"
        following.terminate()
    product.run("stop", "loud")


def test_following_logs_goes_on_when_a_long_one_was_cut(product):
    product.service("loud", product.script("loud.sh", "exec sleep 60"))
    product.up()
    product.run("start", "loud")
    until(lambda: product.replicas())
    (log,) = (product.state_dir / "logs/loud").iterdir()
    argv = product.command("logs", "loud", "-f", "--state-dir", str(product.state_dir))
    with (
        log.open("a", buffering=1) as service,
        subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as following,
    ):
        assert following.stdout is not None
        service.write("a line before\n")
        assert following.stdout.readline() == "a line before\n"
        logs.bound(log, 0)
        service.write("behind it\n")
        assert following.stdout.readline() == "behind it\n"
        assert product.run("logs", "loud", "-n", "2").stdout == "a line before\nbehind it\n"
        following.terminate()
    product.run("stop", "loud")


def test_following_logs_goes_on_with_the_replica_that_comes_next(product):
    product.service("short", product.script("short.sh", "echo I am $SLURMGATE_REPLICA; sleep 60"))
    product.up()
    product.run("start", "short")
    until(lambda: product.replicas())
    argv = product.command("logs", "short", "-f", "--state-dir", str(product.state_dir))
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as following:
        assert following.stdout is not None
        first = following.stdout.readline()
        product.run("stop", "short")
        product.until_state("cold", "short")
        product.run("start", "short")
        second = following.stdout.readline()
        following.terminate()
    assert first.startswith("I am ")
    assert second.startswith("I am ")
    assert first != second
    product.run("stop", "short")


def test_logs_are_found_by_route_and_a_wrong_name_is_told_from_a_silent_service(product):
    product.service("Große Ähre", product.script("a.sh", "echo hello; sleep 60"), route_name="a")
    product.probe("silent")
    product.up()
    product.run("start", "a")
    until(lambda: product.run("logs", "a", check=False).stdout == "hello\n")
    assert product.run("logs", "Große Ähre").stdout == "hello\n"
    product.run("stop", "a")
    assert "never started" in product.run("logs", "silent", check=False).stderr
    assert "no service typo" in product.run("logs", "typo", check=False).stderr


def test_a_service_that_is_not_there_is_named_with_the_remedy(product):
    product.probe()
    product.up()
    done = product.run("start", "nothing", check=False)
    assert done.returncode == 1
    assert "nothing" in done.stderr
    assert "/info" in done.stderr


def test_the_access_log_is_json_without_queries_and_can_be_rotated(product):
    product.probe()
    product.up()
    product.get("/probe/path?secret=1", headers={"X-Request-Id": "id-1"})
    log = product.state_dir / "access.log"
    until(lambda: log.exists() and "id-1" in log.read_text())
    entry = json.loads(log.read_text().splitlines()[-1])
    assert entry["service"] == "probe"
    assert entry["status"] == 200
    assert float(entry["waited"]) > 0
    assert "secret" not in log.read_text()
    log.rename(log.with_suffix(".1"))
    product.run("reopen-logs")

    def is_in_the_new_one() -> bool:
        """A worker that has not heard of it yet writes into the old file."""
        product.get("/probe/", headers={"X-Request-Id": "id-2"})
        return log.exists() and "id-2" in log.read_text()

    until(is_in_the_new_one)


def test_reopening_logs_signals_no_stranger(product):
    product.probe()
    product.up()
    pid_file = product.run_dir / "nginx.pid"
    right = pid_file.read_text()
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        pid_file.write_text(f"{stranger.pid}\n")
        done = product.run("reopen-logs", check=False)
        pid_file.write_text(right)
        assert done.returncode == 1
        assert "no gate runs here" in done.stderr
        assert stranger.poll() is None
        stranger.terminate()


def test_a_second_instance_on_one_state_directory_is_refused(product):
    product.probe()
    product.up()
    arguments = ["--config", str(product.config), "--state-dir", str(product.state_dir)]
    for command in ("up", "backend"):
        done = slurmgate(command, *arguments)
        assert done.returncode == 1
        assert "another slurmgate" in done.stderr
        assert "--state-dir" in done.stderr
    assert product.get("/probe/").status_code == 200


def test_check_gives_a_line_for_every_problem(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"Services": [{"name": "a", "tiemout": 1}], "gaet": {}}')
    done = slurmgate("check", str(broken))
    assert done.returncode == 1
    assert "Services[0].tiemout" in done.stdout
    assert "gaet" in done.stdout
    assert done.stderr == ""


def test_check_refuses_a_key_of_another_certificate_and_warns_of_files_elsewhere(
    tmp_path, certificate
):
    file = tmp_path / "services.json"

    def check(**tls: str) -> subprocess.CompletedProcess[str]:
        gate = {"tls": {**certificate, **tls}}
        file.write_text(json.dumps({"Services": [], "gate": gate}))
        return slurmgate("check", str(file))

    assert check().returncode == 0
    elsewhere = check(key="/etc/elsewhere.pem")
    assert elsewhere.returncode == 0
    assert "warning: gate.tls.key" in elsewhere.stdout
    wrong = check(key=certificate["certificate"])
    assert wrong.returncode == 1
    assert wrong.stdout.startswith("gate.tls.key: ")


def test_the_files_of_the_project_pass_the_check():
    for file in ("config/services.json", "config/examples/original.json"):
        done = slurmgate("check", str(ROOT / file))
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "command",
    (
        "up backend render check status start stop reload logs adopt enable disable reopen-logs"
    ).split(),
)
def test_every_command_has_help_with_an_example(command):
    done = slurmgate(command, "--help")
    assert done.returncode == 0
    assert f"slurmgate {command}" in done.stdout.split("example:")[1]


def test_without_a_backend_commands_say_how_to_start_one(tmp_path):
    done = slurmgate("status", "--state-dir", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "state directory" in done.stderr


def test_a_start_that_a_guard_holds_back_is_refused_with_the_reason(product):
    product.probe(max_starts_per_hour=1)
    product.up()
    product.run("start", "probe")
    product.until_state("ready")
    product.run("stop", "probe")
    until(lambda: product.info()["replicas"] == [])
    refused = product.run("start", "probe", check=False)
    assert refused.returncode == 1
    assert "1 starts within the last hour (max_starts_per_hour)" in refused.stderr
    answer = product.get("/probe/")
    assert (answer.status_code, answer.json()["type"].rpartition("/")[2]) == (503, "cannot-start")
    assert int(answer.headers["Retry-After"]) == 60
    assert answer.json()["retry_after_s"] > 3000


def test_history_shows_what_became_of_a_start(product):
    product.probe()
    product.up()
    product.get("/probe/")
    (start,) = until(lambda: json.loads(product.run("history", "--json").stdout))
    assert (start["service"], start["outcome"]) == ("probe", "ready")
    assert start["start_s"] > 0
    told = product.status()["services"][0]
    assert told["cold_start_s"]["n"] == 1
    assert "1 start" in product.run("history", "probe").stdout
