"""Whole runs on generated images, in this process: written files, rejected settings, skipped steps."""

import json
import math
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from dinov2_custom.errors import (
    COLLAPSED,
    CheckpointError,
    ConfigError,
    DataError,
    DINOv2Error,
    LaunchError,
    ResourceError,
)
from dinov2_custom.eval import knn
from dinov2_custom.eval.args import get_knn_args_parser
from dinov2_custom.logging import remove_logging
from dinov2_custom.train import get_args_parser, main
from dinov2_custom.train.checkpoint import Checkpointer
from dinov2_custom.train.run_directory import locked
from dinov2_custom.train.step_guard import StepGuard
from dinov2_custom.train.train import build_schedulers
from dinov2_custom.utils.weights import read_weights
from tests.processes import run
from tests.train.batches import TINY, tiny_config

RUN = (*TINY, "train.num_workers=0", "train.OFFICIAL_EPOCH_LENGTH=4", "optim.epochs=2", "optim.warmup_epochs=0.5")
NOT_NUMBERS_OF_TRAINING = {"iter_time", "data_time", "images_per_s", "tflops", "data_wait", "memory_mib"}
UPSTREAM_KEYS = [
    "iteration", "iter_time", "data_time", "lr", "wd", "mom", "last_layer_lr", "current_batch_size", "total_loss",
    "dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss",
]  # fmt: skip


def write_images(folder: Path, count: int, size=(40, 30)) -> Path:
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"class_{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """Run in an empty folder, so that a file written to the working directory is detected; then close log files."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    yield
    remove_logging("dinov2")


def train(*arguments) -> int:
    return main(get_args_parser().parse_args([str(a) for a in arguments]))


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "training_metrics.json").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_weights(out / "model_final")["model"]


def test_a_run_writes_the_files_documented_in_the_readme_only(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(f"train.dataset_path={images}", *RUN, "--output-dir", out, "evaluation.eval_period_iterations=3") == 0
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == {
        ".lock",
        "config.yaml",
        "last_checkpoint",
        "logs/log.txt",
        "model_final/checkpoint.json",
        "model_final/rank_00000.safetensors",
        "training_metrics.json",
        *(f"eval/training_{i}/teacher_checkpoint.pth" for i in (2, 5, 7)),
    }
    assert list(Path.cwd().iterdir()) == []
    written = rows(out)
    assert [row["iteration"] for row in written] == [0, 7]
    assert list(written[0])[: len(UPSTREAM_KEYS)] == UPSTREAM_KEYS
    assert all(math.isfinite(value) for row in written for value in row.values())
    first = written[0]
    displayed = [first[key] for key in UPSTREAM_KEYS[-4:]]
    assert first["total_loss"] == pytest.approx(sum(displayed), rel=1e-5) and first["lr"] == 0
    log = capsys.readouterr().out
    facts = ["command: ", "device: cpu", "precision: ", "images: 12 found", "16 images", "2.7 passes", f"files: {out}"]
    facts.append("accumulated = 4, lr=")
    for fact in facts:
        assert fact in log
    assert "next: python -m dinov2_custom knn --pretrained-weights" in log  # there is no checkout here
    config = OmegaConf.load(out / "config.yaml")
    assert config.optim.lr == pytest.approx(0.004 * math.sqrt(4 / 1024)) and config.train.output_dir == str(out)


def test_a_finished_run_is_unchanged_and_resumes_when_extended(images, tmp_path, capsys):
    command = [f"train.dataset_path={images}", *RUN, "--output-dir", tmp_path / "out"]
    train(*command)
    stamp = (tmp_path / "out" / "model_final" / "checkpoint.json").stat().st_mtime_ns
    assert train(*command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "model_final" / "checkpoint.json").stat().st_mtime_ns == stamp
    assert train(*command, "optim.epochs=3") == 0
    assert [row["iteration"] for row in rows(tmp_path / "out")] == [0, 7, 10, 11]


def test_two_runs_of_one_seed_are_equal_and_workers_do_not_matter(images, tmp_path):
    base = [f"train.dataset_path={images}", *RUN, "student.drop_path_rate=0.3"]
    train(*base, "--output-dir", tmp_path / "a")
    train(*base, "--output-dir", tmp_path / "b", "train.num_workers=2")
    train(*base, "--output-dir", tmp_path / "c", "train.seed=1")
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["student.backbone.pos_embed"], c["student.backbone.pos_embed"])


