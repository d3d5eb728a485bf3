"""A run's set-up: one configuration for all processes, written once, atomically."""

import argparse
import logging

import pytest
from omegaconf import OmegaConf

from dinov2_custom import distributed
from dinov2_custom.errors import ConfigError
from dinov2_custom.logging import remove_logging
from dinov2_custom.utils.config import apply_scaling_rules_to_cfg, get_cfg_from_args, setup, write_config
from tests.oracle import preserved_rng


def _args(tmp_path, *opts, **kwargs):
    opts = [f"train.dataset_path={tmp_path}", *opts]
    return argparse.Namespace(**{"config_file": "", "opts": opts, "output_dir": str(tmp_path / "out")} | kwargs)


@pytest.fixture
def logging_as_before():
    level = logging.getLogger().level
    yield
    distributed.disable()
    remove_logging()
    logging.getLogger().setLevel(level)


def test_setup(tmp_path, logging_as_before, capsys):
    args = _args(tmp_path, "train.batch_size_per_gpu=4", "train.seed=3")
    with preserved_rng():
        cfg = setup(args)
    out = tmp_path / "out"
    assert cfg.train.output_dir == args.output_dir == str(out)
    assert OmegaConf.load(out / "config.yaml") == cfg
    assert cfg.optim.lr == pytest.approx(0.004 * (4 / 1024) ** 0.5)
    log = (out / "logs" / "log.txt").read_text()
    assert "git: sha: " in log and f"output_dir={out}" in log
    assert log == capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "logs"]
    cfg.optim.lr, cfg.mine = 1.0, {"key": 3}  # as with upstream's, which real code changes
    assert (cfg.optim.lr, cfg.mine.key) == (1.0, 3)
    assert distributed.is_enabled() and distributed.get_global_size() == 1  # upstream's code calls torch.distributed


def test_mistakes_are_reported_before_anything_is_written(tmp_path, logging_as_before):
    with pytest.raises(ConfigError, match="optim.epoch"):
        setup(_args(tmp_path, "optim.epoch=3"))
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_pass_when_asked(tmp_path):
    cfg = get_cfg_from_args(_args(tmp_path, "mine.key=3", allow_unknown_keys=True))
    assert cfg.mine.key == 3


def test_output_dir_is_that_of_the_main_process(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: str(tmp_path / "of rank 0"))
    args = _args(tmp_path, output_dir="")
    cfg = get_cfg_from_args(args)
    assert cfg.train.output_dir == args.output_dir == str(tmp_path / "of rank 0")


@pytest.mark.parametrize(
    "base_lr, batch, world, lr", [(0.004, 64, 32, 0.00565685), (0.004, 64, 1, 0.001), (2e-4, 32, 96, 3.4641e-4)]
)
def test_learning_rate_rule(tmp_path, monkeypatch, base_lr, batch, world, lr):
    monkeypatch.setattr(distributed, "get_global_size", lambda: world)
    cfg = get_cfg_from_args(_args(tmp_path, f"optim.base_lr={base_lr}", f"train.batch_size_per_gpu={batch}"))
    assert cfg.optim.lr == pytest.approx(lr, rel=1e-5)
    editable = OmegaConf.create({"optim": {"base_lr": base_lr, "lr": 0, "scaling_rule": "sqrt_wrt_1024"}})
    editable = OmegaConf.merge(editable, {"train": {"batch_size_per_gpu": batch}})
    assert apply_scaling_rules_to_cfg(editable) is editable
    assert editable.optim.lr == cfg.optim.lr
    assert apply_scaling_rules_to_cfg(cfg).optim.lr == cfg.optim.lr


def test_unknown_scaling_rule():
    with pytest.raises(ConfigError, match="expected sqrt_wrt_1024, the only rule, got 'linear'"):
        apply_scaling_rules_to_cfg(OmegaConf.create({"optim": {"scaling_rule": "linear"}}))


def test_write_config_replaces_the_file_at_once(tmp_path, monkeypatch):
    cfg = OmegaConf.create({"a": "ä"})
    path = write_config(cfg, tmp_path)
    assert path == str(tmp_path / "config.yaml") and OmegaConf.load(path) == cfg
    monkeypatch.setattr("os.replace", lambda *paths: pytest.fail("stopped before the new file is in place"))
    with pytest.raises(pytest.fail.Exception):
        write_config(OmegaConf.create({"a": 2}), tmp_path)
    assert OmegaConf.load(path) == cfg


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "get_global_rank", lambda: 1)
    assert write_config(OmegaConf.create({}), tmp_path, name="c.yaml") == str(tmp_path / "c.yaml")
    assert list(tmp_path.iterdir()) == []
