"""Two real processes (gloo): reduced gradients, and a run whose result does not depend on the number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov2_custom import parallel
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.parallel import GradientReducer, _grouped
from dinov2_custom.sharding import reduce_dtype
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import TINY, tiny_config
from tests.train.test_train import weights, write_images

REPOSITORY = Path(__file__).resolve().parents[1]


def test_buckets_hold_every_parameter_once_in_order():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (10, 300, 5, 5, 5)]
    parameters.append(nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    runs = list(_grouped(parameters, max_bytes=64))
    assert [[p.numel() for p in run] for run in runs] == [[10], [300], [5, 5, 5], [3]]


def test_one_process_needs_nothing():
    p = nn.Parameter(torch.ones(2))
    reducer = GradientReducer([p])
    reducer.arm()
    (p.sum() * 3).backward()
    reducer.finish()
    assert torch.equal(p.grad, torch.full((2,), 3.0))


def launch(processes: int, *command: str, timeout: float = 240) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command)
    options = {"env": env, "cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": timeout}
    done = subprocess.run([sys.executable, *command], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_two_processes_average_whatever_each_of_them_used(tmp_path):
    script = tmp_path / "reduce.py"
    script.write_text(
        """
import json, sys, torch
from torch import nn
from dinov2_custom import distributed
from dinov2_custom.parallel import GradientReducer
distributed.enable()
rank = distributed.get_global_rank()
both, one, none = (nn.Parameter(torch.ones(3)) for _ in range(3))
reducer = GradientReducer([both, one, none], bucket_mib=1e-6)
(both.sum() * 10).backward()            # accumulated before, not reduced yet
reducer.arm()
loss = (both.sum() * (rank + 1)) if rank else (both.sum() + one.sum() * 4)
loss.backward()
reducer.finish()
if rank == 0:
    json.dump([both.grad.tolist(), one.grad.tolist(), none.grad], open(sys.argv[1], "w"))
distributed.disable()
"""
    )
    launch(2, str(script), str(tmp_path / "out.json"))
    both, one, none = json.loads((tmp_path / "out.json").read_text())
    assert (both, one, none) == ([11.5] * 3, [2.0] * 3, None)


def tiny_run(images: Path, *options: str, strategy: str = "auto", dtype: str = "fp32") -> list[str]:
    """Return the command of a run whose result may not depend on how its batches are cut."""
    parts = [
        f"compute_precision.{m}.{p}" for m in ("student", "teacher") for p in ("backbone", "dino_head", "ibot_head")
    ]
    precision = [f"{part}.mixed_precision.param_dtype={dtype}" for part in parts]
    sharding = [f"{part}.sharding_strategy={strategy}" for part in parts]
    return [
        "run/train/train.py", f"train.dataset_path={images}", *TINY, *precision, *sharding, "train.num_workers=0",
        "train.OFFICIAL_EPOCH_LENGTH=10", "optim.epochs=1", "optim.warmup_epochs=0.3", "train.log_every=1",
        "optim.freeze_last_layer_epochs=0", "dino.koleo_loss_weight=0", *options,
    ]  # fmt: skip


def compare(one: Path, other: Path) -> tuple[float, float]:
    """Return the largest difference of a weight, and of a loss relative to the loss."""
    first, second = weights(one), weights(other)
    apart = max(float((first[key] - second[key]).abs().max()) for key in first)
    rows = [json.loads(line) for line in (one / "training_metrics.json").read_text().splitlines()]
    others = [json.loads(line) for line in (other / "training_metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in others]
    names = [name for name in rows[0] if name.endswith("_loss")]
    losses = (abs(b[name] / a[name] - 1) for a, b in zip(rows, others, strict=True) for name in names if a[name])
    return apart, max(losses)


CUTS = [  # processes, accumulated batches, strategy, centering, activation checkpointing, groups of views
    (2, 1, "NO_SHARD", "sinkhorn_knopp", "selective", 4),
    (2, 1, "SHARD_GRAD_OP", "sinkhorn_knopp", "selective", 4),
    (2, 2, "SHARD_GRAD_OP", "centering", "full", 2),
    (2, 1, "FULL_SHARD", "centering", "full", 4),
    (4, 1, "FULL_SHARD", "centering", "selective", 1),
    (4, 1, "NO_SHARD", "sinkhorn_knopp", "none", 2),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a function that trains in one process with a batch of 8, once for the same options."""
    folder, done = tmp_path_factory.mktemp("alone"), {}
    images = write_images(folder / "images", 12)

    def train(*options: str) -> tuple[Path, Path]:
        if options not in done:
            done[options] = folder / str(len(done))
            command = tiny_run(images, *options, "train.batch_size_per_gpu=8")
            launch(1, *command, "--output-dir", str(done[options]))
        return images, done[options]

    return train


