"""Two processes to the end: checkpoints written in a thread beside other saves, and no thread that outlives the run."""

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
print("left:", *[name for name in threads if "gloo" in name])
entry.leave(code)
"""


def test_saving_in_a_thread_beside_other_saves_and_no_thread_of_a_process_group_at_the_end(tmp_path):
    """Teachers are saved at every step, so that one is due while the thread talks to the other process."""
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
    assert [line for line in done.stdout.splitlines() if line.startswith("left:")] == ["left:"] * 2
    assert "Traceback" not in done.stderr, done.stderr
    complete = [f"model_{iteration:07d}" for iteration in (5, 7, 9)]
    assert [name for name in names(tmp_path / "out") if name.startswith("model_")] == [*complete, "model_final"]
