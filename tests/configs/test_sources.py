from pathlib import Path

import pytest

from dinov2_custom.configs.mistakes import Mistakes
from dinov2_custom.configs.sources import Setting, parse_yaml, read_file, read_overrides, section_keys


def overrides(*texts):
    mistakes = Mistakes()
    settings = read_overrides(texts, mistakes)
    return [(setting.key, setting.value) for setting in settings], mistakes.lines


def file(path, text):
    path.write_text(text)
    mistakes = Mistakes()
    return read_file(str(path), mistakes), mistakes.lines


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("1e-3", 1e-3),
        ("2.0e-04", 2e-4),
        ("[0.1,0.5]", [0.1, 0.5]),
        ("null", None),
        ("", None),
        ("-1", -1),
        ("'1'", "1"),
        ("${oc.env:HOME}", "${oc.env:HOME}"),
    ],
)
def test_values_are_yaml(text, value):
    assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value)
    assert overrides(f"optim.base_lr={text}") == ([("optim.base_lr", value)], [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/a b/c: d #1", "/a b/c: d #1"),
        ("2024", "2024"),
        ("ImageNet:split=TRAIN:root=/a:extra=/b", "ImageNet:split=TRAIN:root=/a:extra=/b"),
        (r"C:\new", r"C:\new"),
        ("[/a,/b c]", ["/a", "/b c"]),
        ("'[/a]'", "[/a]"),
        ("[{path: /a, weight: 0.7}, /b]", [{"path": "/a", "weight": 0.7}, "/b"]),
        ("{path: 'a:b', column: x}", {"path": "a:b", "column": "x"}),
        ("{a,b}/s-{0..3}.tar", "{a,b}/s-{0..3}.tar"),
        ("{a,b}", "{a,b}"),
        ("null", None),
        ("", ""),
    ],
)
def test_texts_are_taken_as_they_stand(text, value):
    assert overrides(f"train.dataset_path={text}") == ([("train.dataset_path", value)], [])


def test_a_whole_section_can_be_given():
    settings, lines = overrides("optim={epochs: 20, base_lr: 5e-4}")
    assert settings == [("optim.epochs", 20), ("optim.base_lr", 5e-4)] and lines == []


def test_bad_overrides_are_all_reported():
    malformed = ["foo", "=3", "train..seed=2", "a b=1"]
    settings, lines = overrides("train.seed=1", *malformed, "optim.min_lr=[0.1,", "student=5")
    assert settings == [("train.seed", 1)]
    where = [line.split(":")[0] for line in lines]
    assert where == ["override"] * 4 + ["optim.min_lr (override)", "student (override)"]
    assert "a section with keys arch, patch_size, " in lines[-1]


def test_no_file_is_no_settings():
    assert read_file(None, Mistakes()) == read_file("", Mistakes()) == []


def test_file_is_flattened_and_unknown_sections_stay_whole(tmp_path):
    path = tmp_path / "x.yaml"
    settings, lines = file(path, "train:\n  seed: 3\nteacher:\ncrops: {}\ntune:\n  knn: {k: 1}\noptim.epochs: 2\n")
    assert lines == []
    assert settings == [
        Setting("train.seed", 3, str(path)),
        Setting("tune", {"knn": {"k": 1}}, str(path)),
        Setting("optim.epochs", 2, str(path)),
    ]


def test_empty_file_is_fine(tmp_path):
    assert file(tmp_path / "x.yaml", "# nothing\n") == ([], [])


@pytest.mark.parametrize("text", ["a: [", "a: 1\na: 2\n", "5", "- a", "a: ${b", "\tx: 1"])
def test_files_that_are_no_configuration(tmp_path, text):
    settings, (line,) = file(tmp_path / "x.yaml", text)
    assert settings is None and line.startswith(f"--config-file {tmp_path}/x.yaml: expected ")
    assert "\n" not in line


def test_file_that_is_no_text_or_a_folder(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    mistakes = Mistakes()
    assert read_file(str(tmp_path / "x.yaml"), mistakes) is None
    assert read_file(str(tmp_path), mistakes) is None
    assert len(mistakes.lines) == 2


def test_missing_file_names_near_ones_and_those_in_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    for name in ("vits.yaml", "cells.yaml"):
        (tmp_path / "configs" / name).write_text("")
    mistakes = Mistakes()
    assert read_file("cell.yaml", mistakes) is None
    (line,) = mistakes.lines
    assert "did you mean configs/cells.yaml? there is: configs/cells.yaml, configs/vits.yaml" in line


def test_missing_file_of_upstreams_path_is_found_in_the_package():
    mistakes = Mistakes()
    read_file("dinov2/configs/train/vitl16_short.yaml", mistakes)
    assert "dinov2_custom/configs/train/vitl16_short.yaml" in mistakes.lines[0]


def test_section_keys():
    assert section_keys()["crops"][-1] == "local_crops_size"
    assert section_keys()["compute_precision.teacher"] == ["backbone", "dino_head", "ibot_head"]
