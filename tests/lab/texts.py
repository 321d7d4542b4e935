"""The configuration files of a lab as text. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.place import Place

CPUS_PER_NODE = 16


@dataclass(frozen=True, slots=True)
class Timing:
    """Slurm's own times, in seconds."""

    min_job_age: int = 60
    slurmd_timeout: int = 300
    requeue_delay: int = 8  # a requeued job waits so long; job credentials expire as soon


def slurm_conf(place: Place, user: str, timing: Timing) -> str:
    """One machine may play all nodes, so each has a port of its own, and a name that says so."""
    folder = place.folder
    nodes = "\n".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr={address}"
        f" Port={place.node_ports[name]} CPUs={CPUS_PER_NODE} RealMemory=4000 State=UNKNOWN"
        for name, address in place.nodes.items()
    )
    everywhere = f"Nodes={','.join(place.nodes)} State=UP DefaultTime=UNLIMITED"
    return f"""\
ClusterName={place.cluster}
SlurmctldHost=localhost({place.login})
SlurmctldPort={place.control_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={timing.requeue_delay}
StateSaveLocation={folder}/slurmctld
SlurmctldPidFile={folder}/slurmctld/pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n/pid
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PriorityType=priority/basic
EnforcePartLimits=NO
OverTimeLimit=0
KillWait=2
MinJobAge={timing.min_job_age}
SlurmdTimeout={timing.slurmd_timeout}
ReturnToService=2
{nodes}
PartitionName=main Default=YES PriorityTier=1 PreemptMode=OFF {everywhere}
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE {everywhere}
PartitionName=high PriorityTier=10 PreemptMode=OFF {everywhere}
PartitionName=quick MaxTime=1 PriorityTier=1 PreemptMode=OFF {everywhere}
PartitionName=staff AllowAccounts=staff PriorityTier=1 PreemptMode=OFF {everywhere}
"""


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
