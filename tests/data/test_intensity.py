"""One intensity range for a dataset's deep images: visible structure, ignored values, identical in every reader."""

from __future__ import annotations

import io
import logging
import tarfile

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.data import decode, intensity
from dinov2_custom.data.datasets import ExtendedVisionDataset, ImageDataset
from dinov2_custom.data.depth import Reading
from dinov2_custom.data.intensity import Looker, measure, range_of, without_nodata
from dinov2_custom.data.loaders import make_dataset, make_train_loader
from dinov2_custom.errors import DataError
from dinov2_custom.reading import choose_reading
from tests.data.pictures import deep_rgb, encode, picture, train_config

SIZE = (48, 64)
NUMBER = 12
GDAL_NODATA = 42113


def scenes(low: float, high: float) -> np.ndarray:
    """Return ``NUMBER`` grey images (48, 64) with structure at every scale that span ``low``..``high``."""
    grey = [np.asarray(picture(SIZE[1], SIZE[0], seed).convert("L"), np.float64) for seed in range(NUMBER)]
    smooth = np.stack(grey) + np.random.default_rng(0).random((NUMBER, *SIZE))
    return low + (smooth - smooth.min()) / (smooth.max() - smooth.min()) * (high - low)


def tiff(values: np.ndarray, nodata: str = "") -> bytes:
    tags = {GDAL_NODATA: nodata} if nodata else {}
    return encode(Image.fromarray(values), "TIFF", tiffinfo=tags)


def written(folder, values, nodata=""):
    folder.mkdir(exist_ok=True)
    for i, one in enumerate(values):
        (folder / f"{i:02}.tif").write_bytes(tiff(one, nodata))
    return ImageDataset(str(folder))


def levels(dataset) -> np.ndarray:
    return np.stack([np.asarray(dataset[i][0])[..., 0] for i in range(len(dataset))])


@pytest.mark.parametrize("low, high, kind", [
    (100, 4095, np.uint16), (100, 400, np.uint16), (0, 65535, np.uint16), (-900, 2900, np.int32), (0, 1, np.float32),
    (-3, 0.5, np.float32), (1e6, 1e6 + 900, np.int32),
])  # fmt: skip
def test_full_8_bit_resolution_is_kept(tmp_path, low, high, kind):
    values = scenes(low, high).astype(kind)
    dataset = written(tmp_path / "images", values)
    reading = choose_reading(dataset)
    assert np.allclose(reading.intensity, np.percentile(values, (0.1, 99.9)), atol=0.03 * (high - low))
    seen = levels(dataset)
    assert len(np.unique(seen)) >= 225 and 90 < seen.mean() < 165
    order = np.argsort(values[0], axis=None, kind="stable")
    assert (np.diff(seen[0].ravel()[order].astype(int)) >= 0).all()


