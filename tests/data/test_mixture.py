"""Mixtures: exact shares, every image once per pass of its dataset, pure functions of (seed, draw)."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from dinov2_custom.data.holdout import IndexSubset, split
from dinov2_custom.data.loaders import make_dataset, make_train_loader
from dinov2_custom.data.mixture import Mixture, Shares
from dinov2_custom.data.samplers import permuted_index
from dinov2_custom.data.samples import TrainSamples
from dinov2_custom.errors import ConfigError, DataError
from tests.data.pictures import encode, make_folder, picture, train_config
from tests.data.test_tar_shards import write


class Numbers:
    """A dataset of ``size`` samples ("<letter><number>", 7)."""

    def __init__(self, letter: str, size: int):
        self.letter, self.size = letter, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int):
        return self.name(i), 7

    def name(self, i: int) -> str:
        return f"{self.letter}{i}"


def mixture(weights=(5, 2, 1), sizes=(40, 7, 30)) -> Mixture:
    return Mixture([Numbers(x, n) for x, n in zip("abc", sizes, strict=True)], "abc", weights)


@pytest.mark.parametrize("weights", [
    [0.7, 0.3], [1, 1], [1, 1, 1], [41, 12, 4.5, 3.5], [1] * 8, [0.9, *[0.01] * 10], [1e-6, 1], [0.123, 0.456, 0.789],
])  # fmt: skip
def test_every_prefix_has_exact_shares(weights):
    shares, counts = Shares(weights), [0] * len(weights)
    assert shares.bound < 1.5 and (len(weights) > 2 or shares.bound == 0.5)
    assert shares.shares == pytest.approx(np.array(weights) / sum(weights))
    worst = 0.0
    for draw in range(3000):
        part, before = shares.at(draw)
        assert before == counts[part]
        counts[part] += 1
        worst = max(worst, *(abs(c - s * (draw + 1)) for c, s in zip(counts, shares.shares, strict=True)))
    assert worst <= shares.bound + 1e-9


def test_any_window_of_two_datasets_is_within_one_draw():
    shares = Shares([0.37, 0.63])
    counts = np.cumsum([0] + [shares.at(draw)[0] == 0 for draw in range(2000)])
    for length in (1, 7, 100, 501):
        windows = counts[length:] - counts[:-length]
        assert np.abs(windows - 0.37 * length).max() < 1


def test_shares_do_not_drift_however_far():
    shares, far = Shares([0.7, 0.2, 0.1]), 10**15
    drawn = Counter(shares.at(far + i)[0] for i in range(1000))
    assert drawn == {0: 700, 1: 200, 2: 100}
    assert [shares.at(far)[1] - shares.at(0)[1]] == [far * 7 // 10]


def test_every_dataset_goes_through_its_images_once_a_pass():
    mixed = mixture()
    names = [mixed.name(mixed.index_of_draw(draw, seed=3)) for draw in range(8 * 120)]
    for letter, size, number in (("a", 40, 600), ("b", 7, 240), ("c", 30, 120)):
        own = [name for name in names if name[0] == letter]
        assert len(own) == number
        for start in range(0, number - size + 1, size):
            assert len(set(own[start : start + size])) == size
        assert own[:size] != own[size : 2 * size]


def test_draws_are_a_function_of_seed_and_number():
    mixed, same = mixture(), pickle.loads(pickle.dumps(mixture()))
    orders = [[m.index_of_draw(draw, seed) for draw in range(200)] for m, seed in ((mixed, 1), (same, 1), (mixed, 2))]
    assert orders[0] == orders[1] != orders[2]
    assert [same.index_of_draw(draw, 1) for draw in reversed(range(200))] == orders[0][::-1]


def test_by_size_is_one_pooled_pass():
    pooled = mixture(weights=None)
    assert [pooled.index_of_draw(draw, 4) for draw in range(99)] == [permuted_index(draw, 77, 4) for draw in range(99)]
    assert pooled.shares() == [("a", 40, 40 / 77), ("b", 7, 7 / 77), ("c", 30, 30 / 77)]
    assert mixture().shares() == [("a", 40, 5 / 8), ("b", 7, 2 / 8), ("c", 30, 1 / 8)]


def test_replacements_come_from_the_same_dataset_and_reach_all_of_it():
    mixed = mixture()
    draw = next(draw for draw in range(99) if mixed.name(mixed.index_of_draw(draw, 0))[0] == "b")
    replacements = [mixed.name(mixed.index_of_draw(draw, 0, attempt)) for attempt in range(1, 8)]
    assert sorted(replacements) == [f"b{i}" for i in range(7)]


def test_training_uses_the_draws_of_the_mixture():
    mixed = mixture()
    samples = TrainSamples(mixed, None, seed=5)
    assert [samples.image_of(draw) for draw in range(50)] == [mixed.index_of_draw(draw, 5) for draw in range(50)]
    assert samples.image_of(3, 2) == mixed.index_of_draw(3, 5, 2)
    plain = TrainSamples(Numbers("x", 9), None, seed=5)
    assert [plain.image_of(draw) for draw in range(9)] == [permuted_index(draw, 9, 5) for draw in range(9)]


def test_samples_and_names_are_those_of_the_parts():
    mixed = mixture()
    assert len(mixed) == 77 and mixed[0] == ("a0", ()) and mixed[40] == ("b0", ()) and mixed[76] == ("c29", ())
    assert [mixed.name(i) for i in (39, 46, 47)] == ["a39", "b6", "c0"]
    for i in (-1, 77):
        with pytest.raises(IndexError):
            mixed[i]
    assert Mixture([Numbers("a", 2)], "a", None, str)[1] == ("a1", "()")


@pytest.mark.parametrize("weights", [[1, 2], [1, 2, 0], [1, 2, -1]])
def test_weights_are_checked(weights):
    with pytest.raises(ConfigError, match="a weight above 0 for each"):
        mixture(weights)


def test_subset_keeps_the_weights():
    kept = np.array([0, 5, 39, 41, 46, 76])
    part = mixture().subset(kept, IndexSubset)
    assert [part.name(i) for i in range(6)] == ["a0", "a5", "a39", "b1", "b6", "c29"]
    assert part.shares() == [("a", 3, 5 / 8), ("b", 2, 2 / 8), ("c", 1, 1 / 8)]
    with pytest.raises(ConfigError, match="got none from b; lower it"):
        mixture().subset(np.array([0, 76]), IndexSubset)


def test_mixture_of_everything(tmp_path):
    """A folder, a list, tar shards in one run, with a hold-out, read by the training code."""
    make_folder(tmp_path / "f", [f"{i}.png" for i in range(6)])
    make_folder(tmp_path / "g", ["x.png", "y.png"])
    (tmp_path / "files.txt").write_text("g/x.png\ng/y.png\ng/gone.png\n")
    write(tmp_path / "s.tar", {f"{i}.jpg": encode(picture(9, 9, seed=i), "JPEG") for i in range(4)})
    given = [
        {"path": str(tmp_path / "f"), "weight": 2, "name": "folder"},
        {"path": str(tmp_path / "files.txt"), "weight": 1},
        {"path": str(tmp_path / "s.tar"), "weight": 1},
    ]
    dataset = make_dataset(dataset_str=given)
    assert dataset.shares() == [
        ("folder", 6, 0.5),
        (str(tmp_path / "files.txt"), 3, 0.25),
        (str(tmp_path / "s.tar"), 4, 0.25),
    ]
    assert dataset[0][0].size == (20, 16) and dataset[9][0].size == (9, 9)
    assert dataset.read(0) == (tmp_path / "f" / "0.png").read_bytes()
    with pytest.raises(DataError, match="gone.png"):
        dataset[8]
    rest, _ = split(dataset, str(tmp_path / "held.txt"), 0.3)
    held = (tmp_path / "held.txt").read_text().splitlines()
    assert len(held) == 4 and len(rest) == 9 and [share for _, _, share in rest.shares()] == [0.5, 0.25, 0.25]
    assert {rest.name(rest.index_of_draw(draw, 0)) for draw in range(100)} == {rest.name(i) for i in range(9)}
    samples = TrainSamples(rest, None, seed=0)
    samples.probe()
    sizes = {tuple(samples.load(i)[0].shape) for i in range(9) if "gone" not in rest.name(i)}
    assert sizes == {(16, 20, 3), (9, 9, 3)}


def test_lists_without_weights_are_pooled_by_size(tmp_path):
    make_folder(tmp_path / "f", ["a.png", "b.png"])
    write(tmp_path / "s.tar", {"0.png": encode(picture(9, 9))})
    dataset = make_dataset(dataset_str=[str(tmp_path / "f"), str(tmp_path / "s.tar")], target_transform=str)
    drawn = [dataset.index_of_draw(draw, 1) for draw in range(6)]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == [0, 1, 2] and dataset[2][1] == "()"
    assert [share for _, _, share in dataset.shares()] == [2 / 3, 1 / 3]
    assert [dataset.name(2)] == [f"{tmp_path}/s.tar!0.png"]


def test_batches_of_a_mixture_are_the_same_for_any_workers_start_and_ranks(tmp_path):
    make_folder(tmp_path / "f", [f"{i}.png" for i in range(5)])
    write(tmp_path / "s.tar", {f"{i}.png": encode(picture(9, 9, seed=i)) for i in range(3)})
    given = [{"path": str(tmp_path / "f"), "weight": 0.7}, {"path": str(tmp_path / "s.tar"), "weight": 0.3}]

    def batches(number: int, start: int = 0, rank: int = 0, world_size: int = 1, **train) -> list[torch.Tensor]:
        config = train_config(given, **train)
        loader = make_train_loader(config, rank=rank, world_size=world_size, start_iteration=start)
        return [batch["collated_global_crops"] for batch in itertools.islice(loader, number)]

    expected = batches(4, batch_size_per_gpu=4)
    for same in (batches(4, batch_size_per_gpu=4, num_workers=1), expected[:2] + batches(2, 2, batch_size_per_gpu=4)):
        assert all(torch.equal(a, b) for a, b in zip(same, expected, strict=True))
    ranks = [batches(4, rank=rank, world_size=2, batch_size_per_gpu=2) for rank in range(2)]
    for whole, *halves in zip(expected, *ranks, strict=True):  # crop-major: first crops of all images, then second
        crops = [half[start : start + 2] for start in (0, 2) for half in halves]
        assert torch.equal(whole, torch.cat(crops))
