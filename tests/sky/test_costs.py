"""The estimate: operations as torch counts them, hours and dollars as a hand would reckon them."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.sky.conftest import REPOSITORY
from tests.sky.rules import candidates
from tests.train.batches import random_batch, tiny_config

SCRIPT = REPOSITORY / "sky" / "costs.py"
VITL = str(REPOSITORY / "configs" / "vitl.yaml")


@pytest.fixture(scope="module")
def costs():
    spec = importlib.util.spec_from_file_location("sky_costs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=600)


def attention_flop(query, key, value, *args, out_shape=None, **kwargs) -> int:
    (batch, heads, tokens, width), others = query, key[2]
    return 4 * batch * heads * tokens * others * width


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["ibot.separate_head=true", "student.ffn_layer=swiglufused", "student.num_register_tokens=2"],
        ["ibot.loss_weight=0", "ibot.mask_sample_probability=0", "crops.local_crops_number=6"],
    ],
)
def test_operations_are_those_torch_counts_in_forward_passes(costs, overrides):
    cfg = tiny_config(
        "student.arch=vit_micro", "crops.global_crops_size=32", "crops.local_crops_size=16", "student.patch_size=8",
        "ibot.mask_ratio_min_max=[0.3,0.3]", *overrides,
    )  # fmt: skip
    images, width = 32, 128
    model = SSLMetaArch(cfg).eval()
    batch = random_batch(cfg, batch=images)
    masked = round(2 * images * 16 * 0.3 * cfg.ibot.mask_sample_probability)  # of 16 patches of two crops

    def count(network, views: list[torch.Tensor]) -> int:
        attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop}  # torch has the GPU's
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention) as counter:
            for view in views:
                network["backbone"](view, is_training=True)
            network["dino_head"](torch.zeros(sum(map(len, views)), width))
            if masked:
                network["ibot_head" if cfg.ibot.separate_head else "dino_head"](torch.zeros(masked, width))
        return counter.get_total_flops()

    teacher = count(model.teacher, [batch["collated_global_crops"]])
    student = count(model.student, [batch["collated_global_crops"], batch["collated_local_crops"]])
    assert costs.gflop_per_image(cfg) * images == pytest.approx((teacher + 3 * student) / 1e9, rel=0.005)


def test_dropped_paths_save_their_work(costs):
    """Figures of ViT-L/14 by hand: student blocks 567 and teacher 323 GFLOP, the rest patch embedding and heads."""
    without, dropped = (
        costs.gflop_per_image(load_run_config(VITL, [f"student.drop_path_rate={rate}"], require_dataset=False))
        for rate in (0, 0.3)
    )
    assert without - dropped == pytest.approx(0.3 * 3 * 567, rel=0.01)
    assert 0 < without - 3 * 567 - 323 < 30


def test_hours_and_dollars_by_hand():
    done = report("--config-file", VITL, "--images", "102400", "--gpus", "16", "--price", "H100=2")
    assert done.returncode == 0 and "1,000 steps x 1,024 images = 1.02 million images" in done.stdout
    assert "ESTIMATES" in done.stdout
    gflop = float(re.search(r"([\d,]+) GFLOP", done.stdout)[1].replace(",", ""))
    row = next(line for line in done.stdout.splitlines() if line.startswith("| 16 x H100 |"))
    rates, hours, spot, on_demand = (
        [float(value.replace(",", "")) for value in cell.split(" - ")] for cell in row.strip("| ").split(" | ")[1:]
    )
    assert rates == pytest.approx([16 * 989e3 * share / gflop for share in (0.2, 0.4)], rel=0.01)
    assert hours == pytest.approx([1_024_000 / rate / 3600 for rate in rates[::-1]], rel=0.05)
    assert spot == on_demand == pytest.approx([16 * 2 * value for value in hours], rel=0.05)


def test_an_epoch_of_a_fixed_length_needs_no_number_of_images():
    fixed = report("--config-file", VITL, "train.OFFICIAL_EPOCH_LENGTH=1250", "--epochs", "100")
    assert "100 epochs = 125,000 steps x 1,024 images = 128.00 million images" in fixed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "add --images N"),
        (["no.such=1", "--images", "5"], "no.such"),
        (["--images", "-4", "--gpus", "0"], "expected positive numbers, got --images -4, --gpus 0\n"),
        (["--images", "5", "--price", "H10=2"], "--price: expected some of H100, "),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = report("--config-file", VITL, *arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_forks_configuration_can_be_estimated(tmp_path):
    (tmp_path / "fork.yaml").write_text("student: {arch: vit_small}\nfork: {key: 1}\n")
    refused = report("--config-file", str(tmp_path / "fork.yaml"))
    assert refused.returncode == 1 and "--allow-unknown-keys" in refused.stderr
    done = report("--config-file", str(tmp_path / "fork.yaml"), "--allow-unknown-keys")
    assert done.returncode == 0 and "| 8 x H100 |" in done.stdout


def test_every_gpu_of_the_task_has_a_price_and_the_order_follows_from_the_prices():
    prices = yaml.safe_load((REPOSITORY / "sky" / "prices.yaml").read_text())
    assert re.fullmatch(r"20\d\d-\d\d", str(prices["prices_of"]))
    task = yaml.safe_load((REPOSITORY / "sky" / "train.yaml").read_text())
    per_image = {True: [], False: []}
    for choice in candidates(task):
        gpu = prices["gpus"][choice["accelerators"].split(":")[0]]
        kind = "spot" if choice["use_spot"] else "on_demand"
        if choice["accelerators"].endswith(":8"):
            per_image[choice["use_spot"]].append(gpu[kind] / gpu["bf16_tflops"])
    assert per_image == {kind: sorted(values) for kind, values in per_image.items()}