@pytest.mark.parametrize("nodata, tag", [
    ([-9999], ""), ([-3.4028235e38], ""), ([np.nan, np.inf, -np.inf], ""), ([-9999, -3.4028235e38], ""), ([610], "610"),
    ([32767], "32767"), ([1e20], "1e+20"), ([0], ""),
])  # fmt: skip
def test_nodata_values_do_not_affect_the_range(tmp_path, nodata, tag):
    """A third of each height model has no values; it is black, and everything else is unaffected."""
    heights = scenes(600, 820).astype(np.float32)
    holes = heights.copy()
    for i, value in enumerate(nodata):
        holes[i :: len(nodata), : SIZE[0] // 3] = value
    dataset = written(tmp_path / "holes", holes, tag)
    choose_reading(dataset)
    whole = written(tmp_path / "whole", heights[:, SIZE[0] // 3 :])
    choose_reading(whole)
    seen, expected = levels(dataset), levels(whole)
    assert np.abs(seen[:, SIZE[0] // 3 :].astype(int) - expected).max() <= 6
    empty = np.unique(seen[:, : SIZE[0] // 3])
    assert set(empty) <= ({0, 255} if np.inf in nodata else {0})


@pytest.mark.parametrize("hot", [65535, 0])
def test_one_pixel_does_not_change_its_image(tmp_path, hot):
    values = scenes(1000, 1500).astype(np.uint16)
    plain = written(tmp_path / "plain", values)
    values[:, 20, 30] = hot  # a hot pixel of the sensor, at the same place in every image
    spoiled = written(tmp_path / "spoiled", values)
    for dataset in (plain, spoiled):
        choose_reading(dataset)
    assert np.abs(levels(plain).mean((1, 2)) - levels(spoiled).mean((1, 2))).max() < 1.5


@pytest.mark.parametrize("values, expected", [
    (np.full(10, 7.0), (7, 8)), ([0.0, 1000.0] * 50, (0, 1000)), ([5.0], (5, 6)), ([3.0] * 900 + [4.0] * 100, (3, 4)),
])  # fmt: skip
def test_odd_values(values, expected):
    assert range_of(without_nodata(np.array(values))) == expected


def test_clipping_of_a_given_range_is_reported(tmp_path, caplog):
    dataset = written(tmp_path / "images", scenes(100, 4095).astype(np.uint16))
    caplog.set_level(logging.INFO, logger="dinov2")
    assert choose_reading(dataset, Reading((0, 255))) == dataset.reading == Reading((0, 255))
    said = [record.getMessage() for record in caplog.records]
    assert "values from 0 to 255" in said[0] and any("lie outside 0..255: expected at most 2%" in text for text in said)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_all_bits_of_16_bit_rgb_count(kind):
    values = np.random.default_rng(0).integers(300, 700, (18, 24, 3), dtype=np.uint16)
    data = deep_rgb(kind, values)
    expected = np.round((values - 300.0) * (255 / 400))
    np.testing.assert_array_equal(np.asarray(decode.decode_rgb(data, reading=Reading((300, 700)))), expected)
    np.testing.assert_array_equal(decode.decode_array(data, reading=Reading((300, 700))), expected)


def containers(folder, values):
    """Write the same images as files, a tar, a list and a table of bytes; return the dataset path of each."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = {f"{i:02}.tif": tiff(one) for i, one in enumerate(values)}
    (folder / "files").mkdir()
    for name, data in files.items():
        (folder / "files" / name).write_bytes(data)
    with tarfile.open(folder / "all.tar", "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / "list.txt").write_text("".join(f"files/{name}\n" for name in files))
    table = pa.table({"image": list(files.values())})
    pq.write_table(table, folder / "all.parquet")
    with pa.OSFile(str(folder / "all.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    places = ["files", "all.tar", "list.txt", "all.parquet", "all.arrow"]
    return [str(folder / place) for place in places]


def test_every_container_and_loading_processes_give_the_same(tmp_path):
    values = scenes(100, 400).astype(np.uint16)
    places = containers(tmp_path, values)
    folder = make_dataset(dataset_str=places[0])
    reading = choose_reading(folder)
    expected = levels(folder)
    for place in places[1:]:
        dataset = make_dataset(dataset_str=place)
        assert choose_reading(dataset) == reading, place
        np.testing.assert_array_equal(levels(dataset), expected, place)
    mixture = make_dataset(dataset_str=[places[1], {"path": places[2]}])
    assert choose_reading(mixture).intensity is not None
    np.testing.assert_array_equal(levels(mixture)[:NUMBER], levels(mixture)[NUMBER:])
    crops = []
    for dataset, workers in ((folder, 0), (mixture, 0), (mixture, 1)):
        dataset.reading = reading
        cfg = train_config(places[0], num_workers=workers)
        loader = make_train_loader(cfg, rank=0, world_size=1, dataset=dataset)
        batches = loader.batches()
        crops.append(next(batches)["collated_global_crops"])
        batches.close()
    assert crops[0].std() > 0.5  # by bit depth they would all be near black
    assert (crops[1] == crops[2]).all()


def test_8_bit_images_are_unchanged(tmp_path, caplog):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(picture(24, 18, i)))
    dataset = ImageDataset(str(tmp_path))
    with caplog.at_level(logging.INFO, logger="dinov2"):
        assert choose_reading(dataset) == Reading()
    assert not caplog.records
    dataset.reading = Reading((100, 400), 0)
    np.testing.assert_array_equal(np.asarray(dataset[0][0]), np.asarray(picture(24, 18, 0)))


def test_range_and_clipping_are_logged_and_few_levels_warned_of(tmp_path, caplog):
    bright, dim = scenes(0, 60000)[:6].astype(np.uint16), scenes(100, 900)[:6].astype(np.uint16)
    dataset = written(tmp_path / "images", np.concatenate([bright[:3], dim, dim[:3]]))
    found = measure(len(dataset), Looker(dataset))
    assert found.deep == found.images == 12 and 0 < found.clipped <= 0.002 and found.levels > 200
    assert found.levels_an_image < 10 and "data.intensity" in found.warnings()[0]
    assert f"{found.intensity[1]:g} become 0..255" in found.describe()[0] and "clipped" in found.describe()[0]
    assert measure(len(dataset), Looker(dataset), seed=1).images == 12
    fine = written(tmp_path / "fine", dim)
    assert measure(len(fine), Looker(fine)).warnings() == []


def test_a_bounded_number_spread_over_the_dataset_is_looked_at(monkeypatch):
    seen = []

    def look(i):
        seen.append(i)
        if i % 7 == 0:
            raise DataError("broken")
        return None, ""

    found = measure(10**9, look)
    assert len(seen) == intensity.FILES and seen == sorted(seen)
    assert max(np.diff([0, *seen, 10**9])) < 2 * 10**9 / intensity.FILES and found.images < len(seen)
    again = seen[:]
    seen.clear()
    measure(10**9, look)
    assert seen == again


def test_pages(tmp_path):
    pages = [Image.fromarray(np.full((8, 9), 50 * i, np.uint8)) for i in range(1, 4)]
    (tmp_path / "stack.tif").write_bytes(encode(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    (tmp_path / "plain.png").write_bytes(encode(pages[2]))
    (tmp_path / "slide.tif").write_bytes(encode(pages[1], "TIFF", tiffinfo={270: "Aperio Image\nlabel 9x8"}))
    dataset = ImageDataset(str(tmp_path))
    assert measure(3, Looker(dataset)).notes == {decode.SEVERAL_PAGES: 1, decode.OTHER_PAGE: 1}
    assert [int(one[0, 0]) for one in levels(dataset)] == [150, 100, 50]
    dataset.reading = Reading(page=2)
    assert [int(one[0, 0]) for one in levels(dataset)] == [150, 100, 150]
    dataset.reading = Reading(page=3)
    with pytest.raises(DataError, match=r"stack.tif .*data.page=3, expected at most 2"):
        dataset[2]


def test_a_jpeg_has_one_page_with_any_decoder():
    data = encode(picture(24, 18), "MPO", save_all=True, append_images=[picture(24, 18, 1)])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    for decoded in (decode.decode_rgb, decode.decode_array):
        np.testing.assert_array_equal(decoded(data, reading=Reading(page=1)), decoded(data))


@pytest.mark.parametrize("kind", [np.uint16, np.float32], ids=["through Pillow", "through tifffile"])
def test_page_of_a_deep_stack(kind):
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 4096, (3, 8, 9, 3)).astype(kind)
    stack, single = io.BytesIO(), io.BytesIO()
    tifffile.imwrite(stack, values, photometric="rgb", compression="zlib")
    tifffile.imwrite(single, values[0], photometric="rgb", compression="zlib")
    got = decode.decode_rgb(stack.getvalue(), reading=Reading((0, 4095), 1))
    np.testing.assert_array_equal(np.asarray(got), np.round(values[1] * (255 / 4095)))
    with pytest.raises(DataError, match="data.page=3, expected at most 2"):
        decode.decode_rgb(stack.getvalue(), reading=Reading((0, 4095), 3))
    got = decode.decode_rgb(single.getvalue(), reading=Reading((0, 4095), 3))  # has only that one
    np.testing.assert_array_equal(np.asarray(got), np.round(values[0] * (255 / 4095)))


def test_user_defined_dataset_has_the_defaults(tmp_path):
    class Own(ExtendedVisionDataset):
        def __len__(self):
            return 3

    assert (Own().left_out(), Own().passed_over()) == ({}, [])
    assert choose_reading(Own()) == Reading()  # it returns no bytes to examine
    Own.get_image_data = lambda self, index: np.zeros((3, 4))  # for its own decoder
    assert choose_reading(Own()) == Reading()
