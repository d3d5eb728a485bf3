"""Hold-out: a fixed fraction of the images, listed in a file and excluded from training."""

import hashlib
import os
import random

import pytest

from dinov2_custom.data.datasets import ImageDataset
from dinov2_custom.data.holdout import choose, split
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.errors import ConfigError, DataError
from tests.data.pictures import make_folder


def split_off(*arguments, **options):
    """Return the images that are left to train on."""
    return split(*arguments, **options)[0]


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data", [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(20)], 4, 4)


def names(dataset) -> list[str]:
    return [dataset.name(i) for i in range(len(dataset))]


def test_nothing_is_held_out_by_default(tmp_path, folder):
    dataset = ImageDataset(tmp_path / "data")
    assert split_off(dataset, "", 0.0) is split_off(dataset, "", 1.0) is dataset


def test_share_is_left_out_and_listed(tmp_path, folder):
    dataset, listed = ImageDataset(tmp_path / "data"), tmp_path / "out" / "held.txt"
    rest = split_off(dataset, str(listed), 0.25)
    held = listed.read_text().splitlines()
    assert len(held) == 5 and held == sorted(held)
    assert sorted(names(rest) + held) == folder and names(rest) == sorted(names(rest))
    assert rest[3][0].tobytes() == dataset[folder.index(rest.name(3))][0].tobytes()


def test_an_empty_hold_out_is_refused_before_and_after_it_is_written(tmp_path, folder):
    dataset, listed = ImageDataset(tmp_path / "data"), tmp_path / "held.txt"
    with pytest.raises(DataError, match=r"train\.frac: .* got 0 of 20 .*0\.001"):
        split(dataset, str(listed), 0.001)
    assert not listed.exists()
    listed.write_text("\n")
    with pytest.raises(DataError, match=rf"{listed}; delete it"):
        split(dataset, str(listed), 0.25)


def test_existing_list_is_used_unchanged(tmp_path, folder):
    listed = tmp_path / "held.txt"
    listed.write_text(f"{folder[4]}\n/not/there.png\n\n{folder[7]}\n")
    rest = split_off(ImageDataset(tmp_path / "data"), str(listed), 0.9)
    assert names(rest) == [name for name in folder if name not in (folder[4], folder[7])]
    assert len(listed.read_text().splitlines()) == 4


def test_choice_depends_only_on_the_paths_below_the_root(tmp_path, folder):
    other = make_folder(
        tmp_path / "mounted" / "elsewhere", [os.path.relpath(f, tmp_path / "data") for f in folder], 4, 4
    )
    chosen, again = choose(folder, 0.3), choose(other, 0.3)
    assert len(chosen) == 6
    assert {os.path.relpath(f, tmp_path / "data") for f in chosen} == {
        os.path.relpath(f, tmp_path / "mounted" / "elsewhere") for f in again
    }
    assert choose(folder, 0.1) < chosen
    assert choose(folder[:1], 0.4) == set() and choose(folder[:1], 0.6) == set(folder[:1])


def test_other_ranks_hold_out_the_same_without_writing(tmp_path, folder):
    listed = tmp_path / "held.txt"
    first = split_off(ImageDataset(tmp_path / "data"), str(listed), 0.25, write=False)
    assert not listed.exists()
    assert names(first) == names(split_off(ImageDataset(tmp_path / "data"), str(listed), 0.25))


def test_folders_limit_the_choice_and_the_list_goes_to_the_output(tmp_path, folder):
    rest = split_off(
        ImageDataset(tmp_path / "data"), [str(tmp_path / "data" / "b")], 0.5, output_dir=str(tmp_path / "run")
    )
    held = (tmp_path / "run" / "preserved_images.txt").read_text().splitlines()
    assert len(held) == 5 and len(rest) == 15
    assert all(os.path.basename(os.path.dirname(name)) == "b" for name in held)


def test_half_described_hold_outs_are_refused(tmp_path, folder):
    dataset = ImageDataset(tmp_path / "data")
    with pytest.raises(ConfigError, match="train.path_preserved: expected a text file"):
        split_off(dataset, "", 0.1)
    with pytest.raises(ConfigError, match="train.frac: expected a share above 0"):
        split_off(dataset, str(tmp_path / "held.txt"), 0.0)
    with pytest.raises(ConfigError, match="expected existing folders.* got .*nope"):
        split_off(dataset, [str(tmp_path / "data"), str(tmp_path / "nope")], 0.1)
    with pytest.raises(ConfigError, match=r"expected existing folders, or a file .* got .*site_c \(missing\)"):
        split_off(dataset, str(tmp_path / "site_c"), 0.1)
    assert not (tmp_path / "site_c").exists()


def test_nothing_left_to_train_on(tmp_path, folder):
    with pytest.raises(DataError, match="all 20 of them held out"):
        split_off(ImageDataset(tmp_path / "data"), str(tmp_path / "held.txt"), 0.99)
    assert not (tmp_path / "held.txt").exists()


def test_choice_is_that_of_the_sorted_hashes():
    """The choice equals sorting all pairs (hash of the relative path, path), as earlier runs did."""
    rng = random.Random(0)
    for size in (1, 2, 3, 50):
        names = [f"/d/{'ab-.'[rng.randrange(4)]}x/{rng.randrange(99)}/{i}.png" for i in range(size)]
        common = os.path.commonpath(names) if size > 1 else os.path.dirname(names[0])
        digests = {n: hashlib.blake2b(os.path.relpath(n, common).encode(), digest_size=8).digest() for n in names}
        for frac in (0.1, 0.5, 0.9):
            expected = sorted(names, key=lambda n: (digests[n], n))[: round(frac * size)]
            assert choose(names, frac) == set(expected)
    assert choose([], 0.5) == set()
    assert choose(["/d/a\nb.png", "/d/c.png"], 0.6) == {"/d/c.png"}


def test_duplicate_image_is_held_out_twice(tmp_path, folder):
    (tmp_path / "twice.txt").write_text("\n".join([*folder, *folder]))
    rest = split_off(make_dataset(dataset_str=str(tmp_path / "twice.txt")), str(tmp_path / "held.txt"), 0.25)
    held = set((tmp_path / "held.txt").read_text().splitlines())
    assert held and not held & set(names(rest)) and len(rest) == 40 - 2 * len(held)


def test_rest_has_bytes_and_shares(tmp_path, folder):
    dataset = ImageDataset([tmp_path / "data" / "a", tmp_path / "data" / "b"])
    rest = split_off(dataset, [str(tmp_path / "data" / "b")], 0.5, output_dir=str(tmp_path / "run"))
    assert rest.shares() == [(str(tmp_path / "data" / "a"), 10, 10 / 15), (str(tmp_path / "data" / "b"), 5, 5 / 15)]
    with open(rest.name(12), "rb") as file:
        assert rest.read(12) == file.read()
