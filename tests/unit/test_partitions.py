"""What partitions allow, compared with what jobs ask for."""

from __future__ import annotations

import pytest

from slurmgate.launchers.partitions import doubts, parse_partitions, seconds

TEXT = """\
PartitionName=quick AllowAccounts=ALL MaxTime=01:00:00 State=UP Nodes=n[1-3]
PartitionName=staff AllowAccounts=staff,Boss DenyAccounts=(null) MaxTime=UNLIMITED State=DRAIN
PartitionName=most AllowAccounts=ALL DenyAccounts=guests MaxTime=2-00:00:00 State=UP
scontrol: warning: something
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:00:00", 3600),
        ("2-0", 172800),
        ("1-02:03", 93780),
        ("1-02:03:04", 93784),
        ("UNLIMITED", None),
        ("infinite", None),
        ("0", None),
        ("soon", None),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text: str, expected: int | None):
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("partition", "directives", "words", "found"),
    [
        ("quick", [], [], []),
        ("quick", [], ["-t", "60"], []),
        ("quick", [], ["-t61"], [True]),
        ("quick", [], ["--time=UNLIMITED"], [True]),
        ("quick", [], ["--time=61", "--qos=long"], [False]),
        ("quick", [' --time="2:00:00"'], [], [True]),
        ("quick", [" --time=2:00:00"], ["--time=5"], []),
        ("quick", [' --comment="open'], [], []),
        ("staff", [], [], [False, False]),
        ("staff", [" -A boss"], [], [False]),
        ("staff", [], ["--account=me"], [False, True]),
        ("most", [], ["-A", "Guests"], [True]),
        ("most", [], ["-A", "me", "-t", "2-0"], []),
    ],
)
def test_what_a_partition_does_not_allow_is_a_doubt(
    partition: str, directives: list[str], words: list[str], found: list[bool]
):
    partitions = parse_partitions(TEXT)
    assert [doubt.sure for doubt in doubts(partitions[partition], directives, words)] == found
