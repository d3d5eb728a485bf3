"""Our task in submitit's executors, as in a notebook: ranks, saving after the step at time-out, arrays, scancel."""

import sys
from pathlib import Path

import torch

from tests.processes import wait_until
from tests.slurm.test_jobs import arguments, last_checkpoint
from tests.train.test_train import rows, weights

CODE = """
import sys, submitit
from pathlib import Path
from dinov2_custom.run.train.train import Trainer
from dinov2_custom.cli import train_parser as get_args_parser
args = get_args_parser().parse_args(sys.argv[3:])
executor = submitit.AutoExecutor(folder=sys.argv[1], cluster=sys.argv[2])
executor.update_parameters(nodes=1, tasks_per_node=2, cpus_per_task=2, timeout_min=10, name="submitit")
if sys.argv[2] == "local":
    print(executor.submit(Trainer(args)).results())
else:
    def train(folder):
        args.output_dir = folder
        return Trainer(args)()
    print(executor.map_array(train, [args.output_dir, args.output_dir + "_2"])[0].job_id)
"""


def submit(cluster, folder: Path, where: str, images: Path, out: Path) -> str:
    given = [str(a) for a in arguments(images, out)]
    given = given[given.index("--output-dir") :]
    (folder / "submit.py").write_text(CODE)
    return cluster.run(sys.executable, folder / "submit.py", folder / "submitit", where, *given, cwd=folder).stdout


def test_the_local_executor_gives_two_ranks_and_slurm_a_requeue_but_not_after_scancel(cluster, images, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert submit(cluster, tmp_path, "local", images, whole).splitlines()[-1] == "[0, 0]"
    assert "world_size=2" in (whole / "logs/log.txt").read_text()

    job = submit(cluster, tmp_path, "slurm", images, out).strip()
    other, cancelled = job.replace("_0", "_1"), tmp_path / "out_2"
    wait_until(lambda: last_checkpoint(out), "a checkpoint")
    cluster.run("scancel", "--signal=USR2", job)  # what submitit asks SLURM to send before the time limit
    wait_until(lambda: last_checkpoint(cancelled), "a checkpoint")
    cluster.run("scancel", other)
    wait_until(lambda: cluster.facts(job)["Restarts"] == "1", "a restart")
    cluster.wait(job)
    assert cluster.wait(other, states=["CANCELLED"])["Restarts"] == "0"  # by now it would have started again
    assert "SIGTERM received" in (cancelled / "logs/log.txt").read_text()
    log = (out / "logs/log.txt").read_text()
    assert "SIGUSR2 received" in log and "resumed from=" in log
    expected, got = weights(whole), weights(out)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert [row["iteration"] for row in rows(out)] == [row["iteration"] for row in rows(whole)]
