"""Complete runs in two processes: checkpoints written in a thread during other saves, no thread outliving the run, and
data-loading processes that start before the first collective."""

from tests.processes import launch
from tests.train.batches import TINY
from tests.train.test_checkpoint import names
from tests.train.test_train import write_images

SCRIPT = """
import os, sys, time
from pathlib import Path
from dinov2_custom import entry
from dinov2_custom.train import checkpoint, train
write = checkpoint.write_pieces

def write_slowly(*args):
    time.sleep(0.3 * int(os.environ["RANK"]))
    return write(*args)

checkpoint.write_pieces = write_slowly
code = entry.run("dinov2_custom.train.train", train.get_args_parser().parse_args())
threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
os.write(1, f"left: {[name for name in threads if 'gloo' in name]}\\n".encode())  # at once: the processes share it
entry.leave(code)
"""


def test_saving_in_a_thread_beside_other_saves_and_no_thread_of_a_process_group_at_the_end(tmp_path):
    """Teachers are saved at every step, so that one is due while the thread communicates with the other process."""
    (tmp_path / "run.py").write_text(SCRIPT)
    options = [
        f"train.dataset_path={write_images(tmp_path / 'images', 12)}",
        *TINY,
        "train.num_workers=0",
        "train.max_steps=12",
    ]
    options += ["checkpointing.async_save=true", "checkpointing.period=2"]
    options += ["evaluation.eval_period_iterations=1", "--output-dir", str(tmp_path / "out")]
    done = launch(2, str(tmp_path / "run.py"), *options)
    assert [line for line in done.stdout.splitlines() if line.startswith("left:")] == ["left: []"] * 2
    assert "Traceback" not in done.stderr, done.stderr
    complete = [f"model_{iteration:07d}" for iteration in (5, 7, 9)]
    assert [name for name in names(tmp_path / "out") if name.startswith("model_")] == [*complete, "model_final"]


FORKS = """
import os
import torch.distributed as dist
from dinov2_custom import distributed, entry
from dinov2_custom.data.pool import Ring
from dinov2_custom.data.pool import AutoWorkers
from dinov2_custom.train import train
distributed.share_of_cores = lambda: 4
AutoWorkers.STEPS, AutoWorkers.WARM_UP = 2, 1
events, start, reduce, grow = [], Ring._start, dist.all_reduce, Ring.grow
Ring._start = lambda *args: events.append("fork") or start(*args)
Ring.grow = lambda ring, _: events.append("grow") or grow(ring, 4)
dist.all_reduce = lambda *args, **kwargs: events.append("reduce") or reduce(*args, **kwargs)
code = entry.run("dinov2_custom.train.train", train.get_args_parser().parse_args())
forks = [i for i, event in enumerate(events) if event == "fork"]
before = max(forks) < events.index("reduce") < events.index("grow")
os.write(1, f"forks: {len(forks)} before: {before}\\n".encode())  # at once: the processes share it
entry.leave(code)
"""


def test_data_loading_processes_are_forked_before_the_first_collective(tmp_path):
    """Memory that nccl has registered with some networks does not survive a fork."""
    (tmp_path / "run.py").write_text(FORKS)
    options = [f"train.dataset_path={write_images(tmp_path / 'images', 12)}", *TINY, "train.num_workers=auto"]
    done = launch(2, str(tmp_path / "run.py"), *options, "train.max_steps=6", "--output-dir", str(tmp_path / "out"))
    assert [line for line in done.stdout.splitlines() if "forks:" in line] == ["forks: 4 before: True"] * 2
