"""The lab itself: a cluster that runs jobs, and leaves nothing behind."""

from __future__ import annotations

from tests.lab.lab import Lab


def test_a_job_runs_on_each_node(lab: Lab):
    jobs = {
        node: lab.sbatch(
            f"--nodelist={node}", f"--output={node}.out", "--wrap=echo $SLURMD_NODENAME"
        )
        for node in lab.nodes
    }
    for node, job in jobs.items():
        assert lab.until_job(job, "COMPLETED").node == node
        assert (lab.home / f"{node}.out").read_text() == f"{node}\n"
