"""What lies in config/examples is right as it stands: configurations, job scripts, systemd unit."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from slurmgate import cli
from slurmgate.config import examine
from tests.ports import free_port
from tests.waiting import until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "config" / "examples"
CONFIGS = sorted(EXAMPLES.rglob("*.json"))
JOBS = sorted((EXAMPLES / "jobs").iterdir())
UNIT = EXAMPLES / "slurmgate.service"

# What stands in for each server prints its arguments and keeps its environment; GPUs and files of a
# node are not needed.
SERVERS = {"vllm.sh": "vllm", "tgi.sh": "text-generation-launcher", "triton.sh": "tritonserver"}
SERVERS |= {"llama-cpp.sh": "llama-server"}
IMAGES = {"tgi.sh": "TGI_IMAGE", "triton.sh": "TRITON_IMAGE"}
KEYS = {"vllm.sh": "VLLM_API_KEY", "llama-cpp.sh": "LLAMA_API_KEY"}
ECHO = '#!/bin/sh\necho "$0 $$"\nprintf "%s\\n" "$@"\nenv >"$HOME/environment"\n'


def by_name(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def run_job(job: Path, folder: Path, **env: str) -> tuple[str, int, list[str]]:
    """Run a job script with stand-ins in its PATH: what it called, as which pid, with what."""
    for name in (*SERVERS.values(), "apptainer"):
        (folder / name).write_text(ECHO)
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [job, "20017"],
        env={"HOME": str(folder), "PATH": path, "SLURM_JOB_ID": "4711", **env},
        stdout=subprocess.PIPE,
        text=True,
    )
    called, *arguments = process.communicate(timeout=30)[0].splitlines()
    assert process.returncode == 0
    program, pid = called.split()
    assert int(pid) == process.pid, "without exec, the server does not get Slurm's SIGTERM"
    return Path(program).name, process.pid, arguments


def option(arguments: list[str], name: str) -> str:
    """Value of ``--name value`` or ``--name=value``."""
    joined = "\n".join(arguments)
    found = re.search(rf"^{name}[=\n](.*)$", joined, re.MULTILINE)
    assert found, f"no {name} in {arguments}"
    return found[1]


@pytest.mark.parametrize("path", CONFIGS, ids=by_name)
def test_every_example_configuration_has_no_problems(path):
    assert examine(path).problems == ()


def test_the_example_with_models_sends_nobody_anywhere_without_a_key():
    config = examine(EXAMPLES / "openai.json").config
    assert config is not None
    assert config.keys_file is not None
    for service in config.services:
        assert service.models
        assert service.upstream_key
        assert not service.public
        name = dict(service.env)["MODEL_NAME"]
        assert name in ((service.upstream_model,) if service.upstream_model else service.models)
        assert Path(service.bash_file).name in KEYS


def test_every_configuration_in_the_readme_has_no_problems(tmp_path):
    blocks = re.findall(r"(?ms)^```json\n(.*?)^```", (ROOT / "README.md").read_text())
    assert len(blocks) >= 2
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.json"
        path.write_text(block)
        assert examine(path).problems == ()


def test_the_readme_names_every_field_of_a_configuration():
    schema = json.loads((ROOT / "config" / "services.schema.json").read_text())
    readme = (ROOT / "README.md").read_text()
    sections = {"": schema, "gate.": schema["$defs"]["gate"]}
    names = {prefix + name for prefix, part in sections.items() for name in part["properties"]}
    names |= set(schema["$defs"]["service"]["properties"])
    names -= {"$schema", "Services", "gate", "nginxFile", "appPort", "nginxPort"}
    assert sorted(name for name in names if f"`{name}`" not in readme) == []


def test_the_programs_in_the_readme_are_python():
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_example_for_a_cluster_uses_job_scripts_that_are_there():
    services = json.loads((EXAMPLES / "cluster.json").read_text())["Services"]
    used = {Path(service["bash_file"]).name for service in services}
    assert used == {job.name for job in JOBS} - {"hello.sh"}
    for service in services:
        script = (EXAMPLES / "jobs" / Path(service["bash_file"]).name).read_text()
        assert f"Health: {service['check_health_path']}\n" in script
        for variable in service["env"]:
            assert f"{{{variable}:-" in script, f"{variable} means nothing to {service['name']}"
        loopback = service.get("tunnel") == "node-loopback"
        assert (service["env"].get("BIND_HOST") == "127.0.0.1") == loopback


@pytest.mark.parametrize("job", JOBS, ids=by_name)
def test_a_job_script_is_one_that_sbatch_takes(job):
    text = job.read_text()
    assert text.startswith("#!/bin/bash\n")
    assert os.access(job, os.X_OK)
    assert '"$1"' in text
    assert "\nset -euo pipefail\n" in text
    head = text[: text.index("\nset -euo")]
    assert all(line.startswith("#") for line in head.splitlines()), "sbatch reads no further"
    for needed in ("--mem=", "--time="):
        assert f"\n#SBATCH {needed}" in head
    assert ("#SBATCH --gres=" in head) == (job.name != "hello.sh")
    subprocess.run(["/bin/bash", "-n", job], check=True, timeout=30)


@pytest.mark.parametrize("job", [job for job in JOBS if job.name in SERVERS], ids=by_name)
def test_a_job_script_becomes_its_server_on_the_port_it_is_given(job, tmp_path):
    name, _, arguments = run_job(job, tmp_path)
    assert name == SERVERS[job.name]
    given = {"tgi.sh": ("--hostname", "--port"), "triton.sh": ("--http-address", "--http-port")}
    host, port = given.get(job.name, ("--host", "--port"))
    assert (option(arguments, host), option(arguments, port)) == ("0.0.0.0", "20017")
    _, _, arguments = run_job(job, tmp_path, BIND_HOST="127.0.0.1")
    assert option(arguments, host) == "127.0.0.1"


@pytest.mark.parametrize("job", [job for job in JOBS if job.name in KEYS], ids=by_name)
def test_a_server_gets_the_key_of_its_replica_and_not_as_an_argument(job, tmp_path):
    _, _, arguments = run_job(job, tmp_path, SLURMGATE_API_KEY="s3cret")
    assert "s3cret" not in " ".join(arguments)
    assert f"{KEYS[job.name]}=s3cret\n" in (tmp_path / "environment").read_text()
    run_job(job, tmp_path)
    assert KEYS[job.name] not in (tmp_path / "environment").read_text()


ASK_VLLM = """
import asyncio, importlib, sys
async def service(scope, receive, send):
    await send({"status": 200})
