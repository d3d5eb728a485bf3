"""Every name of ``hubconf.py`` through ``torch.hub.load`` in a fresh interpreter, in another directory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

from dinov2_custom.hub import backbones, classifiers

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = {"s": 384, "b": 768, "l": 1024, "g": 1536}
BACKBONES = [f"dinov2_vit{size}14{registers}" for size in SIZES for registers in ("", "_reg")]
CLASSIFIERS = [f"{name}_lc" for name in BACKBONES]
ELSEWHERE = [f"dinov2_vit{size}14_{ending}" for size in SIZES for ending in ("ld", "dd")]
ELSEWHERE += ["dinov2_vitl14_reg4_dinotxt_tet1280d20h24l"]

BY_FILE = ["cell_dino_cp_vits8", "cell_dino_hpa_vitl16", "cell_dino_hpa_vitl14"]
BY_FILE += ["channel_adaptive_dino_vitl16", "xray_dino_vitl16"]

NAMES = [*BACKBONES, *CLASSIFIERS, *BY_FILE, *ELSEWHERE]

LOAD_ALL = """
import json, sys, torch
checkout, names, out = sys.argv[1:]
facts = {"built": {}, "errors": {}}
for name in names.split():
    try:
        with torch.device("meta"):
            model = torch.hub.load(checkout, name, source="local", pretrained=False)
    except Exception as e:
        facts["errors"][name] = f"{type(e).__name__}: {e}"
    else:
        facts["built"][name] = {key: list(t.shape) for key, t in model.state_dict().items()}
small = torch.hub.load(checkout, "dinov2_vits14", source="local", pretrained=False, img_size=28).eval()
facts["features"] = list(small(torch.zeros(1, 3, 28, 42)).shape)
scores = torch.hub.load(checkout, "dinov2_vits14_reg_lc", source="local", layers=1, pretrained=False, img_size=28)
facts["scores"] = list(scores.eval()(torch.zeros(2, 3, 28, 28)).shape)
facts["foreign"] = [m for m in ("omegaconf", "PIL", "yaml", "dinov2") if m in sys.modules]
json.dump(facts, open(out, "w"))
"""


def test_every_name_from_a_fresh_interpreter(tmp_path):
    command = [sys.executable, "-B", "-c", LOAD_ALL, str(REPOSITORY), " ".join(NAMES), str(tmp_path / "facts.json")]
    environment = {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert set(facts["errors"]) == set(ELSEWHERE)
    for name in ELSEWHERE:
        assert facts["errors"][name].startswith(f"DINOv2Error: {name}: ") and "use dinov2_vit" in facts["errors"][name]
    for name in BACKBONES:
        shapes, width = facts["built"][name], SIZES[name[10]]
        assert shapes["pos_embed"] == [1, 37 * 37 + 1, width] and shapes["patch_embed.proj.weight"][-1] == 14
        assert (shapes.get("register_tokens") == [1, 4, width]) == ("_reg" in name)
        assert ("blocks.0.mlp.w12.weight" in shapes) == (name[10] == "g") and "blocks.0.ls1.gamma" in shapes
        assert facts["built"][f"{name}_lc"]["linear_head.weight"] == [1000, 5 * width]
        assert {f"backbone.{key}" for key in shapes} < set(facts["built"][f"{name}_lc"])
    for name in BY_FILE:
        assert "blocks.3.11.norm1.weight" in facts["built"][name] or "blocks.3.23.norm1.weight" in facts["built"][name]
    assert (facts["features"], facts["scores"]) == ([1, 384], [2, 1000])
    assert facts["foreign"] == []


def test_the_names_are_upstreams():
    spec = importlib.util.spec_from_file_location("hubconf_of_this_checkout", REPOSITORY / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    offered = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert sorted(offered) == sorted(NAMES) and len(NAMES) == 30
    assert all(getattr(hubconf, name).__doc__ for name in NAMES)
    assert hubconf.dependencies == ["torch", "tqdm"]


def test_resampling_follows_the_released_models():
    with torch.device("meta"):
        plain, registers = (getattr(backbones, f"dinov2_vits14{r}")(pretrained=False) for r in ("", "_reg"))
        other = backbones.dinov2_vits14(pretrained=False, interpolate_offset=0.0, patch_size=16, img_size=224)
    assert (plain.interpolate_antialias, plain.interpolate_offset) == (False, 0.1)
    assert (registers.interpolate_antialias, registers.interpolate_offset) == (True, 0.0)
    assert (other.interpolate_offset, other.pos_embed.shape[1]) == (0.0, 197)


def test_a_classifier_reads_the_last_blocks():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 28, 28)
    for layers in (1, 4):
        model = classifiers.dinov2_vits14_lc(layers=layers, pretrained=False, img_size=28).eval()
        with torch.no_grad():
            blocks = model.backbone.get_intermediate_layers(images, layers, return_class_token=True)
            features = torch.cat([cls for _, cls in blocks] + [blocks[-1][0].mean(1)], dim=1)
            torch.testing.assert_close(model(images), model.linear_head(features))
            assert features.shape == (2, (1 + layers) * 384)
