"""The configuration files of a lab as text. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.place import Place

CPUS_PER_NODE = 16


REQUEUE_DELAY_S = 8  # a requeued job waits for the credentials of its first run to expire

# (name, more) of the partitions; all are on all nodes.
PARTITIONS = (
    ("main", "Default=YES PriorityTier=1 PreemptMode=OFF"),
    ("low", "PriorityTier=1 PreemptMode=REQUEUE"),
    ("high", "PriorityTier=10 PreemptMode=OFF"),
    ("quick", "PriorityTier=1 PreemptMode=OFF MaxTime=1"),
    ("staff", "PriorityTier=1 PreemptMode=OFF AllowAccounts=staff"),
)


def slurm_conf(place: Place, user: str, changes: Mapping[str, object]) -> str:
    """One machine may play all nodes, so each has a port of its own, and a name that says so.
    ``changes`` are settings in Slurm's own names.
    """
    settings = {**_settings(place, user), **changes}
    nodes = ",".join(place.nodes)
    return "\n".join(
        [
            *(f"{key}={value}" for key, value in settings.items()),
            *(
                f"NodeName={name} NodeHostname=localhost NodeAddr={address}"
                f" Port={place.node_ports[name]} CPUs={CPUS_PER_NODE} RealMemory=4000"
                for name, address in place.nodes.items()
            ),
            *(f"PartitionName={name} Nodes={nodes} {more}" for name, more in PARTITIONS),
            "",
        ]
    )


def _settings(place: Place, user: str) -> dict[str, object]:
    folder = place.folder
    return {
        "ClusterName": place.cluster,
        "SlurmctldHost": f"localhost({place.login})",
        "SlurmctldPort": place.control_port,
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge/socket,cred_expire={REQUEUE_DELAY_S}",
        "StateSaveLocation": f"{folder}/slurmctld",
        "SlurmctldPidFile": f"{folder}/slurmctld/pid",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdSpoolDir": f"{folder}/%n",
        "SlurmdPidFile": f"{folder}/%n/pid",
        "SlurmdLogFile": f"{folder}/log/slurmd-%n.log",
        "SlurmdParameters": "config_overrides",  # nodes may claim more than this machine has
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "JobCompType": "jobcomp/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "MailProg": "/bin/true",
        "PropagateResourceLimits": "NONE",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerParameters": "bf_interval=1,sched_interval=1,batch_sched_delay=0"
        ",sched_min_interval=0",
        "PriorityType": "priority/basic",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "EnforcePartLimits": "NO",
        "OverTimeLimit": 0,
        "KillWait": 2,
        "MinJobAge": 60,
        "ReturnToService": 1,  # a node set down by hand stays down
    }


@dataclass(frozen=True, slots=True)
class Sshd:
    """What differs between the ssh servers of a lab."""

    listen: Sequence[str]  # address:port
    host_key: Path
    authorized_keys: Path
    environment: Mapping[str, str]
    pam: bool = False


# The lab's home instead of the user's own: $HOME is set, but sshd starts commands in the real one.
_FORCED = (
    'cd "$HOME"; [ "$SSH_ORIGINAL_COMMAND" ] && exec "$SHELL" -c "$SSH_ORIGINAL_COMMAND";'
    ' exec "$SHELL" -l'
)


def sshd_config(server: Sshd, extra: Sequence[str] = ()) -> str:
    """``extra`` comes first, because sshd takes the first value that it reads of a setting."""
    environment = " ".join(f'"{name}={value}"' for name, value in server.environment.items())
    return "\n".join(
        [
            *extra,
            *(f"ListenAddress {where}" for where in server.listen),
            f"HostKey {server.host_key}",
            f"AuthorizedKeysFile {server.authorized_keys}",
            "AuthenticationMethods publickey",
            "PermitRootLogin prohibit-password",
            f"UsePAM {'yes' if server.pam else 'no'}",
            "StrictModes no",  # the keys lie below /tmp
            "PidFile none",
            "PrintMotd no",
            "PrintLastLog no",
            "UseDNS no",
            "LogLevel VERBOSE",
            f"SetEnv {environment}",
            f"ForceCommand {_FORCED}",
            "",
        ]
    )
