"""Features of a dataset in a file: rows and their order, equal after a kill and for one or two processes."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.cli import embed_parser as get_args_parser
from dinov2_custom.data.transforms import make_classification_eval_transform
from dinov2_custom.embed.main import compute, image_sizes, main
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.teacher import Teacher, load_teacher
from tests import processes
from tests.eval.test_setup import make_run
from tests.export.backbones import make_teacher
from tests.processes import REPOSITORY, Job, wait_until


@pytest.fixture
def weights(tmp_path):
    torch.save(make_teacher("registers").backbone.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def images(tmp_path):
    """Seven images in two class folders, the third of which is corrupt."""
    pixels = np.random.default_rng(0).integers(0, 255, (7, 40, 60, 3), dtype=np.uint8)
    for number, one in enumerate(pixels):
        path = tmp_path / "images" / ("ants" if number < 4 else "bees") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(path)
    (tmp_path / "images" / "ants" / "2.png").write_bytes(b"broken")
    return tmp_path / "images"


def run(*arguments):
    return main(get_args_parser().parse_args([*map(str, arguments), "--num-workers", "0", "--device", "cpu"]))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_are_the_readable_images_in_order(weights, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        run(weights, f"LabelledFolder:root={images}", "--output-dir", out, "--image-size", 32, "--batch-size", 2) == 0
    )
    rows, features = rows_of(out), np.load(out / "features.npy")
    assert [Path(row["path"]).name for row in rows] == [f"{i}.png" for i in (0, 1, 3, 4, 5, 6)]
    assert [row["label"] for row in rows] == ["ants"] * 3 + ["bees"] * 3
    teacher = load_teacher(str(weights))
    transform = make_classification_eval_transform(resize_size=37, crop_size=32, **teacher.normalize)
    for row, feature in zip(rows, features, strict=True):
        image = transform(Image.open(row["path"]))
        with torch.inference_mode():
            wanted = teacher.backbone(image[None])[0]
        torch.testing.assert_close(torch.from_numpy(feature), wanted, rtol=1e-4, atol=1e-4)
    (bad,) = [json.loads(line) for line in (out / "bad_images.jsonl").read_text().splitlines()]
    assert bad["path"].endswith("2.png") and "expected an image" in bad["reason"]
    assert "rows=6 bad images=1" in capsys.readouterr().err
    assert not (out / "parts").exists()
    assert (
        run(weights, f"LabelledFolder:root={images}", "--output-dir", out, "--image-size", 32, "--batch-size", 2) == 0
    )
    assert "complete already" in capsys.readouterr().err


def test_a_run_several_sizes_and_parquet(images, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    make_run(tmp_path / "cells")
    monkeypatch.chdir(tmp_path)
    options = ["--features", "cls+mean", "--l2", "--save-dtype", "float16"]
    run("cells", images, "--image-size", 16, 32, "--format", "parquet", *options)
    run("cells", images, "--output-dir", tmp_path / "own size", *options)
    small, large = (parquet.read_table(tmp_path / "outputs/embed/cells" / s / "features.parquet") for s in ("16", "32"))
    features = np.stack(small["features"].to_numpy(zero_copy_only=False))
    assert features.dtype == np.float16 and features.shape == (6, 128)
    np.testing.assert_allclose(np.linalg.norm(features.astype(np.float32), axis=1), 1, atol=2e-3)
    assert np.array_equal(features, np.load(tmp_path / "own size" / "features.npy"))
    assert small["path"].to_pylist() == [row["path"] for row in rows_of(tmp_path / "own size")]
    assert not np.array_equal(features, np.stack(large["features"].to_numpy(zero_copy_only=False)))
    assert small.column_names == ["path", "features"]


def test_released_weights_are_seen_at_224_with_and_without_their_configuration(tmp_path):
    backbone = SimpleNamespace(patch_size=14)
    released = REPOSITORY / "dinov2_custom" / "configs" / "eval" / "vits14_pretrain.yaml"  # positions for 518
    for config_file in ("", str(released)):
        assert image_sizes(Teacher(backbone, 518, {}, "weights.pth", config_file), []) == [224]
    assert image_sizes(Teacher(backbone, 70, {}, "an_export"), []) == [70]
    recipe = str(REPOSITORY / "configs" / "vits.yaml")
    assert image_sizes(Teacher(backbone, 98, {}, "weights.pth", recipe), []) == [98]


def test_kinds_of_features():
    backbone = make_teacher("registers").backbone
    images = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    tokens = backbone.forward_features(images)
    both = compute(backbone, images, "cls+mean")
    torch.testing.assert_close(both[:, :64], tokens["x_norm_clstoken"])
    torch.testing.assert_close(both[:, 64:], tokens["x_norm_patchtokens"].mean(dim=1))
    assert torch.equal(compute(backbone, images, "mean"), both[:, 64:])
    half = compute(backbone, images, "cls", precision="bf16")
    assert half.dtype == torch.float32 and 0 < (half - both[:, :64]).abs().max() < 1


def script(*arguments, processes=1):
    launcher = ["--cpu", "--ngpus", str(processes)]
    return ["run/embed.py", *map(str, arguments), "--num-workers", "0", *launcher]


def test_killed_and_resumed_by_two_processes(weights, images, tmp_path):
    listed = tmp_path / "many.txt"
    readable = sorted(path for path in images.rglob("*.png") if path.name != "2.png")
    listed.write_text("".join(f"{readable[i % 6]}\n" for i in range(240)))
    options = [weights, listed, "--batch-size", 1, "--image-size", 64]
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = Job(*script(*options, "--output-dir", out))
    wait_until(lambda: list(out.glob("parts/*.npz")), "the first part", [process])
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (out / "features.npy").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.npz")}
    assert 0 < len(kept) < 8

    again = processes.run(*script(*options, "--output-dir", out, processes=2))
    assert again.returncode == 0, again.stderr
    assert f"240 in {listed}, {32 * len(kept)} done before" in again.stderr
    run(*options, "--output-dir", whole)
    assert np.array_equal(np.load(out / "features.npy"), np.load(whole / "features.npy"))
    assert rows_of(out) == rows_of(whole) and len(rows_of(out)) == 240


def test_other_features_are_refused(weights, images, tmp_path):
    options = [weights, images, "--output-dir", tmp_path / "out", "--image-size", 32]
    run(*options)
    with pytest.raises(
        ConfigError, match=r"(?s)got others:\n  features: 'cls', now 'mean'\n  l2: False, now True\n"
    ):
        run(*options, "--features", "mean", "--l2")
    Image.new("RGB", (40, 40)).save(images / "new.png")
    with pytest.raises(ConfigError, match=r"images: 7, now 8\n  names_sha256"):
        run(*options)
    run(*options, "--overwrite")
    assert len(np.load(tmp_path / "out" / "features.npy")) == 7
    (tmp_path / "out" / "embed.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="expected to read .*embed.json.*--overwrite"):
        run(*options)
    (tmp_path / "out" / "embed.json").unlink()
    with pytest.raises(ConfigError, match="features.npy of unknown origin"):
        run(*options)


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
def test_foreign_files_with_our_names_are_kept(weights, images, tmp_path, flags):
    """A run directory may have its own bad_images.jsonl, and an image folder a subfolder named parts."""
    for name in ("bad_images.jsonl", "parts/1.png"):
        path = tmp_path / name.split("/")[0].replace(".", "_") / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        folder = tmp_path / path.relative_to(tmp_path).parts[0]
        with pytest.raises(ConfigError, match=f"expected only files of this .* got {name.split('/')[0]} of unknown"):
            run(weights, images, "--output-dir", folder, "--image-size", 32, *flags)
        assert path.read_text() == "mine"


def test_mistakes(weights, images, tmp_path):
    with pytest.raises(ConfigError, match="--image-size: expected multiples of the patch size 8, got 30, 4"):
        run(weights, images, "--image-size", 32, 30, 4)
    with pytest.raises(ConfigError, match="--batch-size: expected at least 1, got 0"):
        run(weights, images, "--batch-size", 0)
    with pytest.raises(ConfigError, match="which is a file -> choose another with --output-dir$"):
        run(weights, images, "--output-dir", weights)
    for path in images.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="expected readable images, got 7 unreadable ones"):
        run(weights, images, "--output-dir", tmp_path / "out")


def test_script_reports_errors(tmp_path):
    done = processes.run(*script(tmp_path / "none.pth", tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("error: checkpoint: expected a weight file")


def test_missing_pyarrow_is_reported_before_anything_is_computed(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="--format parquet: expected the package pyarrow"):
        main(get_args_parser().parse_args([str(tmp_path / "none"), str(images), "--format", "parquet"]))
