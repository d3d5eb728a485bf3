import io
import json
import logging
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.cli import prepare_parser as get_args_parser
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.logging import remove_logging
from dinov2_custom.prepare.change import Options
from dinov2_custom.prepare.main import MARKER, main, prepare
from tests.data.pictures import encode, picture
from tests.verify.files import Listed, bad_files, jpeg, overwritten, sound_files, write_files
from tests.verify.killed import kill_when, wait_for_end_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")


def run(dataset, folder, options=None, *, shard_size=20_000, workers=2):
    folder.mkdir(exist_ok=True)
    (folder / MARKER).touch()
    return prepare(dataset, folder, options or Options(), shard_size=shard_size, workers=workers)


def members(folder):
    """Return name -> bytes of the shards' contents, and check them against the index."""
    found = {}
    index = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    assert sorted(found) == sorted(row["name"] for row in index)
    for row in index:
        with open(folder / row["shard"], "rb") as file:
            file.seek(row["offset"])
            assert file.read(row["bytes"]) == found[row["name"]]
        assert Image.open(io.BytesIO(found[row["name"]])).size == (row["width"], row["height"])
    return found


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def mixed(tmp_path):
    write_files(tmp_path / "images" / "good", sound_files())
    write_files(tmp_path / "images" / "wrong", {name: data for name, (data, _) in bad_files().items()})
    return make_dataset(dataset_str=str(tmp_path / "images"))


