"""run/train/memory.py says what the count says, and finds the largest batch that fits."""

import pytest

from dinov2_custom.errors import ConfigError
from dinov2_custom.train.args import get_memory_args_parser
from dinov2_custom.train.fit import LARGEST_BATCH, fits, largest_below, main, split_on
from dinov2_custom.train.memory import SHARE_OF_TENSORS, measure_step
from tests.processes import run
from tests.train.batches import TINY, tiny_config


def memory(*arguments):
    return run("run/train/memory.py", *arguments)


def test_the_script_prints_the_count_of_each_mode():
    done = memory("--config-file", "configs/vits.yaml", "--ngpus", "4", "train.batch_size_per_gpu=16")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in done.stdout.splitlines()[2:5]}
    assert list(rows) == ["none", "selective", "full"]
    for total, *parts in rows.values():
        *categories, shared = parts
        assert total == pytest.approx(sum(categories), abs=0.03) and shared < total
    assert "train.batch_size_per_gpu=16" in done.stdout


def test_a_mistake_is_one_error():
    done = memory("train.batch_sise_per_gpu=16")
    assert done.returncode == 1 and "train.batch_size_per_gpu" in done.stderr and "Traceback" not in done.stderr


def test_a_forks_keys_can_be_kept():
    tiny = (*TINY, "daino.loss_weight=1")
    assert memory(*tiny).returncode == 1
    done = memory(*tiny, "--allow-unknown-keys")
    assert done.returncode == 0 and "note: " in done.stdout and "daino.loss_weight" in done.stdout, done.stderr


def test_the_batch_found_fits_and_the_next_does_not():
    cfg = tiny_config("dino.head_n_prototypes=65536")
    limit = measure_step(cfg, "none").peak / SHARE_OF_TENSORS / 1e9 * 1.5
    largest = dict(fits(cfg, limit))
    assert list(largest) == ["none", "selective", "full"]
    found = largest["none"]
    for batch_size, is_below in ((found, True), (found + max(1, found // 8) + 1, False)):
        larger = tiny_config("dino.head_n_prototypes=65536", f"train.batch_size_per_gpu={batch_size}")
        assert (measure_step(larger).peak <= limit * 1e9 * SHARE_OF_TENSORS) == is_below


def test_where_nothing_fits_the_command_fails(capsys):
    with pytest.raises(ConfigError, match="--fits 0.001: expected a step of one image to fit"):
        main(get_memory_args_parser().parse_args(["--fits", "0.001", *TINY]))
    assert "none: not even one image fits into 0.001 GB, 12.5% of it left free" in capsys.readouterr().out
    assert main(get_memory_args_parser().parse_args(["--fits", "100", *TINY, "train.batch_size_per_gpu=900"])) == 0
    assert "full: train.batch_size_per_gpu=1024 or more fits into 100 GB" in capsys.readouterr().out


def test_how_a_global_batch_is_divided_is_what_training_does():
    cfg = tiny_config("optim.global_batch=48", "train.batch_size_per_gpu=48")
    room = 1.01 * measure_step(tiny_config("train.batch_size_per_gpu=12")).peak / SHARE_OF_TENSORS / 1e9
    assert split_on(cfg, room, 1) == "optim.global_batch=48: 12 a process x 1 processes x 4 accumulated"


@pytest.mark.parametrize("limit", [0.5, 1, 2, 3, 7, 8, 9, 100, 1000, 1023, 1024, 5000])
@pytest.mark.parametrize("start", [0.0, 7.0])
def test_largest_below(limit, start):
    sizes = {n: start + n + (n / 100) ** 2 for n in range(1, LARGEST_BATCH + 1)}
    largest = max((n for n, size in sizes.items() if size <= limit), default=0)
    asked = []

    def size(n):
        asked.append(n)
        return sizes[n]

    got = largest_below(size, limit, (0, start), (64, sizes[64]))
    assert largest - max(1, got // 8) <= got <= largest and (got > 0) == (largest > 0)
    assert len(asked) <= 4, asked
