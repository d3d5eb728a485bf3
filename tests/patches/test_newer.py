"""The patches on what upstream added between f896929 and 7764ea0; see ``newer.py``."""

from __future__ import annotations

import pytest
import torch

from dinov2_custom.cli import patches_parser as get_args_parser
from dinov2_custom.patching.checkout import unused_names
from dinov2_custom.patching.main import main
from tests.oracle import reduced_depth
from tests.patches.newer import as_7764ea0
from tests.patches.test_checkout import SERIES, apply, contents
from tests.patches.test_faults import config
from tests.patches.world import patched, world


@pytest.fixture
def newer(checkout):
    return as_7764ea0(checkout)


def test_all_apply_take_effect_and_come_out(newer, capsys):
    before = contents(newer)
    apply(newer)
    assert f"applied: {', '.join(patch.name for patch in SERIES)} (" in capsys.readouterr().out
    assert main(get_args_parser().parse_args([str(newer), "--status"])) == 0
    assert {line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()} == {"applied"}
    assert [unused_names(patch, newer) for patch in SERIES] == [[]] * len(SERIES)
    apply(newer, "--revert")
    assert contents(newer) == before


@pytest.mark.parametrize("disabled", [False, True])
def test_the_student_computes_without_xformers(newer, monkeypatch, disabled):
    if disabled:
        monkeypatch.setenv("XFORMERS_DISABLED", "1")
    patched(newer)
    with world(newer) as load:
        cfg = config(load("configs"))
        assert (cfg.student.in_chans, cfg.train.cell_augmentation) == (3, False)
        load("train.train")
        with reduced_depth(load("models.vision_transformer"), 2):
            student, _, _ = load("models").build_model_from_cfg(cfg)
        crops = [torch.ones(2, 3, 28, 28), torch.ones(3, 3, 14, 14)]
        features = student.train()(crops, masks=[None, None], is_training=True)
        sum(one["x_norm_clstoken"].square().mean() for one in features).backward()
    assert student.blocks[0].attn.qkv.weight.grad.isfinite().all()


def test_cell_data_stays_the_checkouts_own(newer, tmp_path):
    patched(newer, "unlabeled_datasets", "no_xformers")
    with world(newer) as load, pytest.raises(ValueError, match='Unsupported dataset "HPAone"'):
        load("data").make_dataset(dataset_str=f"HPAone:split=TRAIN:root={tmp_path}:mode=A:wildcard=SEPARATE_CHANNELS")
