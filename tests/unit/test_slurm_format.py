"""What is said to Slurm and how its answers are read; the shell text runs, sbatch is a fake."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmgate.launchers import (
    avoiding,
    sbatch_args,
    slurm_format,
    slurm_states,
    slurm_submit,
    taken_port,
)
from slurmgate.launchers.slurm_format import Detail, JobName, NodePlace, parse_listing
from slurmgate.launchers.slurm_states import Kind
from slurmgate.launchers.slurm_submit import NotInstalled, Refusal, Submitted
from slurmgate.model import Exit, Fault, ServiceSpec

NAME = "sg.vm-x7k2.0a1b2c3d4e.k3f9.20017.deadbeef.llm"
FAKE_SBATCH = """#!{python} -I
import json, os, sys
seen = {{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}
json.dump(seen, open({seen!r}, "w"))
print("4711")
"""


class LoginHost:
    """A home directory and a search path whose sbatch writes down how it was called."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / 'it\'s a "home"'
        self.home.mkdir()
        self.seen = folder / "seen.json"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.install("sbatch", FAKE_SBATCH.format(python=sys.executable, seen=str(self.seen)))
        self.script("serve.sh", "#!/bin/sh\n#SBATCH --partition=main\nsleep 1\n")
        self.env = {"HOME": str(self.home), "PATH": f"{self.bin}:/usr/bin:/bin"}

    def install(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def script(self, name: str, text: str) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", "-s"],
            input=text,
            env=self.env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def submit(
        self, spec: ServiceSpec, avoid: Sequence[str] = ()
    ) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment that sbatch got."""
        done = self.run(slurm_submit.submit_script(spec, NAME, "k3f9", 20017, avoid))
        assert done.returncode == 0, done.stderr
        assert slurm_submit.job_id(done.stdout) == Submitted("4711")
        seen = json.loads(self.seen.read_text())
        assert os.path.realpath(seen["cwd"]) == os.path.realpath(self.home)
        return seen["argv"], seen["env"]


@pytest.fixture
def host(tmp_path: Path) -> LoginHost:
    return LoginHost(tmp_path)


def service(
    bash_file: str = "serve.sh",
    sbatch_args: tuple[str, ...] = (),
    env: tuple[tuple[str, str], ...] = (),
) -> ServiceSpec:
    return ServiceSpec(
        name="LLM service",
        route_name="llm",
        api_paths=("/",),
        bash_file=bash_file,
        check_health_path="/health",
        timeout=60.0,
        folder=Path("/"),
        sbatch_args=sbatch_args,
        env=env,
    )


def own_output(host: LoginHost) -> str:
    return f"--output={host.home}/.slurmgate/logs/slurmgate-%j.log"


def test_a_submission_removes_logs_that_nothing_was_written_to_for_long(host: LoginHost) -> None:
    folder = host.home / ".slurmgate/logs"
    (folder / "mine").mkdir(parents=True)
    ages = {
        "slurmgate-1.log": 32,
        "slurmgate-2.log": 29,
        "other.log": 99,
        "mine/slurmgate-3.log": 99,
    }
    for name, days in ages.items():
        (folder / name).touch()
        written = time.time() - days * 86400
        os.utime(folder / name, (written, written))
    host.submit(service(sbatch_args=("--output=elsewhere",)))
    assert (folder / "slurmgate-1.log").exists()
    host.submit(service())
    left = {str(path.relative_to(folder)) for path in folder.rglob("*.log")}
    assert left == set(ages) - {"slurmgate-1.log"}


def test_a_submission_names_the_job_and_passes_the_port(host: LoginHost) -> None:
    argv, env = host.submit(service(sbatch_args=("--gres=gpu:1", "-p", "a b")))
    assert argv == [
        *("--gres=gpu:1", "-p", "a b", "--parsable", f"--job-name={NAME}", "--export=ALL"),
        *(own_output(host), str(host.home / "serve.sh"), "20017"),
    ]
    assert env["SLURMGATE_PORT"] == "20017"
    assert env["SLURMGATE_SERVICE"] == "LLM service"
    assert env["SLURMGATE_REPLICA"] == "k3f9"
    assert stat.S_IMODE((host.home / ".slurmgate/logs").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "nasty",
    [
        "$(touch INJECTED)",
        "`touch INJECTED`",
        "'; touch INJECTED; '",
        "a\nb,c=d;e",
        '"$HOME"',
        "\\'",
    ],
)
def test_nothing_a_user_writes_is_run_by_the_shell(host: LoginHost, nasty: str) -> None:
    host.script(nasty, "#!/bin/sh\n")
    argv, env = host.submit(
        service(bash_file=nasty, sbatch_args=(f"--comment={nasty}",), env=(("A", nasty),))
    )
    assert argv[0] == f"--comment={nasty}"
    assert argv[-2] == f"{host.home}/{nasty}"
    assert env["A"] == nasty
    assert not list(host.home.parent.rglob("INJECTED"))
    assert not Path("/INJECTED").exists()


@given(
    st.lists(st.text(st.characters(blacklist_characters="\0", codec="utf-8"), min_size=1)),
    st.text(st.characters(blacklist_characters="\0", codec="utf-8")),
)
def test_every_value_arrives_as_it_was_written(words: list[str], value: str) -> None:
    spec = service(bash_file="/dev/null", sbatch_args=tuple(words), env=(("A", value),))
    text = slurm_submit.submit_script(spec, NAME, "k3f9", 20017)
    show = 'show() { printf "%s\\0" "$A" "$@"; }\nsg_sbatch=show sg_script=x sg_export=ALL\n'
    done = subprocess.run(
        ["/bin/sh", "-s"],
        input=(show + text[text.index("set -- ") :]).encode(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    printed = done.stdout.split(b"\0")
    assert printed[0] == value.encode()
    assert printed[1 : 1 + len(words)] == [word.encode() for word in words]
    assert printed[1 + len(words)] == b"--parsable"
    assert printed[-2] == b"20017"


@pytest.mark.parametrize(
    ("written", "found"),
    [("~/deep/run.sh", "deep/run.sh"), ("deep/run.sh", "deep/run.sh"), ("~x/run.sh", "~x/run.sh")],
)
def test_the_script_is_found_in_the_remote_home(host: LoginHost, written: str, found: str) -> None:
    host.script(found, "#!/bin/sh\n")
    argv, _ = host.submit(service(bash_file=written))
    assert argv[-2] == str(host.home / found)


def test_an_absolute_script_stays_absolute(host: LoginHost, tmp_path: Path) -> None:
    script = tmp_path / "elsewhere.sh"
    script.write_text("#!/bin/sh\n")
    argv, _ = host.submit(service(bash_file=str(script)))
    assert argv[-2] == str(script)


@pytest.mark.parametrize(
    "directive",
    ["--output=x", "--output x", "-o x", "-ox", "-p main -o x", "--out=x", "-J a --output=x"],
)
def test_the_scripts_own_output_is_left_alone(host: LoginHost, directive: str) -> None:
    host.script("serve.sh", f"#!/bin/sh\n  # remark\n\n#SBATCH {directive}\nsleep 1\n")
    argv, _ = host.submit(service())
    assert not [word for word in argv if word.startswith("--output")]


@pytest.mark.parametrize("args", [("--output=x",), ("--output", "x"), ("-ox",), ("-o", "x")])
def test_an_output_in_the_arguments_is_left_alone(host: LoginHost, args: tuple[str, ...]) -> None:
    argv, _ = host.submit(service(sbatch_args=args))
    assert own_output(host) not in argv


@pytest.mark.parametrize(
    "text",
    [
        "sleep 1\n#SBATCH --output=x\n",  # sbatch reads no directives behind the first command
        "#SBATCH -p main # -o x\n",
        "# SBATCH --output=x\n",
        "#SBATCH --open-mode=append\n",
    ],
)
def test_what_only_looks_like_an_output_does_not_count(host: LoginHost, text: str) -> None:
    host.script("serve.sh", "#!/bin/sh\n" + text)
    argv, _ = host.submit(service())
    assert own_output(host) in argv


NAMES = "A,SLURMGATE_PORT,SLURMGATE_SERVICE,SLURMGATE_REPLICA"


@pytest.mark.parametrize(
    ("directive", "args", "passed"),
    [
        ("", (), "ALL"),
        ("--export=NONE", (), NAMES),
        ("--export NIL", (), NAMES),
        ("--export=X,Y=1", (), f"X,Y=1,{NAMES}"),
        ('--export="X=1 2"', (), f"X=1 2,{NAMES}"),
        ("--export='X=1 2' -p main", (), f"X=1 2,{NAMES}"),
        ("--export=ALL,X=1", (), "ALL,X=1"),
        ("--export-file=f", (), "ALL"),
        ("--export=ALL", ("--export=NONE",), NAMES),
        ("--export=NONE", ("--export", "ALL"), "ALL"),
        ("", ("--export=X",), f"X,{NAMES}"),
    ],
)
def test_the_environment_reaches_the_job_whatever_the_script_exports(
    host: LoginHost, directive: str, args: tuple[str, ...], passed: str
) -> None:
    host.script("serve.sh", f"#!/bin/sh\n#SBATCH {directive}\n")
    argv, env = host.submit(service(sbatch_args=args, env=(("A", "1,2\n3"),)))
    assert [word for word in argv if word.startswith("--export=")][-1] == f"--export={passed}"
    assert env["A"] == "1,2\n3"


KEY = "-k3y_of-this_replica"


@pytest.mark.parametrize("export", ["ALL", "NONE", "X"])
def test_a_key_is_in_the_environment_and_in_no_argument(host: LoginHost, export: str) -> None:
    text = slurm_submit.submit_script(
        service(sbatch_args=(f"--export={export}",)), NAME, "k3f9", 20017, api_key=KEY
    )
    done = host.run("set -xv\n" + text)
    seen = json.loads(host.seen.read_text())
    assert seen["env"]["SLURMGATE_API_KEY"] == KEY
    assert KEY not in str(seen["argv"])
    passed = [word for word in seen["argv"] if word.startswith("--export=")][-1]
    assert ("SLURMGATE_API_KEY" in passed) == (export != "ALL")
    assert "+ " in done.stderr, "the shell did print what it ran"
    assert f"+ export SLURMGATE_API_KEY={KEY}" not in done.stderr


def test_a_key_that_somebody_else_was_given_is_not_passed_on(host: LoginHost) -> None:
    host.env["SLURMGATE_API_KEY"] = KEY
    _, env = host.submit(service())
    assert "SLURMGATE_API_KEY" not in env


# -- nodes to avoid --------------------------------------------------------------------------


def excluded(argv: list[str]) -> str | None:
    """What sbatch takes: the last one it is given."""
    return sbatch_args.last_value(argv[: argv.index("--parsable")] + own_options(argv), "exclude")


def own_options(argv: list[str]) -> list[str]:
    return argv[argv.index("--parsable") : -2]


def test_without_nodes_to_avoid_nothing_is_said_of_nodes(host: LoginHost) -> None:
    host.script("serve.sh", "#!/bin/sh\n#SBATCH --exclude=n1\n")
    argv, _ = host.submit(service(sbatch_args=("-x", "n2")))
    assert argv[:2] == ["-x", "n2"]
    assert not [word for word in argv if word.startswith("--exclude")]


@pytest.mark.parametrize(
    ("directives", "args", "all_of_them"),
    [
        ("", (), "n8,n9"),
        ("", ("--exclude=n1,n2",), "n1,n2,n8,n9"),
        ("", ("--exclude", "n[1-2]"), "n[1-2],n8,n9"),
        ("", ("--exclud=n1",), "n1,n8,n9"),
        ("", ("-x", "n1"), "n1,n8,n9"),
        ("", ("-xn1", "--exclusive"), "n1,n8,n9"),
        ("", ("-Hxn1",), "n1,n8,n9"),
        ("#SBATCH --exclude=n1,n2", (), "n1,n2,n8,n9"),
        ("#SBATCH --exclude n[1-2]", (), "n[1-2],n8,n9"),
        ("#SBATCH --exclud=n1", (), "n1,n8,n9"),
        ("#SBATCH -x n1", (), "n1,n8,n9"),
        ("#SBATCH -xn1", (), "n1,n8,n9"),
        ("#SBATCH -p main -x n1 -t 5 # -x n3", (), "n1,n8,n9"),
        ('#SBATCH --exclude="n1,n2" -p main', (), "n1,n2,n8,n9"),
        ("#SBATCH --exclude='n1'", (), "n1,n8,n9"),
        ("#SBATCH --exclude=n1 -x n2\n#SBATCH -p main", (), "n2,n8,n9"),
        ("#SBATCH -x n1\n#SBATCH --exclude=n2", (), "n2,n8,n9"),
        ("#SBATCH --exclusive\n#SBATCH --export=NONE", (), "n8,n9"),
        ("sleep 1\n#SBATCH --exclude=n1", (), "n8,n9"),
        ("#SBATCH --exclude=n1", ("--exclude=n2",), "n2,n8,n9"),
        ("#SBATCH --exclude=n8", (), "n8,n8,n9"),
    ],
)
def test_nodes_to_avoid_join_those_that_the_user_excludes(
    host: LoginHost, directives: str, args: tuple[str, ...], all_of_them: str
) -> None:
    host.script("serve.sh", f"#!/bin/sh\n{directives}\nsleep 1\n")
    argv, _ = host.submit(service(sbatch_args=args), ["n8", "n9"])
    assert excluded(argv) == all_of_them
    assert argv[: len(args)] == list(args)


@pytest.mark.parametrize("given", ["args", "script"])
def test_a_file_of_excluded_nodes_is_read(host: LoginHost, given: str) -> None:
    host.script("lists/bad", "n1 # broken\nn2,n3\n\n")
    option = "--exclude=./lists/bad"
    if given == "script":
        host.script("serve.sh", f"#!/bin/sh\n#SBATCH {option}\n")
    argv, _ = host.submit(service(sbatch_args=(option,) if given == "args" else ()), ["n9"])
    assert excluded(argv) == "n1,n2,n3,n9"


HOSTNAMES = """#!/bin/sh
[ "$*" = 'show hostnames n[7-8]' ] && printf 'n7\\nn8\\n'
"""


@pytest.mark.parametrize(
    ("directive", "args", "all_of_them"),
    [
        ("", ("--nodelist=n8",), "n9"),
        ("", ("-w", "n8,n9"), None),
        ("", ("-wn[7-8]",), "n9"),
        ("--nodelist=n8", (), "n9"),
        ("--nodelis n8", (), "n9"),
        ("-w n[7-8]", (), "n9"),
        ("-w n8 -x n1", (), "n1,n9"),
        ("-w n8", ("-w", "n9"), "n8"),
        ("--nodefile=n8", (), "n8,n9"),
    ],
)
def test_a_node_that_the_user_insists_on_is_not_avoided(
    host: LoginHost, directive: str, args: tuple[str, ...], all_of_them: str | None
) -> None:
    host.install("scontrol", HOSTNAMES)
    host.script("serve.sh", f"#!/bin/sh\n#SBATCH {directive}\n")
    argv, _ = host.submit(service(sbatch_args=args), ["n8", "n9"])
    assert excluded(argv) == all_of_them


@pytest.mark.parametrize(
    ("said", "all_of_them"),
    [
        ("allocation failure: Requested node configuration is not available", "n1"),
        ("allocation failure: Invalid node name specified", "n1"),
        ("allocation failure: Unable to contact slurm controller", "n1,n9"),
    ],
)
def test_nothing_is_avoided_when_slurm_has_no_other_node_for_the_job(
    host: LoginHost, said: str, all_of_them: str
) -> None:
    real = host.bin / "sbatch"
    real.rename(host.bin / "real")
    host.install(
        "sbatch", f'#!/bin/sh\n[ "$1" = --test-only ] && {{ echo "{said}" >&2; exit 1; }}\n'
        f'exec {host.bin}/real "$@"\n',
    )  # fmt: skip
    argv, _ = host.submit(service(sbatch_args=("--exclude=n1",)), ["n9"])
    assert excluded(argv) == all_of_them


def test_only_the_name_of_one_node_can_be_avoided(caplog: pytest.LogCaptureFixture) -> None:
    names = ["n1", "n[1-9]", "a,b", "n2.example.org", "n1", "", "x" * 256, "/etc/list", "n1\n", "é"]
    assert avoiding.nameable(names) == ("n1", "n2.example.org")
    assert caplog.text.count("no name of a node") == 7
    assert "'n[1-9]'" in caplog.text


@settings(max_examples=25)
@given(st.text(st.characters(blacklist_characters="\0", codec="utf-8"), max_size=40))
def test_whatever_is_excluded_or_pinned_is_never_run_by_the_shell(value: str) -> None:
    text = avoiding.text((f"--exclude={value}/", f"--nodelist={value}"), 1, ["n9"])
    show = 'sg_sbatch=true sg_script=x\nprintf "%s" "$sg_exclude" >/dev/null\n'
    done = subprocess.run(
        ["/bin/sh", "-s"],
        input=("scontrol() { :; }\n" + show + text + "echo done\n").encode(),
        capture_output=True,
        timeout=60,
        check=True,
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.stdout == b"done\n"


def test_variables_of_the_login_host_do_not_change_the_submission(host: LoginHost) -> None:
    host.env |= {
        "SBATCH_ARRAY_INX": "1-3",
        "SBATCH_JOB_NAME": "other",
        "SBATCH_ACCOUNT": "mine",
        "SLURM_JOB_ID": "9",
        "SLURM_CONF": "/etc/other.conf",
        "INNOCENT": "a\nSLURM_X=1",
    }
    _, env = host.submit(service())
    left = {name for name in env if name.startswith(("SBATCH_", "SLURM_"))}
    assert left == {"SBATCH_ACCOUNT", "SLURM_CONF"}
    assert env["INNOCENT"] == "a\nSLURM_X=1"


def test_variables_of_a_service_may_be_called_anything(host: LoginHost) -> None:
    given = (("PATH", "/only/mine"), ("sg_script", "x"), ("HOME", "/h"), ("IFS", "/"))
    argv, env = host.submit(service(env=given))
    assert argv[-2:] == [str(host.home / "serve.sh"), "20017"]
    assert env["PATH"] == "/only/mine"
    assert env["HOME"] == "/h"


def answer(host: LoginHost, spec: ServiceSpec) -> object:
    done = host.run(slurm_submit.submit_script(spec, NAME, "k3f9", 20017))
    return slurm_submit.read_submission(done.returncode, done.stdout, done.stderr)


def test_a_script_that_is_not_there_is_refused_before_sbatch_is_asked(host: LoginHost) -> None:
    refused = answer(host, service(bash_file="gone.sh"))
    assert isinstance(refused, Refusal)
    assert refused.for_good
    assert refused.reason == (f"bash_file {host.home}/gone.sh does not exist on the login host")
    refused = answer(host, service(bash_file="/"))
    assert isinstance(refused, Refusal)
    assert "is not a file that can be read" in refused.reason
    assert not host.seen.exists()


@pytest.mark.parametrize(
    "directive", ["--array=1-3", "-a 1-3", "-W", "--wait", "-p main -M other", "hetjob"]
)
def test_a_script_that_asks_for_another_kind_of_job_is_refused(
    host: LoginHost, directive: str
) -> None:
    host.script("serve.sh", f"#!/bin/sh\n#SBATCH {directive}\n")
    refused = answer(host, service())
    assert isinstance(refused, Refusal)
    assert refused.for_good
    assert "take it out" in refused.reason
    assert not host.seen.exists()


@pytest.mark.parametrize("directive", ["--wait-all-nodes=1", "-p a-W", "--account=x-M"])
def test_options_that_only_look_like_it_are_none(host: LoginHost, directive: str) -> None:
    host.script("serve.sh", f"#!/bin/sh\n#SBATCH {directive}\n")
    host.submit(service())


def test_a_host_without_sbatch_is_told_apart(host: LoginHost) -> None:
    (host.bin / "sbatch").unlink()
    host.env["PATH"] = str(host.bin)
    for tool in ("env", "sed", "grep", "tail", "mkdir"):
        (host.bin / tool).symlink_to(f"/usr/bin/{tool}")
    assert answer(host, service()) == NotInstalled()


def test_the_job_id_is_found_among_other_lines() -> None:
    assert slurm_submit.job_id("Welcome!\n12;campus\n") == Submitted("12", "campus")
    assert slurm_submit.job_id("Submitted batch job 12 on cluster c\n") == Submitted("12", "c")
    assert slurm_submit.job_id("Welcome!\n") is None
    assert slurm_submit.read_submission(0, "", "") is None


@pytest.mark.parametrize(
    ("said", "for_good"),
    [
        ("Invalid account or account/partition combination specified", True),
        ("Invalid qos specification", True),
        ("Invalid partition name specified", True),
        ("Requested node configuration is not available", True),
        ("Requested time limit is invalid (missing or exceeds some limit)", True),
        ("Access/permission denied", True),
        ("Unspecified error", False),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            False,
        ),
    ],
)
def test_known_refusals_are_given_in_slurms_words(said: str, for_good: bool) -> None:
    text = f"sbatch: error: Batch job submission failed: {said}\n"
    assert slurm_submit.read_submission(1, "", text) == Refusal(said, for_good)


def test_what_a_site_says_with_its_refusal_is_kept() -> None:
    text = (
        "sbatch: error: AssocMaxSubmitJobLimit\n"
        "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (x)\n"
    )
    refused = slurm_submit.refusal(text)
    assert refused is not None
    assert refused.reason == "AssocMaxSubmitJobLimit; Job violates accounting/QOS policy (x)"
    assert not refused.for_good


@pytest.mark.parametrize(
    "text",
    [
        "sbatch: unrecognized option '--frobnicate'\nTry \"sbatch --help\" for more information",
        "sbatch: error: Unable to open file /home/x/serve.sh",
        "sbatch: error: This does not look like a batch script.  The first\nsbatch: error: line",
        'sbatch: error: "x" is not a valid node count',
        'sbatch: error: Invalid numeric value "x" for --nodes.',
    ],
)
def test_what_sbatch_itself_refuses_is_for_good(text: str) -> None:
    refused = slurm_submit.refusal(text)
    assert refused is not None
    assert refused.for_good


@pytest.mark.parametrize(
    "text",
    [
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
        "sbatch: error: Batch job submission failed: Something nobody has seen yet",
        "sbatch: error: Unable to contact slurm controller (connect failure)\n"
        "sbatch: error: Batch job submission failed: Unspecified error",
        "Invalid qos specification, says the banner",
        "",
    ],
)
def test_everything_else_is_unknown(text: str) -> None:
    assert slurm_submit.read_submission(1, "", text) is None


NAME_PART = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=32)


@given(
    st.builds(
        JobName,
        instance=st.text("abcxyz0189-", min_size=1, max_size=32),
        owner=NAME_PART,
        replica=NAME_PART,
        port=st.integers(1, 65535),
        start_hash=st.text("0123456789abcdef", min_size=8, max_size=8),
        route=st.text("abcXYZ019._-", min_size=1, max_size=100),
    )
)
def test_job_names_survive_the_round_trip(name: JobName) -> None:
    assert JobName.parse(str(name)) == name
    assert JobName.parse(f"{name}\n") is None
    assert JobName.parse(f"x{name}") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sg",
        "sg.a.b.c.1.ff",
        "sg.a.b.c.0.ff.r",
        "sg.a.b.c.65536.ff.r",
        "sg.A.b.c.1.ff.r",
        "SG.a",
    ],
)
def test_other_jobs_are_not_ours(text: str) -> None:
    assert JobName.parse(text) is None


@given(st.text(max_size=200))
def test_no_listing_is_too_odd_to_read(text: str) -> None:
    listing = parse_listing(text)
    assert len(listing.rows) + listing.dropped <= text.count("\n") + 1
    slurm_states.waiting_for(text)
    slurm_states.kind_of(text)
    slurm_format.parse_detail(text)
    slurm_format.parse_node("n1", text)


def test_a_listing_is_read_line_by_line() -> None:
    listing = parse_listing(
        "slurm_load_jobs error: something\n"
        f"12|RUNNING|None|n1|n1|1700000000|1700003600|1-02:03:04|{NAME}\n"
        "13_[1-4%2]|PENDING|Resources|n/a||N/A|N/A|UNLIMITED|a|b\n"
        "14|PENDING|(null)|||Unknown|NONE|INVALID|\n"
        "15|PENDING\n"
    )
    running, array, odd = listing.rows
    assert (running.starts_at, running.ends_at) == (1700000000, 1700003600)
    assert running.left == 93784
    assert running.name == NAME
    assert running.reason is None
    assert array.name == "a|b"
    assert array.reason == "Resources"
    assert (array.batch_host, array.nodes, array.starts_at, array.left) == (None, None, None, None)
    assert (odd.reason, odd.name) == (None, "")
    assert listing.dropped == 2


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("PENDING", Kind.QUEUED),
        ("CONFIGURING", Kind.QUEUED),
        ("RUNNING", Kind.RUNNING),
        ("COMPLETING", Kind.ENDING),
        ("SUSPENDED", Kind.PAUSED),
        ("STOPPED", Kind.PAUSED),
        ("REQUEUE_HOLD", Kind.HELD),
        ("SPECIAL_EXIT", Kind.HELD),
        ("CANCELLED by 1000", Kind.ENDED),
        ("TIMEOUT", Kind.ENDED),
        ("NEWLY_INVENTED", None),
        ("", None),
    ],
)
def test_states_have_a_meaning_or_are_unknown(state: str, kind: Kind | None) -> None:
    assert slurm_states.kind_of(state) is kind


def ended(state: str, *, ready: bool, exit: Exit | None = None) -> tuple[str, Fault]:
    how = slurm_states.end_of(state, ready=ready, job_id="4711", node="n2", exit=exit)
    assert how is not None
    return how.words, how.fault


def test_an_end_is_said_in_words_and_blamed() -> None:
    assert ended("FAILED", ready=True, exit=Exit(3)) == (
        "the service exited with code 3",
        Fault.SERVICE,
    )
    assert ended("FAILED", ready=False, exit=Exit(0, 9))[0] == "the service was killed by signal 9"
    assert "output file on the node" in ended("FAILED", ready=False, exit=Exit(0, 53))[0]
    assert ended("COMPLETED", ready=False)[0] == "the service exited with code 0"
    assert ended("CANCELLED", ready=True) == ("job 4711 was cancelled", Fault.NOBODY)
    assert ended("NODE_FAIL", ready=False) == ("node n2 failed", Fault.NOBODY)
    assert ended("TIMEOUT", ready=False) == ("job 4711 ran into its time limit", Fault.SERVICE)
    assert ended("TIMEOUT", ready=True)[1] is Fault.NOBODY
    assert slurm_states.end_of("RUNNING", ready=True, job_id="1") is None


@pytest.mark.parametrize(
    ("reason", "forever"),
    [
        ("BadConstraints", True),
        ("InvalidAccount", True),
        ("InvalidQOS", True),
        ("PartitionTimeLimit", True),
        ("JobHeldUser", True),
        ("JobHeldAdmin", True),
        ("DependencyNeverSatisfied", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("QOSMaxGRESPerJob", True),
        ("AssocMaxCpuPerNode", True),
        ("QOSMinGRES", True),
        ("launch failed requeued held", True),
        ("job_requeued_in_held_state", True),
        ("Job's account not known, so it can't use this partition (staff allows staff)", True),
        ("QOSMaxGRESPerUser", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("AssocMaxJobsLimit", False),
        ("AssocGrpGRES", False),
        ("MaxGRESPerAccount", False),
        ("Resources", False),
        ("Priority", False),
        ("PartitionDown", False),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-3]", False),
        ("Nodes required for job are DOWN, DRAINED or reserved", False),
        ("NewlyInvented", False),
    ],
)
def test_reasons_for_waiting_keep_slurms_word(reason: str, forever: bool) -> None:
    waiting = slurm_states.waiting_for(reason)
    assert waiting is not None
    assert waiting.forever is forever
    assert waiting.not_launched is reason.startswith("launch failed")
    assert waiting.text.startswith(reason)


def test_no_reason_is_no_reason() -> None:
    assert [slurm_states.waiting_for(r) for r in (None, "", "None", "(null)")] == [None] * 4


JOB_LINE = (
    "JobId=12 JobName=x UserId=me(1) JobState=FAILED Reason=NonZeroExitCode Dependency=(null) "
    "ExitCode=3:0 DerivedExitCode=0:9 RunTime=00:00:01 TimeLimit=1-00:00:00 NodeList=n1 "
    "BatchHost=n1.site StdErr=/e StdIn=/dev/null StdOut={output} Power= MailUser=x"
)


def test_the_detail_of_a_job_comes_with_the_end_of_its_output(host: LoginHost) -> None:
    output = host.script("a log-n1 0.txt", "".join(f"line {n}\n" for n in range(9)))
    pattern = str(output.parent / "a log-%N %t.txt")
    host.install("scontrol", f"#!/bin/sh\ncat <<'EOF'\n{JOB_LINE.format(output=pattern)}\nEOF\n")
    done = host.run(slurm_format.detail_script("12", 2))
    assert slurm_format.parse_detail(done.stdout) == Detail(
        name="x",
        state="FAILED",
        reason="NonZeroExitCode",
        exit=Exit(3),
        derived=Exit(0, 9),
        output=pattern,
        time_limit=86400,
        nodes="n1",
        batch_host="n1.site",
        lines=("line 7", "line 8"),
    )


def test_a_job_that_slurm_forgot_is_gone_and_silence_says_nothing(host: LoginHost) -> None:
    host.install(
        "scontrol", "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified'\nexit 1\n"
    )
    done = host.run(slurm_format.detail_script("12", 5))
    assert slurm_format.parse_detail(done.stdout) == Detail(gone=True)
    host.install("scontrol", "#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    done = host.run(slurm_format.detail_script("12", 5))
    assert slurm_format.parse_detail(done.stdout) is None
    assert slurm_format.parse_detail("") is None


# As Slurm 22.05 prints them with SLURM_TIME_FORMAT=%s.
UNLAUNCHED = (
    f"JobId=4711 JobName={NAME} UserId=me(1000) Priority=0 JobState=PENDING"
    " Reason=launch_failed_requeued_held SubmitTime=1795334430 StartTime=1795334439"
    " LastSchedEval=1795334430 Scheduler=Main Partition=main NodeList= NumNodes=1"
)
REASONS = """n1|1795330000|Prolog error
n2|1795334431|Not responding
n3|1795334431|Prolog error
n4|1795334432|batch job complete failure
n5|Unknown|none
"""


@pytest.mark.parametrize(
    ("job", "reasons", "node"),
    [
        (UNLAUNCHED, REASONS, "n3"),
        (UNLAUNCHED, "n1|1795334430|Prolog error\n", "n1"),
        (UNLAUNCHED, "n1|1795334429|Prolog error\n", None),
        (UNLAUNCHED, "", None),
        (UNLAUNCHED.replace(NAME, "another"), REASONS, None),
        (UNLAUNCHED.replace("1795334430 Sch", "Unknown Sch"), REASONS, None),
        ("slurm_load_jobs error: Invalid job id specified", REASONS, None),
    ],
)
def test_where_a_job_could_not_be_launched_is_told_by_the_reasons_of_nodes(
    host: LoginHost, job: str, reasons: str, node: str | None
) -> None:
    host.install("scontrol", f"#!/bin/sh\necho '{job}'\ncase '{job}' in *error*) exit 1; esac\n")
    host.install("sinfo", f"#!/bin/sh\nprintf '%s' '{reasons}'\n")
    done = host.run(slurm_format.unfit_script("4711"))
    assert slurm_format.parse_unfit(NAME, done.stdout) == node


def test_the_end_of_a_file_is_shown_whatever_its_name(host: LoginHost) -> None:
    path = host.script("-n $(false)'", "a\nb\n")
    assert host.run(slurm_format.tail_script(str(path), 1)).stdout == "b\n"
    assert host.run(slurm_format.tail_script("/no/such", 1)).stdout == ""


def place(host: LoginHost, line: str, code: int = 0) -> NodePlace | None:
    host.install("scontrol", f"#!/bin/sh\necho '{line}'\nexit {code}\n")
    host.install(
        "hostname",
        "#!/bin/sh\n"
        'case "$1" in -s) echo login1;; -I) echo 10.0.0.1;; *) echo login1.site;; esac\n',
    )
    return slurm_format.parse_node("gpu07", host.run(slurm_format.node_script("gpu07")).stdout)


def test_a_node_is_found_by_the_address_slurm_uses(host: LoginHost) -> None:
    uid = os.getuid()
    far = "NodeName=gpu07 Arch=x NodeAddr=10.0.0.7 NodeHostName=gpu07 Version=22"
    assert place(host, far) == NodePlace("10.0.0.7", is_login_host=False, uid=uid)
    here = "NodeName=gpu07 NodeAddr=10.0.0.1 NodeHostName=gpu07 Version=22"
    assert place(host, here) == NodePlace("10.0.0.1", is_login_host=True, uid=uid)
    named = "NodeName=gpu07 NodeAddr=login1 NodeHostName=Login1 Version=22"
    assert place(host, named) == NodePlace("login1", is_login_host=True, uid=uid)
    lab = "NodeName=n1 NodeAddr=127.0.1.11 NodeHostName=localhost Version=22"
    assert place(host, lab) == NodePlace("127.0.1.11", is_login_host=False, uid=uid)
    refused = "slurm_load_node error: Access/permission denied"
    assert place(host, refused, 1) == NodePlace(None, is_login_host=False, uid=uid)
    assert slurm_format.parse_node("gpu07", "half an ans") is None


@pytest.mark.parametrize(
    "words",
    [
        "slurm_load_node error: Unable to contact slurm controller (connect failure)",
        "slurm_load_node error: Socket timed out on send/recv operation",
        "slurm_load_node error: Zero Bytes were transmitted or received",
    ],
)
def test_where_a_node_is_stays_unknown_while_the_controller_is_away(
    host: LoginHost, words: str
) -> None:
    assert place(host, words, 1) is None
    assert place(host, "no line of a node") is None


def test_a_job_is_cancelled_by_name_and_id(host: LoginHost) -> None:
    host.install("scancel", '#!/bin/sh\nprintf "%s\\n" "$@"\n')
    assert host.run(slurm_format.cancel_script(NAME, "12")).stdout == f"--name={NAME}\n12\n"


def test_the_listing_asks_for_all_states_of_the_own_jobs(host: LoginHost) -> None:
    host.install("squeue", '#!/bin/sh\nprintf "%s\\n" "$SLURM_TIME_FORMAT" "$SQUEUE_NAMES" "$@"\n')
    host.env["SQUEUE_NAMES"] = "other"
    shown = host.run(slurm_format.list_script()).stdout.splitlines()
    assert shown == [
        *("%s", "", "--noheader", "--states=all", "--user", str(os.getuid()), "-o"),
        "%i|%T|%r|%B|%N|%S|%e|%L|%j",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "OSError: [Errno 98] Address already in use",
        "ERROR: [Errno 98] error while attempting to bind on address ('0.0.0.0', 20017): address "
        "already in use",
        "Error: listen EADDRINUSE: address already in use :::20017",
        "listen tcp :20017: bind: address already in use",
        "couldn't bind HTTP server socket, hostname: 0.0.0.0, port: 20017",
        "Bind for 0.0.0.0:20017 failed: port is already allocated",
        "E0101 12:30:45.1 failed to start HTTP service: Unavailable - Socket '0.0.0.0:20017' "
        "already in use",
        "Error: Address already in use (os error 98)",
        "Port 20017 is in use by another program.",
        "[2026-01-01 12:30:45 +0000] [7] [ERROR] Connection in use: ('0.0.0.0', 20017)",
    ],
)
def test_a_taken_port_is_recognised(line: str) -> None:
    assert taken_port.is_told(["fine", line], 20017)


@pytest.mark.parametrize(
    "line",
    [
        "failed to start metrics: Socket '0.0.0.0:8002' already in use",
        "Listening on 0.0.0.0:20017",
        "error: model file not found",
    ],
)
def test_other_lines_do_not_mean_a_taken_port(line: str) -> None:
    assert not taken_port.is_told([line], 20017)


def names(*words: str) -> list[tuple[str, str | None]]:
    return [(option.name, option.value) for option in sbatch_args.read_options(words)]


def test_arguments_are_read_as_sbatch_reads_them() -> None:
    assert names("--array=1-3", "--arr", "1", "-a1", "-a", "2") == [
        *(("array", "1-3"), ("array", "1"), ("array", "1"), ("array", "2"))
    ]
    assert names("-HJname", "--wait", "--exclusive", "x.sh") == [
        *(("H", None), ("job-name", "name"), ("wait", None), ("exclusive", None), ("", "x.sh"))
    ]
    assert names("--brand-new", "7", "--newer", "-p", "gpu") == [
        *(("brand-new", "7"), ("newer", None), ("partition", "gpu"))
    ]
    assert names("-p", "-J", "--mem", "--wait") == [("partition", "-J"), ("mem", "--wait")]
    assert names("--", "-", ":") == [("", "--"), ("", "-"), ("", ":")]
    missing = [o.name for o in sbatch_args.read_options(["--mem"]) if o.missing]
    assert missing == ["mem"]