def test_output_dir_of_the_file_the_override_and_the_flag(images, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"train:\n  output_dir: {tmp_path / 'from_file'}\n  dataset_path: {images}\n")
    train("--config-file", file, *RUN)
    train("--config-file", file, *RUN, f"train.output_dir={tmp_path / 'from_override'}")
    train("--config-file", file, *RUN, f"train.output_dir={tmp_path / 'lost'}", "--output_dir", tmp_path / "from_flag")
    found = sorted(p.parent.name for p in tmp_path.glob("*/model_final"))
    assert found == ["from_file", "from_flag", "from_override"]
    assert not (tmp_path / "lost").exists() and list(Path.cwd().iterdir()) == []


def test_no_resume_moves_the_former_run_aside(images, tmp_path):
    out, command = tmp_path / "out", [f"train.dataset_path={images}", *RUN]
    train(*command, "--output-dir", out)
    train(*command, "--output-dir", out, "--no-resume", "train.seed=5")
    (aside,) = out.glob("previous_*")
    assert (aside / "model_final").exists() and (out / "model_final").exists()
    assert [row["iteration"] for row in rows(out)] == [0, 7]


def test_eval_only_writes_the_newest_teacher(images, tmp_path):
    out = tmp_path / "out"
    command = [f"train.dataset_path={images}", *RUN, "--output-dir", out]
    train(*command)
    assert train(*command, "--eval-only") == 0
    last = torch.load(out / "eval" / "training_7" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    manual = torch.load(out / "eval" / "manual_8" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert all(torch.equal(last[key], manual[key]) for key in last)


def test_eval_only_needs_a_checkpoint(images, tmp_path):
    with pytest.raises(CheckpointError, match="--eval-only: expected a run with a checkpoint"):
        train(f"train.dataset_path={images}", *RUN, "--output-dir", tmp_path / "out", "--eval-only")


def test_two_runs_cannot_share_a_directory(images, tmp_path):
    with locked(tmp_path):
        with pytest.raises(LaunchError, match="without an active run"):
            train(f"train.dataset_path={images}", *RUN, "--output-dir", tmp_path)
    assert train(f"train.dataset_path={images}", *RUN, "--output-dir", tmp_path) == 0


def test_a_resume_with_other_settings_names_them(images, tmp_path, capsys):
    command = [f"train.dataset_path={images}", *RUN, "--output-dir", tmp_path / "out"]
    train(*command)
    train(*command, "optim.epochs=3", "train.num_workers=1", "train.seed=7")
    log = capsys.readouterr().out
    assert "other settings than before: train.seed: 0 -> 7; optim.epochs: 2 -> 3" in log
    assert "num_workers: 0" not in log


def fail(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_first_step_without_memory_leaves_the_directory_unchanged(images, tmp_path, monkeypatch, capsys):
    command = [f"train.dataset_path={images}", *RUN, "--output-dir"]
    with monkeypatch.context() as short_of_memory:
        short_of_memory.setattr("dinov2_custom.train.train.accumulate_gradients", fail)
        with pytest.raises(ResourceError, match="lower train.batch_size_per_gpu to 4"):
            train(*command, tmp_path / "out", "train.batch_size_per_gpu=8", "optim.base_lr=0.1")
    assert train(*command, tmp_path / "out") == train(*command, tmp_path / "new") == 0
    ours, expected = weights(tmp_path / "out"), weights(tmp_path / "new")
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert [row["iteration"] for row in rows(tmp_path / "out")] == [0, 7]
    with monkeypatch.context() as short_of_memory:  # and a run that would have continued
        short_of_memory.setattr("dinov2_custom.train.train.accumulate_gradients", fail)
        with pytest.raises(ResourceError):
            train(*command, tmp_path / "out", "optim.epochs=3", "optim.base_lr=0.1", "train.batch_size_per_gpu=8")
    capsys.readouterr()
    assert train(*command, tmp_path / "out", "optim.epochs=3") == 0
    assert "other settings than before: optim.epochs: 2 -> 3\n" in capsys.readouterr().out
    assert [row["iteration"] for row in rows(tmp_path / "out")] == [0, 7, 10, 11]


def test_an_epoch_can_be_a_pass_over_the_data(images, tmp_path, capsys):
    auto = ["train.OFFICIAL_EPOCH_LENGTH=auto", "optim.epochs=1.5", "optim.warmup_epochs=0.5"]
    train(f"train.dataset_path={images}", *RUN, *auto, "--output-dir", tmp_path / "out")
    assert "epoch=3 iterations = 12 images, 1.5 epochs = 4 iterations" in capsys.readouterr().out


def test_unreadable_images_are_skipped_counted_and_listed(tmp_path, capsys):
    images = write_images(tmp_path / "images", 10)
    (images / "torn.png").write_bytes(next(images.rglob("*.png")).read_bytes()[:60])
    empty = [f"empty{i}.jpg" for i in range(9)]
    for name in empty:
        (images / name).touch()
    arguments = [f"train.dataset_path={images}", *RUN, "--output-dir", tmp_path / "out"]
    assert train(*arguments, "train.max_bad_fraction=0.5") == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(Path(row["path"]).name for row in listed) == [*empty, "torn.png"]
    assert all(row["reason"] for row in listed)
    said = [line for line in (tmp_path / "out/logs/log.txt").read_text().splitlines() if "unreadable image" in line]
    assert sorted(line.count(str(images)) for line in said) == [1] * 10, said
    with pytest.raises(DataError, match=r"at most 5\.00% unreadable images"):
        train(*arguments, "--no-resume", "train.max_bad_fraction=0.05", "optim.epochs=40")


def test_bad_images_of_a_failed_start_are_not_listed_once_repaired(tmp_path):
    images = write_images(tmp_path / "images", 10)
    sound = next(images.rglob("*.png")).read_bytes()
    bad = [*(f"empty{i}.png" for i in range(9)), "torn.png"]
    for name in bad:
        (images / name).write_bytes(sound[:60])
    listed = tmp_path / "out" / "bad_images.jsonl"
    arguments = [f"train.dataset_path={images}", *RUN, "--output-dir", tmp_path / "out", "optim.epochs=40"]
    with pytest.raises(DataError, match="unreadable images"):
        train(*arguments, "train.max_bad_fraction=0.05")
    (images / "torn.png").write_bytes(sound)
    with pytest.raises(ConfigError):
        train(*arguments, "student.arch=nonsense")
    assert len(listed.read_text().splitlines()) == 10, "a start that is refused changes nothing"
    assert train(*arguments, "train.max_bad_fraction=0.5", "optim.epochs=1") == 0
    assert sorted(Path(json.loads(line)["path"]).name for line in listed.read_text().splitlines()) == bad[:-1]


def test_a_kill_right_after_a_save_leaves_no_gap_in_the_rows(images, tmp_path, monkeypatch):
    command = [
        f"train.dataset_path={images}",
        *RUN,
        "train.log_every=1",
        "checkpointing.period=3",
        "--output-dir",
        tmp_path,
    ]
    save = Checkpointer.save

    def killed(self, iteration, **options):
        save(self, iteration, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpointer, "save", killed)
        train(*command)
    assert [row["iteration"] for row in rows(tmp_path)] == [0, 1, 2]
    assert train(*command) == 0
    assert [row["iteration"] for row in rows(tmp_path)] == list(range(8))


def test_rows_are_the_same_with_and_without_a_stop(images, tmp_path, monkeypatch):
    """This covers medians, entropies and RankMe over 20 iterations, and the count of skipped steps."""
    command = [f"train.dataset_path={images}", *RUN, "train.log_every=2", "checkpointing.period=4"]
    check, save, stop_at = StepGuard.check, Checkpointer.save, None

    def check_with_a_bad_step(self, iteration, losses, *rest):
        if iteration == stop_at:  # seen by the next step, after which the run stops
            signal.raise_signal(signal.SIGTERM)
        return check(self, iteration, losses if iteration != 3 else {k: v * math.nan for k, v in losses.items()}, *rest)

    def save_and_die(self, iteration, **options):
        save(self, iteration, **options)
        raise KeyboardInterrupt

    def numbers(name):
        return [{key: row[key] for key in row.keys() - NOT_NUMBERS_OF_TRAINING} for row in rows(tmp_path / name)]

    monkeypatch.setattr(StepGuard, "check", check_with_a_bad_step)
    assert train(*command, "--output-dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpointer, "save", save_and_die)
        train(*command, "--output-dir", tmp_path / "killed")
    for name, stop_at in (("on a row", 3), ("between rows", 2)):
        assert train(*command, "--output-dir", tmp_path / name) == 143
        assert rows(tmp_path / name)[-1]["iteration"] == stop_at + 1
    stop_at = None
    for name in ("killed", "on a row", "between rows"):
        assert train(*command, "--output-dir", tmp_path / name) == 0
        assert numbers(name) == numbers("whole"), name
    assert [row["iteration"] for row in numbers("whole")] == [0, 2, 4, 6, 7]
    assert numbers("whole")[-1]["skipped_steps"] == 1 and "rankme" in numbers("whole")[-1]


def test_a_run_that_does_not_learn_is_reported_and_again_at_the_end(images, tmp_path, capsys):
    options = ["train.log_every=1", "teacher.teacher_temp=100", "teacher.warmup_teacher_temp=100", "optim.epochs=3"]
    assert train(f"train.dataset_path={images}", *RUN, *options, "--output-dir", tmp_path) == 0
    printed = capsys.readouterr().out.splitlines()
    logged = (tmp_path / "logs" / "log.txt").read_text().splitlines()
    for lines in (printed, logged):
        said = [number for number, line in enumerate(lines) if "the run does not learn" in line]
        assert len(said) == 2 and said[1] == len(lines) - 1
        assert "[ 9/12]" in lines[said[0] + 1]  # the row that completed ten
        assert all("lower teacher.teacher_temp and" in lines[number] for number in said)
        (next_step,) = [line for line in lines if "next: " in line]
        assert "the verdict is uniform" in next_step and "knn" not in next_step
    assert [row["epoch"] for row in rows(tmp_path)] == pytest.approx([n * 4 / 12 for n in range(1, 13)], abs=1e-6)


def test_a_collapsed_run_can_stop_with_a_checkpoint_and_is_not_stopped_again(images, tmp_path, capsys):
    options = ["train.log_every=1", "teacher.teacher_temp=100", "teacher.warmup_teacher_temp=100", "optim.epochs=3"]
    command = [f"train.dataset_path={images}", *RUN, *options, "train.on_collapse=stop", "--output-dir", tmp_path]
    assert train(*command) == COLLAPSED
    *_, verdict, end = capsys.readouterr().out.splitlines()
    assert "verdict uniform" in verdict and "stopped after iteration=10" in end and "train.on_collapse=stop" in end
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000010" and rows(tmp_path)[-1]["iteration"] == 10
    assert train(*command) == 0  # the one who resumes it has read the verdict
    assert "next: the verdict is uniform" in capsys.readouterr().out
    assert [row["iteration"] for row in rows(tmp_path)] == list(range(12))


def test_the_hint_after_a_run_works_as_it_stands_beside_the_run(images, tmp_path, capsys):
    """Run both commands with their default directories."""
    assert train(f"train.dataset_path={images}", *RUN) == 0
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if "next: " in line]
    words = shlex.split(hint.partition("next: ")[2])
    arguments = [word.replace("TRAIN", str(images)).replace("VAL", str(images)) for word in words]
    arguments = arguments[arguments.index("--pretrained-weights") :]
    assert knn.main(get_knn_args_parser().parse_args([*arguments, "--num-workers", "0"])) == 0
    run, results = sorted(Path.cwd().glob("outputs/*"), key=lambda folder: (folder / "results_eval_knn.json").exists())
    assert (run / "model_final").exists() and (results / "results_eval_knn.json").exists()
    printed = capsys.readouterr().out
    assert "central 16 px" in printed and "an image is not its own neighbour" in printed  # the size of the training


def test_continuing_from_given_weights(images, tmp_path, capsys):
    command = [f"train.dataset_path={images}", *RUN, "--output-dir"]
    train(*command, tmp_path / "first")
    given = tmp_path / "first" / "eval" / "training_7" / "teacher_checkpoint.pth"
    still = ["optim.base_lr=0", "optim.min_lr=0", "student.block_chunks=2"]
    train(*command, tmp_path / "second", f"student.pretrained_weights={given}", *still)
    assert "tensors loaded into" in capsys.readouterr().out
    state, teacher = weights(tmp_path / "second"), torch.load(given, weights_only=True)["teacher"]
    assert torch.equal(state["teacher.backbone.cls_token"], teacher["backbone.cls_token"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["train.dataset_path=/nowhere/at/all"], DataError, "/nowhere/at/all"),
        ([], ConfigError, "train.dataset_path"),
        (["train.dataset_path={empty}"], DataError, "empty"),
        (["train.dataset_path={unreadable}"], DataError, "readable"),
        (["train.dataset_path={images}", "crops.local_crops_size=9"], ConfigError, "crops.local_crops_size"),
        (["train.dataset_path={images}", "student.arch=vit_smal"], ConfigError, "vit_small"),
        (["train.dataset_path={images}", "optim.warmup_epochs=9"], ConfigError, "optim.epochs"),
        (["train.dataset_path={images}", "optim.epochs=many"], ConfigError, "optim.epochs"),
        (["train.dataset_path={images}", "optim.epoch=3"], ConfigError, "optim.epochs"),
        (["train.dataset_path={images}", "--output-dir", "{file}/x"], ConfigError, "{file}"),
    ],
)
def test_bad_input_is_one_error_before_any_work(images, tmp_path, arguments, error, message):
    places = {"images": images, "empty": tmp_path / "empty", "unreadable": tmp_path / "bad", "file": tmp_path / "file"}
    places["empty"].mkdir()
    places["unreadable"].mkdir()
    (places["unreadable"] / "a.png").write_bytes(b"<html>")
    places["file"].write_text("")
    with pytest.raises(error) as caught:
        train(*RUN, "--output-dir", tmp_path / "out", *(a.format(**places) for a in arguments))
    assert isinstance(caught.value, DINOv2Error) and message.format(**places) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["student.pretrained_weights=/nowhere/w.pth"], "found nothing"),
        (["--eval-only"], "--eval-only: expected a run with a checkpoint"),
    ],
)
def test_a_start_that_is_refused_late_leaves_nothing_either(images, tmp_path, arguments, message):
    command = [f"train.dataset_path={images}", *RUN, *arguments, "--output-dir"]
    with pytest.raises(CheckpointError, match=message):
        train(*command, tmp_path / "runs" / "out")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "used" / "logs").mkdir(parents=True)
    (tmp_path / "used" / ".lock").touch()
    with pytest.raises(CheckpointError, match=message):
        train(*command, tmp_path / "used")
    assert message in (tmp_path / "used" / "logs" / "log.txt").read_text() and (tmp_path / "used" / ".lock").exists()


