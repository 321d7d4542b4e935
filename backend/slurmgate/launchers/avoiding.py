"""Keeps a job off nodes: their names, and the shell text that excludes them. Pure but for the log.

An ``--exclude`` of the user's stays in force: sbatch takes the last one it is given, so theirs is
put into ours. A node that the user insists on with ``--nodelist`` is not excluded: Slurm would
never start the job. Nor is any when Slurm says that nothing is left then, or that it has no such
node any more; that is asked beforehand, because a submission that was refused stays in its list
under the name of the job.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterable, Sequence

from slurmgate.launchers import sbatch_args

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")

# The last one of a line, and of all lines, as sbatch does; a value may stand in quotes. A list with
# a slash is the name of a file of names.
_FUNCTIONS = r"""sg_own() {
  printf '%s\n' "$sg_lines" | grep -Eo \
    "(^|[[:space:]])($1[=[:space:]]|$2)[[:space:]]*(\"[^\"]*\"|'[^']*'|[^[:space:]]+)" |
    tail -n 1 | sed -E "s/^[[:space:]]*($1[=[:space:]]|$2)[[:space:]]*//" | tr -d "\"'"
}
sg_list() {
  case $1 in
    */*) sed -e 's/#.*//' -- "$1" | tr -s ',[:space:]' ',' | sed -e 's/^,//' -e 's/,$//' ;;
    *) printf '%s\n' "$1" ;;
  esac
}
"""
_OWN_EXCLUDE = """$(sg_own '--exclude?' -x)"""
_OWN_NODELIST = """$(sg_own '--nodel(i|is|ist)?' -w)"""

_MERGE = r"""sg_exclude=$(sg_list "$sg_exclude")
sg_pinned=$(sg_list "$sg_pinned")
if [ -n "$sg_pinned" ]; then
  sg_pinned=$sg_pinned,$(scontrol show hostnames "$sg_pinned" 2>/dev/null </dev/null | tr '\n' ',')
fi
for sg_node in {nodes}; do
  case ",$sg_pinned," in
    *,"$sg_node",*) ;;
    *) sg_exclude=${{sg_exclude:+$sg_exclude,}}$sg_node ;;
  esac
done
"""
_ASK = r"""sg_said=$("$sg_sbatch" --test-only {args} "--exclude=$sg_exclude" \
  "$sg_script" {port} 2>&1 </dev/null)
case $sg_said in
  *"Invalid node name"*|*"node configuration is not available"*|*"nodes not in this partition"*)
    sg_exclude= ;;
esac
"""


def nameable(names: Iterable[str]) -> tuple[str, ...]:
    """Give those that can only be the name of one node, each once; others are logged and left out.

    Brackets and commas would name several, and a slash a file.
    """
    found = dict.fromkeys(names)
    for name in [name for name in found if not _NAME.fullmatch(name)]:
        log.warning("not avoided, because that is no name of a node: %r", name[:300])
        del found[name]
    return tuple(found)


def text(args: Sequence[str], port: int, nodes: Sequence[str]) -> str:
    """Shell text that sets ``sg_exclude`` to what ``--exclude`` shall say; empty: nothing.

    ``args`` are those of sbatch, ``port`` that of the script; ``sg_lines`` has what the script
    itself says behind ``#SBATCH``.
    """
    if not nodes:
        return "sg_exclude=\n"
    exclude = sbatch_args.last_value(args, "exclude")
    pinned = sbatch_args.last_value(args, "nodelist")
    return (
        _FUNCTIONS
        + f"sg_exclude={_OWN_EXCLUDE if exclude is None else shlex.quote(exclude)}\n"
        + f"sg_pinned={_OWN_NODELIST if pinned is None else shlex.quote(pinned)}\n"
        + _MERGE.format(nodes=shlex.join(nodes))
        + _ASK.format(args=shlex.join(args), port=port)
    )
