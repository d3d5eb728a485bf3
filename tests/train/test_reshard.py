"""Resume a run with other processes, another sharding, other workers or another batch; reshard.py has the chains."""

import math
import shutil

import pytest

from dinov2_custom.data.loaders import make_train_loader
from tests.data.pictures import make_folder, train_config
from tests.test_parallel import compare, launch, tiny_run
from tests.train.reshard import ALONE, PERIOD, STEPS, Setting, forget_after, go_through, marker, train
from tests.train.test_train import write_images


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    images = write_images(folder / "images", 12)
    train(images, folder / "out", ALONE)
    return images, folder / "out"


@pytest.mark.parametrize(
    "chain",
    [
        (ALONE, Setting(2, "FULL_SHARD"), ALONE),
        (Setting(2), Setting(1, accumulated=2), Setting(2, "SHARD_GRAD_OP")),
    ],
    ids=lambda chain: ", ".join(map(str, chain)),
)
def test_a_chain_of_settings_gives_the_weights_of_one_run(whole, tmp_path, chain):
    images, expected = whole
    go_through(images, tmp_path / "out", chain, expected)
    assert compare(expected, tmp_path / "out")[0] < 1e-5
    assert "other settings than before" not in (tmp_path / "out" / "logs" / "log.txt").read_text()
    if chain[-1].processes > 1:  # each process has written its own rows
        (alone,), sizes = (
            [fields["num_bytes"] for fields in marker(out, "model_final")["files"].values()]
            for out in (expected, tmp_path / "out")
        )
        assert len(sizes) == 2 and max(sizes) < 0.7 * alone


def test_a_resume_with_other_workers_is_bitwise_equal(whole, tmp_path):
    images, expected = whole
    go_through(images, tmp_path / "out", (ALONE, Setting(1, workers=2)), expected)
    assert compare(expected, tmp_path / "out")[0] == 0.0


def test_another_batch_size_continues_with_the_next_draw(whole, tmp_path):
    images, expected = whole
    out = tmp_path / "out"
    shutil.copytree(expected, out)
    forget_after(out, PERIOD - 1)
    assert marker(out, f"model_{PERIOD - 1:07d}")["draws"] == PERIOD * 8
    options = [f"train.OFFICIAL_EPOCH_LENGTH={STEPS}", f"checkpointing.period={PERIOD}", "train.batch_size_per_gpu=3"]
    launch(2, *tiny_run(images, *options), "--output-dir", str(out))
    drawn = {n: marker(out, f"model_{n:07d}")["draws"] for n in (7, 3)}
    assert drawn == {7: PERIOD * 8 + 4 * 6, 3: PERIOD * 8}
    assert marker(out, "model_final")["draws"] == PERIOD * 8 + 8 * 6
    (warning,) = [x for x in (out / "logs" / "log.txt").read_text().splitlines() if "other settings than before" in x]
    assert "global batch: 8 (8 per process x 1 processes) -> 6 (3 per process x 2 processes); optim.lr, by" in warning
    before, now = (0.004 * math.sqrt(images / 1024) for images in (8, 6))
    assert f"its square root: {before:.3g} -> {now:.3g}" in warning and "batch_size_per_gpu" not in warning


def test_a_far_draw_costs_no_more_than_the_first(tmp_path, monkeypatch):
    make_folder(tmp_path, [f"{i}.png" for i in range(7)])
    loader = make_train_loader(train_config(str(tmp_path)), rank=0, world_size=1)
    found, find = [], loader.builder.samples.find
    monkeypatch.setattr(loader.builder.samples, "find", lambda draw, note: found.append(draw) or find(draw, note))
    next(loader.batches(first_draw=10**15))
    assert found == [10**15, 10**15 + 1] and loader.draws == 10**15 + 2
