import datetime
import os
from pathlib import Path

import pytest

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.configs.paths import absent, check_output_dir, resolve_output_dir
from dinov2_custom.errors import ConfigError

NOW = datetime.datetime(2025, 1, 2, 3, 4, 5)


def test_argument_overrides_configuration():
    assert resolve_output_dir("/a", "/b") == "/a"
    assert resolve_output_dir("", "/b") == resolve_output_dir(None, "/b") == "/b"


def test_default_is_dated_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_output_dir(None, "", NOW) == f"{tmp_path}/outputs/2025-01-02_03-04-05"
    assert os.listdir(tmp_path) == []
    for taken, free in (("05", "05_2"), ("05_2", "05_3")):
        os.makedirs(f"outputs/2025-01-02_03-04-{taken}")
        assert resolve_output_dir(None, "", NOW) == f"{tmp_path}/outputs/2025-01-02_03-04-{free}"


def test_paths_are_absolute_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_output_dir("out", None) == f"{tmp_path}/out"
    assert resolve_output_dir("~/out", None) == "/home/someone/out"
    assert resolve_output_dir(".", None) == str(tmp_path)


def test_a_directory_that_can_be_made_is_fine_and_nothing_is_left(tmp_path):
    check_output_dir(str(tmp_path))
    check_output_dir(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("inside", ["", "sub", "sub/sub"])
def test_a_file_in_the_way(tmp_path, inside):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=f"got {file}, which is a file -> choose another with --output-dir"):
        check_output_dir(str(file / inside))


def test_a_dangling_link_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="which is no folder"):
        check_output_dir(str(tmp_path / "link" / "out"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, where even root cannot make folders")
def test_a_place_where_nothing_can_be_made():
    with pytest.raises(ConfigError, match="writable place.* in /proc"):
        check_output_dir("/proc/out")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("images", "more", "images/sub"):
        (tmp_path / name).mkdir()
    for name in ("w.pth", "list.csv", "shard-0000.tar"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return str(tmp_path)


def load(key, value):
    cfg = load_run_config("", [f"{key}={value}"], "out", require_dataset=False)
    section, name = key.split(".")
    return cfg[section][name]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("images", "{0}/images"),
        ("./images/sub", "{0}/images/sub"),
        ("[images, more]", ["{0}/images", "{0}/more"]),
        ("list.csv", "{0}/list.csv"),
        ("shard-{0000..0127}.tar", "{0}/shard-{0000..0127}.tar"),
        ("images/*/?.jpg", "{0}/images/*/?.jpg"),
        ("Tar:path=shard-{0000..0127}.tar", "Tar:path={0}/shard-{0000..0127}.tar"),
        ("ImageDataset:root=i*", "ImageDataset:root={0}/i*"),
        ("ImageList:path=list.csv:column=i:root=images", "ImageList:path={0}/list.csv:column=i:root={0}/images"),
        ("ImageNet:split=TRAIN:root=images:extra='more'", "ImageNet:split=TRAIN:root={0}/images:extra='{0}/more'"),
        ("[{path: images, weight: 0.7}, {path: more, weight: 0.3}]",
         [{"path": "{0}/images", "weight": 0.7}, {"path": "{0}/more", "weight": 0.3}]),
        ("{kind: ImageNet, split: TRAIN, root: images}", {"kind": "ImageNet", "split": "TRAIN", "root": "{0}/images"}),
        ("absent", "absent"),
        ("ImageDataset:root=absent", "ImageDataset:root=absent"),
        ("s3://images/sub", "s3://images/sub"),
        ("/nowhere", "/nowhere"),
    ],
)  # fmt: skip
def test_dataset_paths(folder, given, expected):
    def fill(one):
        if isinstance(one, str):
            return one.replace("{0}", folder)
        if isinstance(one, dict):
            return {key: fill(value) for key, value in one.items()}
        return [fill(value) for value in one] if isinstance(one, list) else one

    assert load("train.dataset_path", given) == fill(expected)


def test_missing_paths(folder):
    patterns = [f"{folder}/{name}" for name in ("shard-{0000..0127}.tar", "image?/1.jpg", "images/**/?.jpg")]
    there = ["images", *patterns, "s3://a/b", "", None, f"Tar:path='{folder}/more'"]
    assert absent(there) == []
    gone = ["/nowhere/a", {"kind": "ImageNet", "root": "/nowhere/b"}, 'ImageNet:root="/nowhere/c":extra=/nowhere/d']
    assert absent([*gone, "/nowhere/{0..3}.tar"]) == [*(f"/nowhere/{n}" for n in "abcd"), "/nowhere/{0..3}.tar"]


def test_other_paths(folder):
    assert load("student.pretrained_weights", "w.pth") == f"{folder}/w.pth"
    assert load("MODEL.WEIGHTS", "w.pth") == f"{folder}/w.pth"
    assert load("train.path_preserved", "[images]") == [f"{folder}/images"]
    assert load("wandb.name", "images") == "images"


def test_a_working_directory_with_a_colon_is_quoted(folder, monkeypatch):
    os.makedirs("a:b/images")
    monkeypatch.chdir("a:b")
    got = load("train.dataset_path", "ImageDataset:root=images")
    assert got == f'ImageDataset:root="{folder}/a:b/images"'


def test_a_runs_own_configuration_works_from_elsewhere(folder, monkeypatch, tmp_path):
    from omegaconf import OmegaConf

    cfg = load_run_config("", ["train.dataset_path=ImageDataset:root=images"], "out", require_dataset=False)
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    monkeypatch.chdir("/")
    again = load_run_config(str(tmp_path / "config.yaml"), require_dataset=True)
    assert again == cfg