async def ask(kind, *shown):
    sent = []
    async def send(message):
        sent.append(message.get("status") or message.get("code"))
    headers = [(b"authorization", value.encode()) for value in shown]
    await Keyed(service)({"type": kind, "path": "/invocations", "headers": headers}, None, send)
    return sent[0]
module, name = sys.argv[1].rsplit(".", 1)
Keyed = getattr(importlib.import_module(module), name)
cases = [("http", "Bearer s3cret"), ("http", "Bearer x"), ("http",), ("websocket",), ("lifespan",)]
cases += [("websocket", "Bearer s3cret"), ("http", "Bearer s3cret", "Bearer s3cret")]
print([asyncio.run(ask(*case)) for case in cases])
"""


def test_vllm_asks_for_the_key_on_every_path(tmp_path):
    _, _, arguments = run_job(EXAMPLES / "jobs" / "vllm.sh", tmp_path, SLURMGATE_API_KEY="s3cret")
    written = (tmp_path / "environment").read_text().splitlines()
    asked = subprocess.run(
        [sys.executable, "-c", ASK_VLLM, option(arguments, "--middleware")],
        env=dict(line.split("=", 1) for line in written),
        stdout=subprocess.PIPE,
        text=True,
        timeout=30,
        check=True,
    )
    assert json.loads(asked.stdout) == [200, 401, 401, 1008, 200, 200, 401]
    assert (tmp_path / ".slurmgate").stat().st_mode & 0o077 == 0
    _, _, arguments = run_job(EXAMPLES / "jobs" / "vllm.sh", tmp_path)
    assert "--middleware" not in arguments


@pytest.mark.parametrize("name", ["tgi.sh", "triton.sh"])
def test_a_server_that_takes_a_key_only_as_an_argument_is_not_started_with_one(name, tmp_path):
    done = subprocess.run(
        [EXAMPLES / "jobs" / name, "20017"],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SLURMGATE_API_KEY": "s3cret"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot keep a key" in done.stderr
    assert "s3cret" not in done.stderr


@pytest.mark.parametrize("job", [job for job in JOBS if job.name in IMAGES], ids=by_name)
def test_a_job_script_runs_its_server_out_of_an_image(job, tmp_path):
    name, _, arguments = run_job(job, tmp_path, **{IMAGES[job.name]: "/images/server.sif"})
    assert name == "apptainer"
    assert "/images/server.sif" in arguments
    assert any("20017" in argument for argument in arguments)


@pytest.mark.parametrize("key", [None, "s3cret"])
def test_the_smallest_service_answers_who_has_its_key_and_ends_with_sigterm(tmp_path, key):
    port = free_port()
    python = Path(sys.executable).parent
    given = {} if key is None else {"SLURMGATE_API_KEY": key}
    process = subprocess.Popen(
        [EXAMPLES / "jobs" / "hello.sh", str(port)],
        env={"PATH": f"{python}:{os.environ['PATH']}", "BIND_HOST": "127.0.0.1", **given},
        stderr=subprocess.DEVNULL,
    )

    def answer(shown: str | None) -> tuple[int, bytes] | None:
        headers = {} if shown is None else {"Authorization": f"Bearer {shown}"}
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/", headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=5) as opened:
                return opened.status, bytes(opened.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return None

    try:
        hello = (200, f"hello from {socket.gethostname()}\n".encode())
        assert until(lambda: answer(key)) == hello
        assert answer("another") == (hello if key is None else (401, b""))
    finally:
        process.terminate()
        process.wait(10)


def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return parser


def test_the_systemd_unit_lets_slurmgate_end_in_order():
    service = unit()["Service"]
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > 35, "backend 20 s, gate 4 s, replicas 10 s"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert service["Restart"] == "on-failure"
    assert service["User"] not in ("", "root")
    assert "MemoryDenyWriteExecute" not in service, "LuaJIT needs memory it can write and run"
    assert "AF_UNIX" in service["RestrictAddressFamilies"]


def test_the_systemd_unit_starts_slurmgate_with_options_it_has():
    service = unit()["Service"]
    program, *arguments = service["ExecStart"].split()
    assert program == "/opt/slurmgate/.venv/bin/slurmgate"
    args = cli.build_parser().parse_args(arguments)
    assert args.command == "up"
    assert Path("/var/lib", service["StateDirectory"]) in args.state_dir.parents


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="this machine has no systemd")
def test_systemd_understands_the_unit(tmp_path):
    copy = tmp_path / UNIT.name  # it also looks for the program, which is not installed here
    copy.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text()))
    checked = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60, check=False
    )
    assert UNIT.name not in checked.stderr
