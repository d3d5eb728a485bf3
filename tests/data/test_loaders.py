"""make_dataset, make_data_loader and the training data loader."""

import errno
import inspect
import itertools
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dinov2_custom.data import (
    SamplerType,
    collate_data_and_cast,
    loaders,
    make_data_loader,
    make_dataset,
    pool,
)
from dinov2_custom.data.collate import describe_masks
from dinov2_custom.data.datasets import ImageDataset, ImageNet, ImageNet22k, LabelledFolder
from dinov2_custom.data.loaders import make_augmentation, make_masks, make_train_loader
from dinov2_custom.data.masking import Step, masks_of_draws
from dinov2_custom.data.samplers import permuted_index
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.utils.rng import random_for
from tests.data.datasets.test_image_net_22k import write_tar
from tests.data.pictures import encode, make_folder, picture, train_config

# torch forks its workers; Python 3.12 warns about that if the test runner has threads
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "data", [f"{i}.png" for i in range(7)])
    return str(tmp_path / "data")


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(loaders, "at_most_cores", lambda num_workers: num_workers)


def test_make_dataset_makes_every_kind(tmp_path, folder):
    make_folder(tmp_path / "net" / "train", ["n01/n01_1.JPEG"])
    (tmp_path / "net22k").mkdir()
    write_tar(tmp_path / "net22k" / "n01.tar", {"n01_1.JPEG": encode(picture(5, 4), "JPEG")})
    make_folder(tmp_path / "classes", ["a/1.png", "b/1.png"])
    for text, kind, number in [
        (folder, ImageDataset, 7),
        (Path(folder), ImageDataset, 7),
        ([folder, str(tmp_path / "classes")], ImageDataset, 9),
        (f"ImageFolder:root={folder}:", ImageDataset, 7),
        (f"LabelledFolder:root={tmp_path / 'classes'}", LabelledFolder, 2),
        (f"ImageNet:split=TRAIN:root={tmp_path / 'net'}:extra={tmp_path / 'extra'}", ImageNet, 1),
        (f"ImageNet22k:root={tmp_path / 'net22k'}", ImageNet22k, 1),
    ]:
        dataset = make_dataset(dataset_str=text, transform=np.asarray, target_transform=str)
        assert type(dataset) is kind and len(dataset) == number
        assert isinstance(dataset[0][0], np.ndarray) and isinstance(dataset[0][1], str)
    with pytest.raises(DataError, match="missing"):
        make_dataset(dataset_str=str(tmp_path / "nope"))
    with pytest.raises(ConfigError, match="did you mean"):
        make_dataset(dataset_str="ImageNett:split=TRAIN")


@pytest.mark.parametrize("name", ["make_dataset", "make_data_loader"])
def test_signatures_are_upstreams(upstream_source, name):
    assert list(inspect.signature(getattr(loaders, name)).parameters) == upstream_source("loaders", name)


def test_sampler_types_are_upstreams():
    assert [(t.name, t.value) for t in SamplerType] == [
        ("DISTRIBUTED", 0), ("EPOCH", 1), ("INFINITE", 2), ("SHARDED_INFINITE", 3), ("SHARDED_INFINITE_NEW", 4)
    ]  # fmt: skip


@pytest.mark.parametrize("sampler_type, endless", [
    (None, False), (SamplerType.DISTRIBUTED, False), (SamplerType.EPOCH, False),
    (SamplerType.INFINITE, True), (SamplerType.SHARDED_INFINITE, True), (SamplerType.SHARDED_INFINITE_NEW, True),
])  # fmt: skip
def test_data_loader_with_every_sampler(sampler_type, endless):
    def run(**options):
        loader = make_data_loader(
            dataset=range(10),
            batch_size=5,
            num_workers=0,
            sampler_type=sampler_type,
            persistent_workers=True,
            **options,
        )
        assert not loader.pin_memory or torch.cuda.is_available()
        batches = list(itertools.islice(loader, 6))
        assert len(batches) == (6 if endless else 2)
        return torch.cat(batches).tolist()

    for start in (0, 10):
        assert sorted(run()[start : start + 10]) in (list(range(10)), [])
    assert run(shuffle=False)[:10] == list(range(10))
    if sampler_type is not None:
        assert run(seed=1) == run(seed=1) != run(seed=2)


