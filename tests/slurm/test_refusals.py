"""What cannot work is refused soon, clearly, with a backoff, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from tests.slurm.product import ClusterProduct
from tests.up.product import free_port
from tests.waiting import until


def refused(product: ClusterProduct, code: str, *words: str) -> dict[str, Any]:
    """A clear 503 well before the hold timeout, a backoff after it, and nothing left."""
    product.up()
    answer = product.get("/probe/pid", timeout=60)
    problem = answer.json()
    assert answer.status_code == 503
    assert problem["type"].endswith(code), problem
    for word in words:
        assert word in problem["reason"], problem
    assert "Retry-After" in answer.headers
    told = time.monotonic()
    tried = len(product.submitted())
    again = product.get("/probe/pid", headers={"Prefer": "wait=0"})
    assert again.status_code == 503
    if time.monotonic() - told < problem["retry_after_s"]:  # the first backoff is a second
        assert len(product.submitted()) == tried, "a backoff was to hold it back"
    until(lambda: product.live() == [])
    until(lambda: product.tunnels() == [])
    until(lambda: list((product.state_dir / "replicas").iterdir()) == [])
    return problem


def test_a_key_the_login_host_does_not_know(product: ClusterProduct):
    key = product.folder / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    product.job(ssh_key_file=str(key))
    refused(product, "cannot-start", "authorized_keys", product.lab.address)


def test_an_unknown_host_key(product: ClusterProduct):
    empty = product.folder / "known_hosts"
    empty.touch()
    product.job(ssh_known_hosts=str(empty))
    refused(product, "cannot-start", "SHA256:", "ssh-keyscan", str(empty))


def test_a_changed_host_key(own_product: ClusterProduct):
    own_product.job()
    own_product.lab.change_host_key()
    refused(own_product, "cannot-start", "SHA256:", "ssh-keygen -R")


def test_an_unreachable_login_host(product: ClusterProduct):
    port = free_port()
    product.job(ssh_port=port)
    refused(product, "cannot-start", product.lab.address, str(port))


def test_a_login_host_without_sbatch(own_product: ClusterProduct):
    lab = own_product.lab
    Path(lab.home, ".bash_profile").write_text(f"PATH={lab.bare_path()}\n")
    lab.sshd_options(env={"PATH": lab.bare_path()})
    own_product.job()
    refused(own_product, "cannot-start", "not found", "remote_setup")


def test_sbatch_that_only_a_login_shell_finds_is_found(own_product: ClusterProduct):
    own_product.lab.sshd_options(env={"PATH": own_product.lab.bare_path()})
    own_product.job()
    own_product.up()
    assert own_product.get("/probe/pid").status_code == 200


def test_a_missing_script(product: ClusterProduct):
    product.job(bash_file="nowhere/run.sh")
    refused(product, "cannot-start", "nowhere/run.sh")


def test_a_partition_that_does_not_exist(product: ClusterProduct):
    product.job(sbatch_args=["--partition=nowhere"])
    refused(product, "cannot-start", "nvalid partition")


def test_a_job_that_fails_at_once(product: ClusterProduct):
    script = product.lab.script("broken.sh", "echo no weights; exit 3")
    product.job(bash_file=script)
    problem = refused(product, "start-failed", "exited with code 3")
    assert "no weights" in "\n".join(problem["log"])


def test_a_login_host_that_prohibits_forwarding(own_product: ClusterProduct):
    own_product.lab.sshd_options("AllowTcpForwarding no")
    own_product.job()
    refused(own_product, "cannot-start", "administratively prohibited")


def test_a_service_that_listens_on_the_wrong_address(product: ClusterProduct):
    product.job(bind="loopback", start_timeout=4)
    refused(product, "start-failed", "start_timeout", "127.0.0.1", "node-loopback")


def test_a_login_shell_that_prints_a_banner_does_no_harm(own_product: ClusterProduct):
    lab = own_product.lab
    banner = lab.folder / "banner"
    banner.write_text("All use is logged.\n" * 20)
    for name in (".bashrc", ".profile", ".bash_profile"):
        Path(lab.home, name).write_text("echo 'Welcome!  12345'\necho careful >&2\n")
    lab.sshd_options(f"Banner {banner}")
    own_product.job()
    own_product.up()
    assert own_product.get("/probe/pid").status_code == 200
    assert len(own_product.submitted()) == 1
