"""A key goes to a shell of this machine, and no word that comes back tells it."""

from __future__ import annotations

import pytest

from slurmgate import upstream_keys
from slurmgate.ssh import HostRefused, Remotes, Unfinished
from tests.unit import builders

KEY = "k3y-of_this-replica"
EXPORT = f"export SLURMGATE_API_KEY={KEY}"


@pytest.fixture
def remotes():
    made = Remotes()
    yield made
    made.close()


def test_keys_are_random_and_only_for_who_demands_them():
    spec = builders.spec(upstream_key=True)
    made = [upstream_keys.make(spec) for _ in range(100)]
    assert len(set(made)) == 100
    assert all(key is not None and len(key) == 43 for key in made)
    assert upstream_keys.make(builders.spec()) is None


@pytest.mark.parametrize("login_shell", [False, True])
def test_what_a_shell_prints_of_its_work_comes_back_without_the_key(remotes, login_shell):
    got = remotes.run(
        None,
        f"{EXPORT}\nenv | grep API_KEY; echo also $SLURMGATE_API_KEY >&2; exit 3",
        setup=("set -xv",),
        timeout=20,
        login_shell=login_shell,
        secret=KEY,
    )
    assert (got.code, got.out) == (3, "SLURMGATE_API_KEY=[upstream key]\n")
    assert "also [upstream key]" in got.err
    assert KEY not in got.err


@pytest.mark.parametrize(
    ("script", "setup", "error"),
    [
        (f"{EXPORT}; echo $SLURMGATE_API_KEY >&2; kill -9 $PPID $$", ("set -x",), Unfinished),
        (EXPORT, (f"echo {KEY}; exit 9",), HostRefused),
    ],
)
@pytest.mark.parametrize("pad", range(270, 310, 10))
def test_no_error_quotes_the_key_nor_a_part_of_it(remotes, script, setup, error, pad):
    script = f"printf %{pad}d 0 >&2; {script}"
    with pytest.raises(error) as raised:
        remotes.run(None, script, setup=setup, timeout=20, secret=KEY)
    assert KEY[-8:] not in str(raised.value)


def test_nothing_that_is_sent_is_in_a_repr():
    from slurmgate.ssh.connection import Task
    from slurmgate.ssh.script import Framed

    framed = Framed(EXPORT.encode(), "nonce", 3.0, KEY)
    out, _ = framed.streams()
    out.feed(KEY.encode())
    assert KEY not in repr((Task("sh -s", framed), framed, out))