def test_two_processes_that_are_refused_leave_nothing(images, tmp_path):
    flags = ["--ngpus", "2", "--cpu", "student.pretrained_weights=/nowhere/w.pth", "--output-dir", str(tmp_path / "o")]
    done = run("run/train/train.py", f"train.dataset_path={images}", *RUN, *flags)
    assert done.returncode == 1 and done.stderr.count("found nothing") == 1, done.stderr
    assert not (tmp_path / "o").exists()


def test_a_bug_before_the_first_step_is_kept_in_the_log(images, tmp_path, monkeypatch):
    monkeypatch.setattr("dinov2_custom.train.train.build_optimizer", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(f"train.dataset_path={images}", *RUN, "--output-dir", tmp_path / "out")
    assert "ZeroDivisionError" in (tmp_path / "out" / "logs" / "log.txt").read_text()


def test_messages_of_listing_the_data_are_in_the_log(tmp_path):
    images = write_images(tmp_path / "images", 10)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in images.rglob("*.png")) + "s.tar!a.png\n")
    (tmp_path / "s.tar").write_text("no tar")
    train(f"train.dataset_path={tmp_path / 'list.txt'}", *RUN, "train.max_bad_fraction=0.5", "--output-dir", tmp_path)
    assert "truncated tar: " in (tmp_path / "logs" / "log.txt").read_text()


