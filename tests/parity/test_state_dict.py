"""Names and shapes of all tensors against upstream and, without it, four files; parameter counts."""

from __future__ import annotations

import pytest
import torch

from dinov2_custom.models import vision_transformer as vits
from tests.parity import state_dicts

# (architecture, arguments) -> parameters at img_size/patch_size 224/16, 224/14, 518/14
PARAMETERS = [
    ("vit_small", {}, [21_675_264, 21_629_184, 22_056_576]),
    ("vit_base", {}, [85_817_856, 85_725_696, 86_580_480]),
    ("vit_large", {}, [303_351_808, 303_228_928, 304_368_640]),
    ("vit_giant2", {"ffn_layer": "swiglufused"}, [1_134_955_520, 1_134_771_200, 1_136_480_768]),
]


@pytest.mark.parametrize("name", [*state_dicts.BACKBONES, *state_dicts.HEADS])
def test_names_and_shapes_are_upstreams(oracle, name):
    assert state_dicts.own_lines(name) == state_dicts.upstream_lines(oracle, name)


@pytest.mark.parametrize("name", state_dicts.TRAINING)
def test_names_and_shapes_of_the_training_model_are_upstreams(oracle, name, tmp_path):
    from tests.parity.pair import OurTrainer

    overrides = state_dicts.TRAINING[name].split()
    ours = OurTrainer(overrides, str(tmp_path), depth=state_dicts.TRAINING_DEPTH)
    assert sorted(state_dicts.describe(ours.model.state_dict())) == sorted(state_dicts.upstream_lines(oracle, name))


@pytest.mark.parametrize("name", state_dicts.FILES)
def test_names_and_shapes_are_those_of_the_files(name):
    assert state_dicts.own_lines(name) == state_dicts.read(name)


@pytest.mark.parametrize(
    "arch, kwargs, expected", PARAMETERS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_number_of_parameters(arch, kwargs, expected):
    counts = []
    for img_size, patch_size in [(224, 16), (224, 14), (518, 14)]:
        counts.append(_count(arch, img_size=img_size, patch_size=patch_size, **kwargs))
    assert counts == expected


def test_number_of_parameters_with_registers():
    kwargs = {"img_size": 224, "patch_size": 14, "ffn_layer": "swiglufused", "num_register_tokens": 4}
    assert _count("vit_large", **kwargs) == 303_659_264


def _count(arch: str, **kwargs) -> int:
    with torch.device("meta"):
        model = getattr(vits, arch)(init_values=1e-5, drop_path_uniform=True, block_chunks=0, **kwargs)
    return sum(p.numel() for p in model.parameters())
