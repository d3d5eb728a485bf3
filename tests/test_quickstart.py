from __future__ import annotations

import base64
import json
import math
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.cli import quickstart_parser as get_args_parser
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.logging import remove_logging
from dinov2_custom.plots.history import COLOURS
from dinov2_custom.plots.metrics_file import Run
from dinov2_custom.quickstart import main as quickstart
from dinov2_custom.quickstart import photos, pictures
from dinov2_custom.quickstart.measure import Measurement, describe_collapse, measure_run
from dinov2_custom.quickstart.photos import (
    PHOTOS,
    Tiling,
    choose_corners,
    corners_inside,
    cut_photos,
    held_out_blocks,
    open_photo,
    training_corners,
)
from dinov2_custom.quickstart.pictures import RIGHT, WRONG, Neighbours, choose_typical, draw_neighbours
from dinov2_custom.quickstart.report import Pictures, make_report
from tests.browser import count_pixels, needs_browser

REPOSITORY = Path(__file__).resolve().parents[1]
FEW = {name: PHOTOS[name] for name in ("coins", "handwriting", "print")}
SMALL = Tiling(train=6, held_out=4)
TINY = [
    "student.arch=vit_nano",
    "student.drop_path_rate=0.0",
    "student.patch_size=8",
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "crops.local_crops_number=1",
    "dino.head_n_prototypes=16",
    "dino.head_hidden_dim=16",
    "dino.head_bottleneck_dim=8",
    "train.batch_size_per_gpu=4",
    "train.OFFICIAL_EPOCH_LENGTH=1",
    "train.num_workers=0",
    "train.log_every=1",
    "teacher.warmup_teacher_temp_epochs=0",
    "optim.freeze_last_layer_epochs=0",
    "optim.epochs=2",
    "optim.warmup_epochs=1",
    "evaluation.online.every=1",
    "evaluation.online.images=4",
]


@pytest.fixture(autouse=True)
def no_handlers_left():
    yield
    remove_logging("dinov2")


@pytest.mark.parametrize("name", PHOTOS)
def test_every_photograph_is_in_the_package_and_large_enough(name):
    photo = open_photo(name, longest=700)
    assert photo.mode == "RGB" and max(photo.size) <= 700
    tiling = Tiling(step=16)
    blocks = held_out_blocks(photo.height, photo.width, tiling.block)
    assert corners_inside(blocks, tiling) and training_corners((photo.height, photo.width), blocks, tiling)


@pytest.mark.parametrize("shape", [(172, 448), (191, 384), (303, 384), (512, 512)])
def test_training_and_held_out_pixels_are_apart(shape):
    noise = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    tiling = Tiling(train=10**6, held_out=10**6)
    corners = choose_corners(noise, tiling, 0, "noise")
    used = {part: np.zeros(shape, bool) for part in corners}
    for part, chosen in corners.items():
        assert len(chosen) >= 40
        for top, left in chosen:
            assert 0 <= top <= shape[0] - tiling.size and 0 <= left <= shape[1] - tiling.size
            used[part][top : top + tiling.size, left : left + tiling.size] = True
    near = np.zeros(shape, bool)  # all that is less than the gap away from a held-out pixel
    for y, x in zip(*np.nonzero(used["held_out"]), strict=True):
        near[max(y - tiling.gap + 1, 0) : y + tiling.gap, max(x - tiling.gap + 1, 0) : x + tiling.gap] = True
    assert not (near & used["train"]).any()
    assert (used["train"] | used["held_out"]).mean() > 0.4


def test_flat_places_are_left_out_and_limits_kept():
    gray = np.full((300, 300), 7, np.uint8)
    gray[:, :150] = np.random.default_rng(0).integers(0, 256, (300, 150))
    corners = choose_corners(gray, Tiling(train=20, held_out=9), 0, "half")
    assert [len(corners[part]) for part in ("train", "held_out")] == [20, 9]
    assert max(left for part in corners.values() for _, left in part) < 150
    assert choose_corners(gray, Tiling(train=20, held_out=9), 1, "half") != corners


