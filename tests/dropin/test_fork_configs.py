"""A fork's YAML: adopted keys work, the others are listed with their replacements."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.data.spec import parse_dataset
from dinov2_custom.errors import ConfigError

FORK = str(Path(__file__).with_name("fork.yaml"))
NOT_ADOPTED = {
    "daino": "side loss",
    "optim.max_iter": "train.max_steps",
    "tune": "evaluation.online.knn_train",
    "wandb.enable": "wandb.mode",
}


def test_all_that_is_not_adopted_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_run_config(FORK, output_dir=str(tmp_path))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(NOT_ADOPTED)} mistakes in the configuration:"
    for line, (key, instead) in zip(lines[1:-1], sorted(NOT_ADOPTED.items()), strict=True):
        assert line.startswith(f"  - {key} ({FORK}): expected a known key") and instead in line
    assert "--allow-unknown-keys" in lines[-1]


def test_it_loads_with_a_list_of_unused_keys(tmp_path):
    told = []
    cfg = load_run_config(FORK, output_dir=str(tmp_path), allow_unknown_keys=True, warn=told.append)
    (listed,) = [text for text in told if text.startswith("unknown keys, kept but not used:")]
    lines = listed.splitlines()[1:]
    for line, (key, instead) in zip(lines, sorted(NOT_ADOPTED.items()), strict=True):
        assert line.startswith(f"  {key} ({FORK})") and instead in line
    assert "with loss_weight, labelled_batch_size_per_gpu, labelled_dataset_path" in lines[0]
    assert (cfg.train.path_preserved, cfg.train.frac, cfg.wandb.project) == ("/cells/first", 0.1, "cells")
    assert (cfg.student.num_register_tokens, cfg.optim.warmup_epochs, cfg.train.centering) == (4, 80, "sinkhorn_knopp")
    assert parse_dataset(cfg.train.dataset_path).roots == ("/cells/first", "/cells/second")
    assert cfg.daino.loss_weight == 1.0  # a fork's own code still finds it


def test_a_forks_default_for_no_hold_out_and_numbers_as_labels(tmp_path):
    path = tmp_path / "fork.yaml"
    path.write_text("train: {dataset_path: /cells, path_preserved: '', frac: 1}\nwandb: {tags: [vitl, 2024, 0.5]}\n")
    cfg = load_run_config(str(path), output_dir=str(tmp_path), warn=pytest.fail)
    assert (cfg.train.frac, list(cfg.wandb.tags)) == (1, ["vitl", 2024, 0.5])
    assert load_run_config(str(path), ["wandb.tags=7"]).wandb.tags == "7"
    assert load_run_config(str(path), ["wandb={tags: 7}"]).wandb.tags == 7
