"""Draw -> sample -> batch as pure functions, and the counting of bad images."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.data.datasets import ImageDataset
from dinov2_custom.data.datasets.extended import ExtendedVisionDataset
from dinov2_custom.data.holdout import IndexSubset
from dinov2_custom.data.loaders import make_augmentation
from dinov2_custom.data.samples import BadImages, TrainSample, TrainSamples
from dinov2_custom.errors import DataError
from tests.data.pictures import encode, make_folder, picture, train_config

JPEG = encode(picture(20, 16), "JPEG")
BAD = {
    "text.jpg": b"this is no picture",
    "empty.png": b"",
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "head.jpeg": JPEG[:30],
    "noise.tif": bytes(range(256)),
    "page.webp": b"<html></html>",
}


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path, [f"good/{i}.png" for i in range(9)])
    return tmp_path


def spoil(folder, names=BAD):
    (folder / "bad").mkdir(exist_ok=True)
    for name in names:
        (folder / "bad" / name).write_bytes(BAD[name])


def make(folder, seed=0) -> TrainSamples:
    return TrainSamples(ImageDataset(folder), make_augmentation(train_config(str(folder))), seed)


def sample(samples: TrainSamples, draw: int) -> TrainSample:
    found = samples[draw]
    return found if found.pixels is None else found._replace(pixels=found.pixels.clone())


def equal(a: TrainSample, b: TrainSample) -> bool:
    return (a.draw, a.crops, a.bad) == (b.draw, b.crops, b.bad) and torch.equal(a.pixels, b.pixels)


def test_sample_is_a_function_of_seed_and_draw(folder):
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    samples, again = make(folder), make(folder)
    drawn = [sample(samples, draw) for draw in range(12)]
    assert all(equal(drawn[draw], again[draw]) for draw in reversed(range(12)))
    assert not equal(drawn[3], make(folder, seed=1)[3])
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state


def test_a_pass_draws_every_image_once_and_the_next_in_another_order(folder):
    samples = make(folder)
    passes = [[samples.image_of(p * 9 + i) for i in range(9)] for p in range(3)]
    assert all(sorted(one) == list(range(9)) for one in passes) and passes[0] != passes[1]


def test_the_same_image_gets_other_crops_in_the_next_pass(folder):
    samples = make(folder)
    first = samples.image_of(0)
    later = next(draw for draw in range(9, 18) if samples.image_of(draw) == first)
    assert samples[0].crops[0] != samples[later].crops[0]


def test_bad_files_of_many_kinds_are_replaced_and_named(folder):
    spoil(folder)
    (folder / "bad" / "nowhere.jpg").symlink_to(folder / "not there.jpg")
    samples = make(folder)
    drawn = [samples[draw] for draw in range(16)]
    assert all(sample.pixels is not None for sample in drawn)
    first = [sample.bad[0] for sample in drawn if sample.bad]
    assert sorted(path for _, path, _ in first) == sorted(str(folder / "bad" / n) for n in [*BAD, "nowhere.jpg"])
    for draw, path, reason in (record for sample in drawn for record in sample.bad):
        assert path in reason and reason.startswith("expected") and 0 <= draw < 16


def test_replacement_depends_only_on_seed_and_draw(folder):
    spoil(folder)
    forwards, backwards, restarted = make(folder), make(folder), make(folder)
    expected = [sample(forwards, draw) for draw in range(30)]
    assert all(equal(backwards[draw], expected[draw]) for draw in reversed(range(30)))
    assert all(equal(restarted[draw], expected[draw]) for draw in range(20, 30))


def test_replacements_go_through_the_whole_dataset(folder):
    samples = make(folder)
    for draw in range(5):
        assert sorted(samples.image_of(draw, attempt) for attempt in range(1, 10)) == list(range(9))
    assert samples.image_of(0, 1) != samples.image_of(1, 1) or samples.image_of(0, 2) != samples.image_of(1, 2)


def test_one_good_image_among_bad_ones_is_found(tmp_path):
    make_folder(tmp_path, ["only.png"])
    spoil(tmp_path)
    samples = make(tmp_path)
    samples.probe()
    assert all(samples[draw].pixels is not None for draw in range(14))


def test_bad_image_is_not_read_again(folder):
    spoil(folder, ["text.jpg"])
    samples = make(folder)
    draw = next(draw for draw in range(10) if samples[draw].bad)
    reads = []
    samples.dataset.get_image_data = lambda index: reads.append(index) or ImageDataset.read(samples.dataset, index)
    assert samples[draw].bad and samples.image_of(draw) not in reads and len(reads) == 1


def test_errors_of_reading_other_datasets_count_as_bad_and_mistakes_do_not(folder):
    class Flaky(ImageDataset):
        def __getitem__(self, index):
            if index == 0:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    class Mistaken(ImageDataset):
        def __getitem__(self, index):
            raise KeyError("a mistake in the code")

    samples = TrainSamples(Flaky(folder), make_augmentation(train_config("")), 0)
    draw = next(draw for draw in range(9) if samples.image_of(draw) == 0)
    assert samples[draw].bad[0][2] == "the disk is gone" and samples[draw].pixels is not None
    with pytest.raises(KeyError, match="a mistake"):
        TrainSamples(Mistaken(folder), make_augmentation(train_config("")), 0)[0]


def test_probe_refuses_a_dataset_without_a_readable_image(tmp_path):
    spoil(tmp_path)
    with pytest.raises(DataError, match="cut.jpg.*train.dataset_path"):
        make(tmp_path).probe()


def test_probe_looks_beyond_a_bad_folder(tmp_path, monkeypatch):
    make_folder(tmp_path, [f"z/{i:03d}.png" for i in range(50)], 4, 4)
    (tmp_path / "a").mkdir()
    for i in range(50):
        (tmp_path / "a" / f"{i}.jpg").write_bytes(b"broken")
    make(tmp_path).probe()


def test_draw_without_readable_image_reports_only_its_failures(tmp_path):
    spoil(tmp_path)
    found = make(tmp_path)[4]
    assert found.pixels is None and found.crops == []
    assert {draw for draw, _, _ in found.bad} == {4} and len({path for _, path, _ in found.bad}) == len(BAD)


def test_images_are_noted_before_they_are_tried(folder):
    spoil(folder)
    samples, noted = make(folder), []
    found = next(s for s in (samples.find(n, noted.append) for n in range(15)) if s.bad)
    assert noted[-len(found.bad) - 1 :] == [samples.image_of(found.draw, i) for i in range(len(found.bad) + 1)]


def test_an_image_that_was_given_up_is_replaced(folder):
    samples = make(folder)
    samples.give_up(samples.image_of(3), "killed two processes")
    found = samples[3]
    assert found.pixels is not None and found.bad == [
        (3, samples.dataset.name(samples.image_of(3)), "killed two processes")
    ]


def test_pixels_come_straight_from_the_bytes_and_are_the_datasets(tmp_path):
    make_folder(tmp_path, ["a.png", "b.jpg", "c.webp"])
    plain = ImageDataset(tmp_path)

    class Turned(ImageDataset):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image.transpose(Image.Transpose.ROTATE_90), target

    class Own(ExtendedVisionDataset):
        def get_pixels(self, index, shrink, scratch):
            return np.full((4, 5, 3), index, np.uint8)

        def __len__(self):
            return 3

    transformed = ImageDataset(tmp_path, transform=lambda image: image.convert("L"))
    subset = IndexSubset(plain, np.array([2, 0]))
    for dataset in (plain, Turned(tmp_path), transformed, subset):
        samples = TrainSamples(dataset, make_augmentation(train_config("")), 0)
        for index in range(len(dataset)):
            pixels, reason = samples.load(index)
            np.testing.assert_array_equal(pixels, np.asarray(dataset[index][0].convert("RGB")))
            assert reason == ""
    assert TrainSamples(Own(), make_augmentation(train_config("")), 0).load(2)[0].tolist() == [[[2] * 3] * 5] * 4


def test_everything_a_worker_needs_can_be_pickled(folder):
    samples = make(folder)
    samples.load(0)
    assert equal(samples[5], pickle.loads(pickle.dumps(samples))[5])


def test_each_bad_image_is_reported_once():
    told = []
    account = BadImages(10_000, 0.5, lambda *story: told.append(story))
    account.add(64, [(0, "a.jpg", "why"), (0, "b.jpg", "why not"), (7, "a.jpg", "why")])
    account.add(64, [(70, "b.jpg", "why not")])
    assert told == [("a.jpg", "why"), ("b.jpg", "why not")] and account.num_bad_draws == 3


def test_without_a_callback_bad_images_are_logged(caplog):
    BadImages(10_000, 0.5).add(64, [(0, "a.jpg", "why"), (1, "b.jpg", "got an empty file: b.jpg")])
    said = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert said == ["a.jpg: why", "got an empty file: b.jpg"], "each path once"


def test_too_many_bad_draws_stop_with_the_worst_folder():
    account = BadImages(10_000, 0.02, lambda *story: None)
    account.add(99, [(i, f"/data/scans/{i}.jpg", "cut") for i in range(9)])
    with pytest.raises(DataError) as e:
        account.add(101, [(100, "/data/photos/1.jpg", "cut")])
    for words in (
        "at most 2.00%",
        "train.max_bad_fraction",
        "10 of 200 draws",
        "10 different files",
        "(9) in /data/scans",
    ):
        assert words in str(e.value)


def test_few_bad_draws_up_to_the_limit_are_allowed():
    account = BadImages(10_000, 0.02, lambda *story: None)
    account.add(100, [(0, "a", "b"), (1, "c", "d")])
    account.add(100, [(150, "a", "b"), (151, "c", "d")])
    assert account.num_draws == 200


def test_tiny_dataset_is_checked_after_one_pass():
    account = BadImages(30, 0.05, lambda *story: None)
    account.add(29, [(i, f"{i}.jpg", "b") for i in range(10)])
    with pytest.raises(DataError, match="10 of 30 draws"):
        account.add(1, [])


def test_a_few_bad_files_never_end_a_run():
    account = BadImages(40, 0.0, lambda *story: None)
    for draw in range(500):
        account.add(1, [(draw, f"{draw % 9}.jpg", "b")])
    assert account.num_bad_draws == 500