def test_data_loader_epochs_advance_and_collate():
    loader = make_data_loader(
        dataset=range(10), batch_size=4, num_workers=0, shuffle=False, sampler_type=SamplerType.EPOCH, sampler_size=13,
        drop_last=False, collate_fn=tuple,
    )  # fmt: skip
    assert list(loader) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 0, 1), (2,)]
    ahead = make_data_loader(dataset=range(10), batch_size=4, num_workers=0, shuffle=False, sampler_advance=8)
    assert next(iter(ahead)).tolist() == [8, 9, 0, 1]
    with pytest.raises(ValueError, match="sampler_advance: expected 0"):
        make_data_loader(
            dataset=range(9), batch_size=1, num_workers=0, sampler_type=SamplerType.EPOCH, sampler_advance=1
        )
    with pytest.raises(ValueError, match="sampler_size: expected -1"):
        make_data_loader(
            dataset=range(9), batch_size=1, num_workers=0, sampler_type=SamplerType.DISTRIBUTED, sampler_size=5
        )


def batches(folder, number=5, start_iteration=0, rank=0, world_size=1, on_bad_image=None, **train) -> list[dict]:
    loader = make_train_loader(
        train_config(folder, **train),
        rank=rank,
        world_size=world_size,
        start_iteration=start_iteration,
        on_bad_image=on_bad_image,
    )
    return list(itertools.islice(loader, number))


