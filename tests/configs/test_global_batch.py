"""optim.global_batch over any number of processes: the product is always the same, or one line says what would do."""

import pytest

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.errors import ConfigError


def load(*overrides, file=None, world_size=1):
    cfg = load_run_config(file, overrides, "out", require_dataset=False, world_size=world_size, warn=pytest.fail)
    assert cfg.train.batch_size_per_gpu * cfg.optim.accumulation_steps * world_size == cfg.optim.global_batch
    return cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps, cfg.optim.lr


@pytest.mark.parametrize(
    ("whole", "processes", "bounds", "batch", "accumulated"),
    [
        (1024, 1, [], 1024, 1),
        (1024, 16, [], 64, 1),
        (1024, 8, ["train.batch_size_per_gpu=64"], 64, 2),
        (1024, 32, ["train.batch_size_per_gpu=64"], 32, 1),  # the most at once
        (1024, 8, ["train.batch_size_per_gpu=100"], 64, 2),
        (96, 4, ["train.batch_size_per_gpu=10"], 8, 3),
        (22, 2, ["train.batch_size_per_gpu=8"], 1, 11),
        (7, 7, [], 1, 1),
        (1024, 2, ["optim.accumulation_steps=4"], 128, 4),
        (24, 1, ["optim.accumulation_steps=5"], 4, 6),  # the fewest batches
        (64, 1, ["optim.accumulation_steps=4", "train.batch_size_per_gpu=8"], 8, 8),
    ],
)
def test_the_product_is_the_global_batch(whole, processes, bounds, batch, accumulated):
    overrides = [f"optim.global_batch={whole}", "optim.base_lr=0.001", *bounds]
    assert load(*overrides, world_size=processes)[:2] == (batch, accumulated)
    assert load(*overrides, world_size=processes)[2] == pytest.approx(0.001 * (whole / 1024) ** 0.5)


def test_what_a_recipe_or_another_run_has_gives_way(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("train: {batch_size_per_gpu: 2}\noptim: {global_batch: 64, accumulation_steps: 16}\n")
    assert load(file=file, world_size=4)[:2] == (16, 1)
    assert load("train.batch_size_per_gpu=4", file=file, world_size=4)[:2] == (4, 4)


def test_without_it_nothing_changes():
    overrides = ["train.batch_size_per_gpu=3", "optim.accumulation_steps=5"]
    cfg = load_run_config("", overrides, "out", require_dataset=False, world_size=7)
    assert (cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps, cfg.optim.global_batch) == (3, 5, 0)


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (
            ["optim.global_batch=1024"],
            6,
            "(override): expected a multiple of the 6 processes, got 1024 -> start 4 or 8 processes, "
            "or for a new run set optim.global_batch=1020 or 1026",
        ),
        (["optim.global_batch=8"], 16, "got 8 -> start 8 processes, or for a new run set optim.global_batch=16"),
        (
            ["optim.global_batch=8", "optim.accumulation_steps=5"],
            2,
            "optim.accumulation_steps (override): expected at most the 4 images of a process, got 5 with "
            "optim.global_batch = 8 in 2 processes",
        ),
        (["optim.global_batch=-8"], 1, "optim.global_batch (override): expected a whole number of at least 0, got -8"),
    ],
)
def test_what_does_not_divide_is_said_with_the_other_mistakes(overrides, processes, message):
    with pytest.raises(ConfigError) as caught:
        load_run_config("", [*overrides, "student.patch_size=x"], world_size=processes, require_dataset=False)
    assert message in str(caught.value) and "student.patch_size" in str(caught.value)