def test_tiles_are_grey_and_cut_once(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "PHOTOS", FEW)
    counts = cut_photos(tmp_path, SMALL)
    assert counts == {"train": dict.fromkeys(FEW, 6), "held_out": dict.fromkeys(FEW, 4)}
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 30
    with Image.open(files[0]) as tile:
        assert (tile.mode, tile.size) == ("L", (64, 64))
    before = {file: file.stat().st_mtime_ns for file in files}
    assert cut_photos(tmp_path, SMALL) == counts
    assert {file: file.stat().st_mtime_ns for file in files} == before
    (tmp_path / photos.DONE).write_text("{")  # torn
    assert cut_photos(tmp_path, SMALL) == counts
    assert cut_photos(tmp_path, SMALL._replace(train=2))["train"] == dict.fromkeys(FEW, 2)
    assert len(list(tmp_path.rglob("*.png"))) == 18


def test_scikit_image_missing(monkeypatch):
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="expected the package scikit-image, got none; pip install"):
        open_photo("cat")


@pytest.mark.parametrize(
    "dino_loss, teacher_entropy, prototype_entropy, words",
    [
        (5.54, 4.0, 5.5, "ln(prototypes) = 5.545"),
        (7.0, 5.54, 5.54, "every image is spread evenly"),
        (2.0, 0.01, 0.01, "one prototype"),
        (4.9, 4.0, 5.4, ""),
    ],
)
def test_collapse_is_named(dino_loss, teacher_entropy, prototype_entropy, words):
    said = describe_collapse(dino_loss, teacher_entropy, prototype_entropy, 256)
    assert words in said and bool(words) == bool(said)


def test_report_of_several_seeds_states_mean_spread_and_alarm():
    good = Measurement(0.3, 0.5, 0.75, 4.0, 5.0, 200, 256, 4.9, "")
    bad = good._replace(trained=0.55, collapse="one prototype takes every image")
    lines = quickstart.describe({0: good, 1: bad}, 960, 16)
    assert any("trained teacher" in line and "0.650   from 0.550 to 0.750 over 2 seeds" in line for line in lines)
    assert any("gained by training" in line and "0.150" in line for line in lines)
    assert [line for line in lines if line.startswith("ALARM")] == [
        "ALARM: seed 1 collapsed: one prototype takes every image"
    ]


def run(out, *arguments):
    args = get_args_parser().parse_args(["--config-file", "", "--output-dir", str(out), *arguments, *TINY])
    return quickstart.main(args, SMALL)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(photos, "PHOTOS", FEW)
    monkeypatch.setattr(quickstart, "SHOWN", ("print",))
    monkeypatch.setattr(pictures, "STEP", 64)