def test_shards_hold_the_sound_images_as_they_are(mixed, tmp_path):
    summary = run(mixed, tmp_path / "out")
    wanted = {f"good/{name}": data for name, data in sound_files().items()}
    wanted["good/named_wrongly.jpg"] = wanted.pop("good/named_wrongly.png")
    assert members(tmp_path / "out") == wanted
    assert (summary["kept"], summary["bad"]) == (len(sound_files()), len(bad_files()))
    assert summary["shards"] > 1
    assert len((tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()) == len(bad_files())
    shards: dict[str, list[int]] = {}
    for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines():
        shards.setdefault(json.loads(line)["shard"], []).append(json.loads(line)["bytes"])
    assert len(shards) == summary["shards"]
    assert all(sum(sizes) <= 20_000 or len(sizes) == 1 for sizes in shards.values())


def test_any_number_of_processes_writes_the_same(mixed, tmp_path):
    for workers in (1, 2):
        run(mixed, tmp_path / str(workers), Options(short_side=12, format="jpeg"), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_shards_train_and_can_be_prepared_again(mixed, tmp_path):
    run(mixed, tmp_path / "out")
    shards = make_dataset(dataset_str=f"Tar:path={tmp_path / 'out'}")
    wanted = {name for name in members(tmp_path / "out") if not name.endswith((".gif", ".ppm"))}
    assert {shards.name(i).partition("!")[2] for i in range(len(shards))} == wanted
    assert all(shards[i][0].mode == "RGB" for i in range(len(shards)))
    run(shards, tmp_path / "again", shard_size=10**9)
    assert members(tmp_path / "again") == members(tmp_path / "out")


def test_a_plain_folder_trains(mixed, tmp_path):
    summary = run(mixed, tmp_path / "out", Options(short_side=12, format="png"), shard_size=0)
    dataset = make_dataset(dataset_str=str(tmp_path / "out" / "images"))
    assert len(dataset) == summary["files"] == len(sound_files())
    assert all(min(dataset[i][0].size) <= 12 for i in range(len(dataset)))
    assert all(os.sep + "good" + os.sep in dataset.name(i) for i in range(len(dataset)))


def test_equal_names_are_made_distinct(tmp_path):
    write_files(tmp_path / "images", {"a.jpg": jpeg(0), "a.png": encode(picture(20, 16))})
    run(make_dataset(dataset_str=str(tmp_path / "images")), tmp_path / "out", Options(format="jpeg"))
    assert sorted(members(tmp_path / "out")) == ["a.jpg", "a_2.jpg"]


def test_long_and_foreign_names(tmp_path):
    names = ["é" * 60 + "/" + "x" * 200 + ".jpg", "plain/1.jpg"]
    write_files(tmp_path / "images", {name: jpeg(i) for i, name in enumerate(names)})
    run(make_dataset(dataset_str=str(tmp_path / "images")), tmp_path / "out")
    assert sorted(members(tmp_path / "out")) == sorted(names)


@pytest.mark.parametrize("shard_size", [0, 30_000])
def test_tiles(tmp_path, shard_size):
    write_files(tmp_path / "images", {"slide.png": encode(picture(300, 200)), "small.png": encode(picture(20, 20))})
    options = Options(tile=64, tile_above=0.05, short_side=10)
    summary = run(make_dataset(dataset_str=str(tmp_path / "images")), tmp_path / "out", options, shard_size=shard_size)
    assert (summary["tiled"], summary["changed"], summary["files"]) == (1, 1, 21)
    assert not list((tmp_path / "out").glob(".spool*"))
    assert shard_size or (tmp_path / "out" / "images" / "slide_y000136_x000236.png").exists()
    if shard_size:
        assert len(members(tmp_path / "out")) == 21 and summary["shards"] > 1


def test_slides_above_pillows_limit(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "images").mkdir()
    pixels = np.asarray(picture(300, 200))
    tifffile.imwrite(tmp_path / "images" / "slide.tif", pixels, tile=(64, 64), compression="zlib")
    write_files(tmp_path / "images", {"photo.png": encode(picture(300, 200)), "small.png": encode(picture(50, 40))})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    dataset = make_dataset(dataset_str=str(tmp_path / "images"))
    assert run(dataset, tmp_path / "without")["reasons"] == {"too large": 2}
    options = Options(tile=128, tile_above=0.01)
    summary = run(dataset, tmp_path / "out", options, shard_size=10**9)
    assert (summary["tiled"], summary["kept"], summary["bad"]) == (1, 1, 1)
    assert "convert it to a tiled TIFF" in (tmp_path / "out" / "bad_images.jsonl").read_text()
    found = members(tmp_path / "out")
    tile = np.asarray(Image.open(io.BytesIO(found["slide_y000072_x000172.png"])))
    assert (tile == pixels[72:, 172:]).all()
    monkeypatch.setitem(sys.modules, "tifffile", None)
    run(dataset, tmp_path / "no_tifffile", options)
    assert "pip install 'dinov2_custom[slides]'" in (tmp_path / "no_tifffile" / "bad_images.jsonl").read_text()


def test_a_damaged_slide_is_left_out(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "images").mkdir()
    slide = tmp_path / "images" / "slide.tif"
    tifffile.imwrite(slide, np.asarray(picture(300, 200)), tile=(64, 64), compression="zlib")
    data = slide.read_bytes()
    write_files(tmp_path / "images", {"slide.tif": overwritten(data, bytes(500)), "small.png": encode(picture(50, 40))})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    summary = run(make_dataset(dataset_str=str(tmp_path / "images")), tmp_path / "out", Options(tile=128))
    assert (summary["reasons"], summary["files"]) == ({"damaged TIFF": 1}, 1)
    assert not list((tmp_path / "out").glob(".spool*"))


def test_a_file_too_large_to_read_is_tiled_from_disk(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / "slide.tif", np.asarray(picture(100, 80)), rowsperstrip=8)
    monkeypatch.setattr("dinov2_custom.prepare.main.MAX_IMAGE_BYTES", 10_000)
    dataset = make_dataset(dataset_str=str(tmp_path / "images"))
    with pytest.raises(DataError, match="expected sound images, got none"):
        run(dataset, tmp_path / "without")
    assert run(dataset, tmp_path / "out", Options(tile=64))["tiled"] == 1
    assert len(members(tmp_path / "out")) == 4


def test_a_crashing_decoder_is_survived(tmp_path):
    files = {f"{i:02}.jpg": jpeg(i) for i in range(20)} | {"crash.SIGSEGV": b"x"}
    root = write_files(tmp_path / "images", files)
    summary = run(Listed(sorted(root.iterdir())), tmp_path / "out")
    assert (summary["kept"], summary["reasons"]) == (20, {"decoder died": 1})


KILLED = """
from pathlib import Path
from dinov2_custom.prepare.change import Options
from dinov2_custom.prepare.main import MARKER, prepare
from tests.verify.files import Listed
folder = Path({folder!r})
folder.mkdir()
(folder / MARKER).touch()
dataset = Listed(sorted(Path({images!r}).iterdir()), Path({log!r}), 0.02)
prepare(dataset, folder, {options!r}, shard_size={shard_size}, workers=2)
"""


@pytest.mark.parametrize("shard_size", [20_000, 0])
def test_killed_and_started_again(tmp_path, monkeypatch, shard_size):
    code = KILLED
    if not shard_size:
        code = "import dinov2_custom.prepare.parts as parts\nparts.FILES_A_PART = 7\n" + KILLED
        monkeypatch.setattr("dinov2_custom.prepare.parts.FILES_A_PART", 7)
    files = {f"{i:03}.jpg": jpeg(i) for i in range(80)} | {"007.jpg": b"", "020.png": encode(picture(300, 200))}
    images, folder, log = write_files(tmp_path / "images", files), tmp_path / "out", tmp_path / "log"
    options = Options(short_side=100, tile=64, tile_above=0.05)
    paths = sorted(images.iterdir())
    names = {"folder": str(folder), "images": str(images), "log": str(log)}
    kill_when(
        code.format(**names, options=options, shard_size=shard_size),
        lambda: len(list(folder.glob("shard*.jsonl"))) >= 3,
    )
    wait_for_end_of({int(line.split()[0]) for line in log.read_text().splitlines()})
    assert "summary.json" not in contents(folder)
    log.unlink()
    run(Listed(paths, log), folder, options, shard_size=shard_size)
    reads = [line.split()[1] for line in log.read_text().splitlines()]
    assert 0 < len(reads) == len(set(reads)) < len(files), "the rest, once"
    run(Listed(paths), tmp_path / "fresh", options, shard_size=shard_size, workers=1)
    assert contents(folder) == contents(tmp_path / "fresh")
    finished = contents(folder)
    log.unlink()
    run(Listed(paths, log), folder, options, shard_size=shard_size)
    assert not log.exists() and contents(folder) == finished, "a finished run has nothing left to do"


@pytest.mark.parametrize("shard_size", [20_000, 0])
def test_output_directory_inside_the_dataset_is_excluded(tmp_path, capsys, quiet, shard_size):
    write_files(tmp_path / "images", {f"{i}.jpg": jpeg(i) for i in range(3)})
    out = tmp_path / "images" / "prepared"
    words = [str(tmp_path / "images"), "--output-dir", str(out), "--shard-size", str(shard_size), "--workers", "1"]
    for _ in range(2):
        assert main(get_args_parser().parse_args(words)) == 0
        assert json.loads((out / "summary.json").read_text())["files"] == 3
    assert len(make_dataset(dataset_str=str(tmp_path / "images"))) == 3


def test_another_task_is_refused(mixed, tmp_path):
    run(mixed, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match="short_side: 0, now 9"):
        run(mixed, tmp_path / "out", Options(short_side=9))
    with pytest.raises(ConfigError, match="names: .*, now"):
        run(Listed([Path(mixed.name(0))]), tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("file", ["prepare.json", "shard-000000.jsonl"])
@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"next": [0]}', '{"next": [0, -1]}', "{"], ids=range(5))
def test_foreign_lists_are_rejected(mixed, tmp_path, file, text):
    run(mixed, tmp_path / "out")
    (tmp_path / "out" / file).write_text(text)
    with pytest.raises((ConfigError, DataError), match="choose an empty folder"):
        run(mixed, tmp_path / "out")


def test_a_damaged_list_is_one_error_of_the_command_too(tmp_path):
    write_files(tmp_path / "images", {"0.png": encode(picture(50, 40))})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text("{")
    arguments = [str(tmp_path / "images"), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="expected to read .*prepare.json.*choose an empty folder"):
        main(get_args_parser().parse_args(arguments))
    remove_logging("dinov2")


@pytest.fixture
def quiet():
    yield
    remove_logging("dinov2")
    logging.getLogger("dinov2").setLevel(logging.NOTSET)


def test_command_line(tmp_path, capsys, quiet):
    write_files(tmp_path / "images" / "a", {"1.jpg": jpeg(), "2.jpg": b"", "3.png": encode(picture(20, 16))})
    arguments = [str(tmp_path / "images"), "--output-dir", str(tmp_path / "out"), "--short-side", "50"]
    assert main(get_args_parser().parse_args(arguments)) == 0
    text = capsys.readouterr().out
    assert "kept as they are: 1, changed: 1, tiled: 0, left out: 1" in text
    assert "left out because: empty 1" in text
    assert set(members(tmp_path / "out")) == {"a/1.jpg", "a/3.png"}
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine").touch()
    with pytest.raises(ConfigError, match="nothing was changed"):
        main(get_args_parser().parse_args([str(tmp_path / "images"), "--output-dir", str(tmp_path / "foreign")]))
    assert not list((tmp_path / "foreign").glob("shard*"))


@pytest.mark.parametrize(
    "text, wanted", [("1GB", 10**9), ("500MB", 5 * 10**8), ("1.5 kb", 1500), ("0", 0), ("123", 123)]
)
def test_sizes(text, wanted):
    assert get_args_parser().parse_args(["x", "--output-dir", "o", "--shard-size", text]).shard_size == wanted


@pytest.mark.parametrize(
    "arguments",
    [["x"], ["--output-dir", "o"], ["x", "--quality", "0"], ["x", "--short-side", "-1"], ["x", "--shard-size", "big"]],
)
def test_usage_errors(arguments):
    with pytest.raises(SystemExit) as stop:
        get_args_parser().parse_args([*arguments, *(["--output-dir", "o"] if len(arguments) > 2 else [])])
    assert stop.value.code == 2


@pytest.mark.parametrize("limit", [None, 10_000], ids=["by Pillow", "above Pillow's limit"])
def test_tiles_of_deep_images_keep_their_levels(tmp_path, monkeypatch, limit):
    """Scaled by bit depth, all images would be black; the range is measured once, and a resumed run keeps it."""
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        rows = np.linspace(100, 400, 200).astype(np.uint16)[:, None] + rng.integers(0, 3, (200, 180), dtype=np.uint16)
        tifffile.imwrite(tmp_path / "images" / f"{i}.tif", rows, rowsperstrip=16)
    arguments = [str(tmp_path / "images"), "--tile", "64", "--tile-above", "0.01", "--shard-size", "0"]

    def tiles(out, *more):
        assert main(get_args_parser().parse_args([*arguments, "--output-dir", str(tmp_path / out), *more])) == 0
        found = sorted((tmp_path / out / "images").rglob("*.png"))
        assert len(found) == 3 * 4 * 3
        remove_logging("dinov2")
        return np.stack([np.asarray(Image.open(path).convert("L")) for path in found])

    seen = tiles("out")
    low, high = json.loads((tmp_path / "out" / MARKER).read_text())["intensity"]
    assert 100 <= low < 104 and 398 < high < 403
    assert len(np.unique(seen)) > 240
    for part in (tmp_path / "out").glob("shard-*"):
        part.unlink()  # as if the run had been killed immediately
    tifffile.imwrite(tmp_path / "images" / "0.tif", np.full((200, 180), 60_000, np.uint16))
    assert tiles("out")[:12].min() == 255
    assert json.loads((tmp_path / "out" / MARKER).read_text())["intensity"] == [low, high]
    assert tiles("given", "--intensity", "0", "1000").max() == 255
    with pytest.raises(ConfigError, match="--intensity: expected the smaller value first"):
        tiles("wrong", "--intensity", "9", "3")


def test_float_height_models_become_tiles(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 17_000)
    heights = np.random.default_rng(0).uniform(300, 900, (200, 180)).astype(np.float32)
    heights[:60] = -9999
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / "dem.tif", heights, rowsperstrip=16)
    arguments = [str(tmp_path / "images"), "--tile", "120", "--shard-size", "0", "--output-dir", str(tmp_path / "out")]
    assert main(get_args_parser().parse_args([*arguments, "--tile-above", "0.01"])) == 0
    remove_logging("dinov2")
    tile = np.asarray(Image.open(next((tmp_path / "out" / "images").glob("*y000000*"))).convert("L"))
    assert not tile[:60].any() and len(np.unique(tile[60:])) > 250


def test_shrunk_deep_images_stay_grey_and_visible(tmp_path):
    ramp = np.arange(100, 400, dtype=np.uint16).reshape(20, 15)
    write_files(tmp_path / "images", {"a.png": encode(Image.fromarray(ramp))})
    arguments = [str(tmp_path / "images"), "--short-side", "8", "--shard-size", "0"]
    assert main(get_args_parser().parse_args([*arguments, "--output-dir", str(tmp_path / "out")])) == 0
    remove_logging("dinov2")
    small = Image.open(tmp_path / "out" / "images" / "a.png")
    assert small.mode == "L" and np.ptp(np.asarray(small)) > 200
