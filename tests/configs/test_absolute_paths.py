import os

import pytest

from dinov2_custom.configs.absolute_paths import absent
from dinov2_custom.configs.load import load_run_config


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


def test_what_is_not_there(folder):
    there = ["images", f"{folder}/shard-{{0000..0127}}.tar", "s3://a/b", "", None, f"Tar:path='{folder}/more'"]
    assert absent([*there, f"{folder}/more/img_?.png"]) == []
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