class Contents(HTMLParser):
    """Collect the text, the tags and what the tags refer to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.links = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data):
        self.text += data


def test_end_to_end(few, tmp_path, capsys):
    out = tmp_path / "d\u00fcr <b>& aus"  # as a folder may be called
    code = run(out, "--seeds", "3,4")
    summary = capsys.readouterr().out
    results = json.loads((out / "quickstart.json").read_text())
    assert set(results) == {"3", "4"}
    assert code == int(any(r["collapse"] for r in results.values())) == int("ALARM" in summary)
    for figure in ("loss_curve.png", "neighbours.png", "pca.png"):
        with Image.open(out / figure) as image:
            assert min(image.size) > 50
    assert "12 held-out tiles of 3 photographs" in summary and "over 2 seeds" in summary
    assert (out / "report.html").as_uri() in summary
    for seed, r in results.items():
        assert r["num_prototypes"] == 16 and r["final_dino_loss"] > 0
        assert 0 <= r["teacher_entropy"] <= r["prototype_entropy"] + 1e-4 <= math.log(16) + 2e-4
        last = json.loads((out / f"seed_{seed}" / "training_metrics.json").read_text().splitlines()[-1])
        assert [r["raw_pixels"], r["untrained"], r["trained"]] == [
            last[f"{k}_knn"] for k in ("pixels", "start", "eval")
        ]
    assert results["3"]["final_dino_loss"] != results["4"]["final_dino_loss"]

    page = Contents((out / "report.html").read_text())
    shown = [link for link in page.links if not link.startswith("#")]
    for link, figure in zip(shown, ("neighbours.png", "pca.png"), strict=True):  # and nothing from elsewhere
        kind, _, data = link.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data) == (out / figure).read_bytes()
    assert page.tags.count("svg") == 1 and not {"script", "link", "iframe", "b"} & set(page.tags)
    assert f"{results['4']['trained']:.3f}" in page.text and "train.dataset_path=/my/images" in page.text
    assert shlex.quote(str(out / "seed_3")) in page.text

    weights = {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")}
    (out / "report.html").unlink()  # interrupted before it was written
    run(out, "--seeds", "3,4")  # finished runs are measured again, not trained
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pth")} == weights
    assert json.loads((out / "quickstart.json").read_text()) == results and (out / "report.html").exists()


def test_a_uniform_teacher_raises_the_alarm(few, tmp_path, capsys):
    code = run(tmp_path / "out", "optim.base_lr=1e-6", "optim.min_lr=0", "teacher.teacher_temp=5")
    assert code == 1
    assert "ALARM: seed 0 collapsed: every image is spread evenly" in capsys.readouterr().out
    assert "Seed 0 collapsed: every image is spread evenly" in (tmp_path / "out" / "report.html").read_text()


def test_what_the_report_needs_is_checked_before_training(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"evaluation\.online\.every"):
        quickstart.main(get_args_parser().parse_args(["--output-dir", str(tmp_path), "evaluation.online.every=0"]))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="matplotlib"):
        quickstart.main(get_args_parser().parse_args(["--output-dir", str(tmp_path)]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="expected start_knn"):  # a run of before
        measure_run(tmp_path, tmp_path, {"eval_knn": 0.5, "pixels_knn": 0.3})


def test_the_tiles_shown_are_typical():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 30)
    hits = np.stack([generator.integers(0, 6, len(labels)) / 5 for _ in range(3)], axis=1) * [0.5, 0.8, 1]
    chosen = choose_typical(hits, labels, 6)
    assert len(set(labels[chosen])) == 6 and chosen == choose_typical(hits, labels, 6)
    np.testing.assert_allclose(hits[chosen].mean(axis=0), hits.mean(axis=0), atol=0.05)
    assert len(choose_typical(hits, np.minimum(labels, 1), 6)) == 2


@needs_browser
def test_a_browser_shows_the_report(tmp_path):
    tile = tmp_path / "cat" / "y0_x0.png"
    tile.parent.mkdir()
    Image.new("L", (64, 64), 90).save(tile)
    wrong = Path(shutil.copytree(tile.parent, tmp_path / "coins"), tile.name)
    found = Neighbours(
        [tile], {"untrained": [[tile, wrong]], "trained": [[tile, tile]]}, {"untrained": 0.5, "trained": 1}
    )
    assert found.count_right("untrained") == 1 and found.count_right("trained") == 2
    drawn = draw_neighbours(found, tmp_path / "neighbours.png")
    knn = {"pixels_knn": 0.2, "start_knn": 0.3}
    rows = [{"iteration": i, "epoch": 1.0 + i, "eval_knn": 0.5 + i / 10, **knn} for i in range(3)]
    good = Measurement(0.2, 0.3, 0.7, 4.0, 5.0, 200, 256, 4.9, "")
    counts = {"train": {"cat": 2}, "held_out": {"cat": 1}}
    shown = Pictures(drawn, drawn, {"untrained": 0.9, "trained": 0.4})
    (tmp_path / "report.html").write_text(make_report({0: good}, [Run("seed 0", rows, {})], counts, shown, {}))
    assert min(count_pixels(tmp_path / "report.html", [RIGHT, WRONG, COLOURS[0]], tmp_path)) > 50


def test_script_help_is_quick_to_import():
    command = [sys.executable, "-X", "importtime", "run/quickstart.py", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0 and "--seeds" in done.stdout
    assert "torch" not in done.stderr.replace("dinov2", "")


def test_a_forks_recipe_can_be_tried(tmp_path):
    given = ["--config-file", "", "--output-dir", str(tmp_path), "of.a.fork=1"]
    args = get_args_parser().parse_args([*given, "--allow-unknown-keys"])
    assert quickstart.training_args(args, tmp_path, tmp_path, 0).allow_unknown_keys
    with pytest.raises(ConfigError, match="--allow-unknown-keys"):
        quickstart.main(get_args_parser().parse_args(given))
