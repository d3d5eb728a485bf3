"""`--memory` and `--fits`: the count by category, and the largest batch that fits."""

import re

import pytest

from dinov2_custom.cli import plan_parser
from dinov2_custom.errors import ConfigError
from dinov2_custom.plan.main import main
from dinov2_custom.plan.memory import LARGEST_BATCH, Counts, largest_below, split_on
from dinov2_custom.train.memory import MODES, SHARE_OF_TENSORS, measure_step
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import TINY, tiny_config


@pytest.fixture
def plan(capsys):
    """Return a function that runs the command with arguments and returns what it printed."""

    def run(*arguments):
        assert main(plan_parser().parse_args(list(arguments))) == 0
        return capsys.readouterr().out

    return run


def test_the_table_has_the_count_of_each_mode(plan):
    out = plan("--memory", "--gpus", "4", *TINY, "train.batch_size_per_gpu=16")
    lines = [line.split() for line in out.splitlines()]
    rows = {line[0]: [float(cell) for cell in line[1:]] for line in lines if line[0] in MODES}
    assert list(rows) == ["none", "selective", "full"]
    for total, *parts in rows.values():
        *categories, shared = parts
        assert total == pytest.approx(sum(categories), abs=0.03) and shared <= total
    assert "train.batch_size_per_gpu=16" in out


def test_a_mistake_names_the_key(plan):
    with pytest.raises(ConfigError, match="train.batch_size_per_gpu"):
        plan("--memory", "train.batch_sise_per_gpu=16")


def test_a_forks_keys_can_be_kept(plan):
    tiny = ("--memory", *TINY, "daino.loss_weight=1")
    with pytest.raises(ConfigError, match="daino.loss_weight"):
        plan(*tiny)
    out = plan(*tiny, "--allow-unknown-keys")
    assert "note: " in out and "daino.loss_weight" in out


def test_the_batch_found_fits_and_the_next_does_not():
    cfg = tiny_config("dino.head_n_prototypes=65536")
    limit = measure_step(SSLMetaArch, cfg, "none").peak * 1.5
    found = Counts().largest(cfg, "none", limit)
    for batch_size, is_below in ((found, True), (found + max(1, found // 8) + 1, False)):
        larger = tiny_config("dino.head_n_prototypes=65536", f"train.batch_size_per_gpu={batch_size}")
        assert (measure_step(SSLMetaArch, larger).peak <= limit) == is_below


def test_where_nothing_fits_the_command_fails(plan, capsys, monkeypatch):
    with pytest.raises(ConfigError, match="--fits 0.001: expected a step of one image to fit"):
        plan("--fits", "0.001", *TINY)
    assert "none: not even one image fits into 0.001 GB, 12.5% of it left free" in capsys.readouterr().out
    monkeypatch.setattr(Counts, "largest", lambda _, cfg, mode, limit: LARGEST_BATCH * (mode == "full"))
    out = plan("--fits", "100", *TINY)
    assert "full: train.batch_size_per_gpu=1024 or more fits into 100 GB" in out


def test_how_a_global_batch_is_divided_is_what_training_does():
    cfg = tiny_config("optim.global_batch=48", "train.batch_size_per_gpu=48")
    room = 1.01 * measure_step(SSLMetaArch, tiny_config("train.batch_size_per_gpu=12")).peak / SHARE_OF_TENSORS / 1e9
    assert split_on(cfg, room, 1, Counts()) == "optim.global_batch=48: 12 per process x 1 processes x 4 accumulated"


def test_no_step_is_counted_twice(plan, monkeypatch):
    """Each takes seconds for a large network."""
    counted = []

    def count(arch, cfg, mode):
        counted.append((mode, cfg.train.batch_size_per_gpu))
        return measure_step(arch, cfg, mode)

    monkeypatch.setattr("dinov2_custom.plan.memory.measure_step", count)
    out = plan("--fits", "0.05", *TINY, "train.batch_size_per_gpu=96", "optim.global_batch=96")
    largest = [int(n) for n in re.findall(r"batch_size_per_gpu=(\d+) fits", out)]
    split = int(re.search(r"optim.global_batch=96: (\d+) per process", out)[1])
    needed = {(mode, 96) for mode in MODES} | {*zip(MODES, largest, strict=True), ("none", split)}
    assert sorted(counted) == sorted(needed)


@pytest.mark.parametrize("limit", [0.5, 1, 2, 3, 7, 8, 9, 100, 1000, 1023, 1024, 5000])
@pytest.mark.parametrize("start", [0.0, 7.0])
def test_largest_below(limit, start):
    sizes = {n: start + n + (n / 100) ** 2 for n in range(1, LARGEST_BATCH + 1)}
    largest = max((n for n, size in sizes.items() if size <= limit), default=0)
    asked = []

    def size(n):
        asked.append(n)
        return sizes[n]

    got = largest_below(size, limit, {0: start, 64: sizes[64]})
    assert largest - max(1, got // 8) <= got <= largest and (got > 0) == (largest > 0)
    assert len(asked) <= 4, asked