@pytest.mark.parametrize(("processes", "accumulated", "strategy", "centering", "recompute", "groups"), CUTS)
def test_however_a_batch_is_cut_losses_and_weights_are_the_same(
    alone, tmp_path, processes, accumulated, strategy, centering, recompute, groups
):
    """Lean blocks on both sides; sharding, groups of views and checkpointing on one."""
    options = [f"train.centering={centering}", "ibot.separate_head=true"]
    images, expected = alone(*options)
    cut = [f"train.batch_size_per_gpu={8 // processes // accumulated}", f"optim.accumulation_steps={accumulated}"]
    cut += [f"train.activation_checkpointing={recompute}", f"train.view_groups={groups}"]
    command = tiny_run(images, *options, *cut, strategy=strategy)
    done = launch(processes, *command, "--output-dir", str(tmp_path / "out"))
    assert f"{processes} processes, backbone={strategy} dino_head={strategy} ibot_head={strategy}" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    apart, losses = compare(expected, tmp_path / "out")
    assert apart < 1e-5 and losses < 1e-5, (apart, losses)
    start = SSLMetaArch(load_run_config(expected / "config.yaml", [], "unused", require_dataset=False)).state_dict()
    final = weights(expected)
    moved = max(float((final[name] - value).abs().max()) for name, value in start.items() if name.startswith("student"))
    assert moved > 1e-3


@pytest.mark.parametrize("dtype", ["bf16"])
def test_sharding_does_not_change_lower_precision(tmp_path, dtype):
    images = write_images(tmp_path / "images", 12)
    for strategy in ("NO_SHARD", "FULL_SHARD"):
        command = tiny_run(images, "optim.epochs=3", strategy=strategy, dtype=dtype)
        launch(2, *command, "--output-dir", str(tmp_path / strategy))
    apart, losses = compare(tmp_path / "NO_SHARD", tmp_path / "FULL_SHARD")
    assert apart < 1e-5 and losses < 1e-5, (apart, losses)


def test_auto_shards_what_does_not_fit(monkeypatch):
    model = SSLMetaArch(tiny_config())
    needed = 20 * sum(p.numel() for p in model.student.parameters())
    monkeypatch.setattr(parallel.distributed, "get_global_size", lambda: 2)
    for room, expected in ((4.1 * needed, "NO_SHARD"), (3.9 * needed, "SHARD_GRAD_OP")):
        monkeypatch.setattr(parallel, "_device_bytes", lambda device, room=room: room)
        assert set(parallel.choose_strategies(model.cfg, model).values()) == {expected}
    monkeypatch.setattr(parallel.distributed, "get_global_size", lambda: 1)
    assert set(parallel.choose_strategies(model.cfg, model).values()) == {"NO_SHARD"}


def test_fp16_sums_need_the_loss_scaler():
    dtypes = [(name, param) for name in ("auto", "fp16", "bf16") for param in (torch.float16, torch.bfloat16)]
    found = [reduce_dtype(*pair) for pair in dtypes]
    assert found == [torch.float32, torch.float32, torch.float16, torch.float32, torch.bfloat16, torch.bfloat16]
