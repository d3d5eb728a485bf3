"""The patched checkout trains on unlabeled images on a CPU, from its own folder, resumes, and is reverted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinov2_custom.cli import patches_parser as get_args_parser
from dinov2_custom.patching.main import main
from tests import processes
from tests.patches.world import patched

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
student: {{arch: vit_small, patch_size: 8, drop_path_rate: 0.3, block_chunks: 0}}
crops: {{global_crops_size: 32, local_crops_size: 16, local_crops_number: 2}}
dino: {{head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}}
optim: {{epochs: 1, warmup_epochs: 1}}
teacher: {{warmup_teacher_temp_epochs: 1}}
train: {{dataset_path: "{images}", batch_size_per_gpu: 4, num_workers: 0, output_dir: {out},
    OFFICIAL_EPOCH_LENGTH: auto}}
"""


def train(checkout, *arguments):
    """Run the checkout's own training in its folder, with this project in the environment as installed by pip."""
    env = os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("train_checkout.py"))
    return processes.run(script, *map(str, arguments), cwd=checkout, environment=env)


def test_trains_resumes_and_is_put_back(checkout, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "nested").mkdir(parents=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (7, 40, 50, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(images / "nested" / f"{number}.png")
    (images / "broken.png").write_bytes(b"nothing")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(images=images, out=out))
    before = {path: path.read_bytes() for path in checkout.rglob("*.py")}

    unpatched = train(checkout, "--config-file", config)
    assert unpatched.returncode != 0 and "xFormers is required" in unpatched.stderr

    patched(checkout)
    first = train(checkout, "--config-file", config)
    assert first.returncode == 0, first.stderr[-3000:]
    assert f"dinov2: {checkout}/dinov2/__init__.py" in first.stdout
    assert f"dinov2_custom: {REPOSITORY}/dinov2_custom/__init__.py" in first.stdout
    log = (out / "logs" / "log.txt").read_text()
    assert "epoch: 8 images, 2 iterations of 4 images" in log and "bad image skipped, 1 in this process" in log
    rows = [json.loads(line) for line in (out / "training_metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1] and all(np.isfinite(list(row.values())).all() for row in rows)
    teacher = torch.load(out / "eval" / "training_1" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert teacher["backbone.blocks.11.attn.qkv.weight"].shape == (1152, 384)

    second = train(checkout, "--config-file", config, "optim.epochs=2", "--output-dir", out)  # flags in any order
    assert second.returncode == 0, second.stderr[-3000:]
    log = (out / "logs" / "log.txt").read_text()
    assert "continues at iteration 2, 8 images per rank skipped" in log and "Starting training from iteration 2" in log
    assert (out / "eval" / "training_3" / "teacher_checkpoint.pth").is_file()

    assert main(get_args_parser().parse_args([str(checkout), "--revert"])) == 0
    assert {path: path.read_bytes() for path in checkout.rglob("*.py")} == before