def equal(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def test_batch_has_upstreams_keys_and_nothing_else(folder):
    (batch,) = batches(folder, number=1)
    assert sorted(batch) == [
        "collated_global_crops", "collated_local_crops", "collated_masks", "mask_indices_list", "masks_weight",
        "n_masked_patches", "upperbound",
    ]  # fmt: skip
    assert batch["collated_global_crops"].shape == (4, 3, 16, 16)
    assert batch["collated_global_crops"].dtype == torch.float32
    assert batch["collated_local_crops"].shape == (4, 3, 8, 8) and batch["collated_masks"].shape == (4, 16)


def test_batch_is_what_the_classes_for_users_give(folder):
    """Upstream's augmentation and collate function give the same batch bit for bit from the same draws."""
    cfg = train_config(folder)
    dataset, augment, masks = make_dataset(dataset_str=folder), make_augmentation(cfg), make_masks(cfg)
    for iteration, batch in enumerate(batches(folder, number=3)):
        draws = (2 * iteration, 2 * iteration + 1)
        images = [dataset[permuted_index(draw, 7, 0)][0] for draw in draws]
        samples = [augment(image, rng=random_for(0, "augment", n)) for image, n in zip(images, draws, strict=True)]
        of_users = collate_data_and_cast(
            samples, masks.ratios, masks.probability, torch.float32, masks.n_tokens, masks.generator
        )
        drawn, upperbound = masks_of_draws(masks, 0, Step(draws[0], 2), draws)
        assert equal(batch, of_users | describe_masks(torch.from_numpy(drawn), upperbound))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_colours_made_on_the_device_are_the_same(folder, many_cores, num_workers):
    found = {}
    for where in ("cpu", "device", "auto"):
        cfg = train_config(folder, num_workers=num_workers)
        cfg.augmentation = SimpleNamespace(device=where)
        loader = make_train_loader(cfg, rank=0, world_size=1)
        found[where] = list(itertools.islice(loader.batches(3), 4))
    for a, b, c in zip(*found.values(), strict=True):
        assert equal(a, b) and equal(a, c)


def test_dct_scaling_changes_little_and_only_large_images(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "large.jpg").write_bytes(encode(picture(480, 360, 1), "JPEG", quality=92))

    def batch(scaling):
        cfg = train_config(str(tmp_path / "photos"), batch_size_per_gpu=8)
        cfg.augmentation = SimpleNamespace(device="auto", jitter_p=0, gray_p=0, blur_p=[0, 0, 0], solarize_p=0)
        cfg.data.dct_scaling = scaling
        return next(iter(make_train_loader(cfg, rank=0, world_size=1)))

    full, scaled = batch(False), batch(True)
    assert not equal(full, scaled) and equal(scaled, batch(True))
    difference = (full["collated_global_crops"] - scaled["collated_global_crops"]).abs() * 255 * 0.226
    assert difference.mean() < 6  # levels, of a picture full of detail; boxes move by parts of a pixel


def test_batches_do_not_depend_on_the_number_of_workers(folder, many_cores):
    expected = batches(folder)
    assert not equal(expected[0], expected[1])
    for num_workers in (1, 2):
        assert all(equal(a, b) for a, b in zip(batches(folder, num_workers=num_workers), expected, strict=True))


def test_starting_later_gives_the_rest_of_an_uninterrupted_run(folder):
    expected = batches(folder, number=9)
    assert all(equal(a, b) for a, b in zip(batches(folder, 4, start_iteration=5), expected[5:], strict=True))
    loader = make_train_loader(train_config(folder), rank=0, world_size=1)
    assert equal(next(loader.batches(start_iteration=7)), expected[7])


def test_ranks_have_different_parts_of_the_same_draws(folder):
    alone = batches(folder, number=3, batch_size_per_gpu=4)
    for rank in (0, 1):
        half = batches(folder, number=3, rank=rank, world_size=2)
        for mine, all_of_it in zip(half, alone, strict=True):
            expected = all_of_it["collated_global_crops"].unflatten(0, (2, 4))[:, 2 * rank : 2 * rank + 2].flatten(0, 1)
            assert torch.equal(mine["collated_global_crops"], expected)


def test_masks_do_not_depend_on_how_a_step_is_cut(folder):
    (whole,) = batches(folder, number=1, batch_size_per_gpu=8, start_iteration=2)
    expected = whole["collated_masks"].unflatten(0, (2, 8))
    for processes, accumulated in ((1, 2), (2, 1), (2, 2), (4, 1), (8, 1)):
        size, parts = 8 // processes // accumulated, []
        for part in range(accumulated):
            for rank in range(processes):
                cfg = train_config(folder, batch_size_per_gpu=size)
                cfg.optim = SimpleNamespace(accumulation_steps=accumulated)
                loader = make_train_loader(cfg, rank=rank, world_size=processes)
                batch = next(loader.batches(2 * accumulated + part))
                parts.append(batch["collated_masks"].unflatten(0, (2, size)))
        assert torch.equal(torch.cat(parts, dim=1), expected)
    assert expected.any(-1).sum() == 8


def test_another_batch_size_resumes_at_the_next_draw(folder):
    loader = make_train_loader(train_config(folder, batch_size_per_gpu=3), rank=0, world_size=1)
    for _ in zip(range(3), loader.batches(), strict=False):
        pass
    assert loader.draws == 9
    other = make_train_loader(train_config(folder, batch_size_per_gpu=2), rank=0, world_size=1)
    found = next(other.batches(first_draw=loader.draws))["collated_global_crops"].unflatten(0, (2, 2))
    expected = batches(folder, 12, batch_size_per_gpu=1)
    for i in (0, 1):
        assert torch.equal(found[:, i], expected[9 + i]["collated_global_crops"])
    assert other.draws == 11


def test_another_seed_gives_other_batches(folder):
    assert not equal(batches(folder, 1)[0], batches(folder, 1, seed=1)[0])


def test_dataset_smaller_than_a_batch_repeats(tmp_path):
    make_folder(tmp_path / "one", ["only.png"])
    (batch,) = batches(str(tmp_path / "one"), number=1, batch_size_per_gpu=3)
    crops = batch["collated_global_crops"]
    assert crops.shape[0] == 6 and not torch.equal(crops[0], crops[1])


def test_num_images_and_draws(folder):
    loader = make_train_loader(train_config([folder, folder]), rank=1, world_size=3, start_iteration=2)
    assert loader.num_images == 7 and loader.draws == 12
    assert len(list(itertools.islice(loader, 4))) == 4
    assert loader.draws == 36


def test_global_random_state_is_unchanged(folder, many_cores):
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    batches(folder, number=2)
    batches(folder, number=2, num_workers=1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state


def test_held_out_images_are_not_drawn(folder, tmp_path):
    loader = make_train_loader(
        train_config(folder, path_preserved=str(tmp_path / "held.txt"), frac=0.3), rank=0, world_size=1
    )
    held = (tmp_path / "held.txt").read_text().splitlines()
    assert loader.num_images == 5 and len(held) == 2
    samples = loader.builder.samples
    names = [samples.dataset.name(samples.image_of(draw)) for draw in range(5)]
    assert sorted(names + held) == sorted(str(p) for p in Path(folder).iterdir())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_replaced_reported_once_and_the_same_with_workers(folder, many_cores, num_workers):
    for name, data in {"x.jpg": b"no picture", "y.png": b"", "z.jpg": encode(picture(9, 9), "JPEG")[:100]}.items():
        (Path(folder) / name).write_bytes(data)
    told = []

    def tell(path, reason):
        told.append((Path(path).name, reason))

    options = dict(number=20, max_bad_fraction=0.5)
    found = batches(folder, num_workers=num_workers, on_bad_image=tell, **options)
    assert sorted(name for name, _ in told) == ["x.jpg", "y.png", "z.jpg"]
    assert all("expected an image" in reason for _, reason in told)
    silent = batches(folder, on_bad_image=lambda *story: None, **options)
    assert all(equal(a, b) for a, b in zip(found, silent, strict=True))


def test_more_bad_images_than_allowed_stop_the_run(folder):
    for i in range(9):
        (Path(folder) / f"bad{i}.jpg").write_bytes(b"no picture")
    assert len(batches(folder, number=20, on_bad_image=lambda *story: None)) == 20  # never of a few
    (Path(folder) / "y.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"expected at most 1.00% unreadable.*10 different files"):
        batches(folder, number=50, on_bad_image=lambda *story: None)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_vanish_during_training_end_in_one_clear_error(folder, many_cores, num_workers):
    loader = make_train_loader(
        train_config(folder, num_workers=num_workers, max_bad_fraction=1.0), rank=0, world_size=1, on_bad_image=print
    )
    for path in Path(folder).iterdir():
        path.unlink()
    with pytest.raises(DataError, match="7 different files.*FileNotFoundError") as e:
        list(itertools.islice(loader, 2))
    assert "Traceback" not in str(e.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_io_or_permission_error_loses_only_that_image(folder, monkeypatch, number):
    victim = sorted(Path(folder).iterdir())[2]

    open_file = os.open

    def fragile(path, *arguments, **options):
        if os.fspath(path) == str(victim):
            raise OSError(number, os.strerror(number))
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fragile)
    told = []
    assert len(batches(folder, number=10, on_bad_image=lambda *story: told.append(story))) == 10
    ((path, reason),) = told
    assert path == str(victim) and os.strerror(number) in reason


def test_no_readable_image_is_an_error_before_training(tmp_path):
    (tmp_path / "x.jpg").write_text("no picture")
    with pytest.raises(DataError, match="expected readable images, got none in 1 tried of 1"):
        make_train_loader(train_config(str(tmp_path)), rank=0, world_size=1)


def test_dtype_of_the_crops_is_an_option(folder):
    loader = make_train_loader(train_config(folder), rank=0, world_size=1, dtype=torch.float16)
    batch = next(iter(loader))
    assert batch["collated_global_crops"].dtype == batch["collated_local_crops"].dtype == torch.float16


def test_whole_configuration_is_read(folder, tmp_path):
    from dinov2_custom.configs.load import load_run_config

    overrides = [
        f"train.dataset_path={folder}", "train.batch_size_per_gpu=2", "train.num_workers=0", "augmentation.jitter_p=0",
        "augmentation.gray_p=0", "augmentation.blur_p=[0,0,0]", "augmentation.solarize_p=0",
        "data.normalize.mean=[1,1,1]", "data.normalize.std=[0.5,0.5,0.5]",
        "crops.local_crops_number=0", "crops.global_crops_size=28", "student.patch_size=14",
        "train.max_bad_fraction=0.25",
    ]  # fmt: skip
    cfg = load_run_config(None, overrides, str(tmp_path / "out"))
    loader = make_train_loader(cfg, rank=0, world_size=1, on_bad_image=None)
    batch = next(iter(loader))
    crops = batch["collated_global_crops"]
    assert crops.shape == (4, 3, 28, 28) and batch["collated_masks"].shape == (4, 4)
    assert -2 <= crops.min() and crops.max() <= 0, "mean 1 and std .5 of the configuration"
    assert loader.bad_images.max_fraction == 0.25 and loader.builder.masks.generator.max_num_patches == 2.0
    assert len(batch["collated_local_crops"]) == 0


def test_bounds_of_the_masks_are_rounded_as_upstreams():
    for size, patch, expected in ((224, 14, 128), (224, 16, 98), (518, 14, 666)):
        cfg = train_config("")
        cfg.crops.global_crops_size, cfg.student.patch_size = size, patch
        generator = make_masks(cfg).generator
        assert generator.max_num_patches == expected and generator.get_shape() == (size // patch,) * 2


def test_workers_are_at_most_the_cores(monkeypatch, caplog):
    monkeypatch.setattr(pool, "num_cores", lambda: 3)
    caplog.set_level("INFO", logger="dinov2")
    assert [pool.at_most_cores(n) for n in (0, 2, 3)] == [0, 2, 3] and not caplog.text
    assert pool.at_most_cores(10) == 3 and "3 instead of 10" in caplog.text