def test_another_architecture_leaves_the_run_as_it_was(images, tmp_path):
    out, command = tmp_path / "out", [f"train.dataset_path={images}", *RUN]
    train(*command, "--output-dir", out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "log.txt"}
    with pytest.raises(CheckpointError, match="another architecture"):
        train(*command, "--output-dir", out, "student.arch=vit_micro", "optim.epochs=3")
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "log.txt"}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_precision_trains_on_a_cpu(images, tmp_path, dtype):
    precision = [
        f"compute_precision.{model}.{part}.mixed_precision.param_dtype={dtype}"
        for model in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    ]
    options = ["student.drop_path_rate=0.3", "optim.epochs=8"]  # fp16 spends the first steps finding its loss scale
    train(f"train.dataset_path={images}", *RUN, *precision, *options, "--output-dir", tmp_path)
    state = read_weights(tmp_path / "model_final")
    assert (state["scaler"] is not None) == (dtype == "fp16")
    moved = state["model"]["student.backbone.blocks.0.mlp.fc1.weight"]
    assert moved.isfinite().all() and not torch.equal(moved, state["model"]["teacher.backbone.blocks.0.mlp.fc1.weight"])


def test_accumulated_batches_make_one_step(images, tmp_path, capsys):
    command = [f"train.dataset_path={images}", *RUN, "optim.accumulation_steps=2", "optim.epochs=1"]
    train(*command, "--output-dir", tmp_path / "a")
    log = capsys.readouterr().out
    assert "x 2 accumulated = 8" in log and "32 images" in log
    assert OmegaConf.load(tmp_path / "a" / "config.yaml").optim.lr == pytest.approx(0.004 * math.sqrt(8 / 1024))
    assert [row["iteration"] for row in rows(tmp_path / "a")] == [0, 3]


def test_schedules_follow_the_configuration():
    cfg = tiny_config(
        "train.OFFICIAL_EPOCH_LENGTH=10",
        "optim.epochs=4",
        "optim.warmup_epochs=1",
        "optim.freeze_last_layer_epochs=0.5",
        "teacher.warmup_teacher_temp_epochs=2",
    )
    lr, wd, momentum, temp, last_layer_lr = build_schedulers(cfg)
    assert lr[0] == 0 and lr[10] == pytest.approx(cfg.optim.lr) and lr[40] == cfg.optim.min_lr
    assert [last_layer_lr[i] for i in range(5)] == [0] * 5 and last_layer_lr[5] == lr[5] > 0
    assert (wd[0], wd[40], momentum[0], momentum[40]) == pytest.approx((0.04, 0.4, 0.992, 1))
    assert (temp[0], temp[19], temp[39]) == pytest.approx((0.04, 0.07, 0.07))
