"""Names and prefixes of weight files."""

import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.models.vision_transformer import vit_nano
from dinov2_custom.utils.weights import flat_heads, flat_state


def backbone():
    torch.manual_seed(0)
    return vit_nano(patch_size=8, img_size=32, block_chunks=0, init_values=1.0).eval()


@pytest.mark.parametrize(
    "change", [{"cls_token": torch.tensor(1.0)}, {"reg_token": torch.zeros(4, 64), "pos_embed": None}]
)
def test_timm_tensors_that_cannot_be_renamed_are_reported(change):
    state = {name: value for name, value in backbone().state_dict().items() if name != "mask_token"} | change
    state["pos_embed"] = torch.zeros(16, 64) if state["pos_embed"] is None else state["pos_embed"]
    with pytest.raises(CheckpointError, match="of timm or transformers, could not rename them"):
        flat_state(state)


def test_heads_are_those_beside_the_backbone():
    state = {"model.teacher.backbone.cls_token": 1.0, "model.teacher.dino_head.mlp.0.weight": 2.0}
    state |= {"model.student.backbone.cls_token": 3.0, "model.student.dino_head.mlp.0.weight": 4.0}
    state = {name: torch.tensor([value]) for name, value in state.items()}
    assert flat_state(state) == {"cls_token": torch.tensor([1.0])}
    assert flat_heads(state) == {"dino_head": {"mlp.0.weight": torch.tensor([2.0])}}
    assert flat_state(state, "student") == {"cls_token": torch.tensor([3.0])}


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_that_is_not_merged_is_refused(whole):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(backbone(), peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False))
    state = model.state_dict() if whole else peft.get_peft_model_state_dict(model)
    with pytest.raises(CheckpointError, match=r"merge_and_unload\(\)"):
        flat_state(state)
    merged = flat_state({f"base_model.model.{k}": v for k, v in model.merge_and_unload().state_dict().items()})
    assert not torch.equal(merged["blocks.0.attn.qkv.weight"], backbone().state_dict()["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("state", [{0: torch.ones(1)}, {"model": {1: torch.ones(1)}}, {(1, 2): torch.ones(1)}])
def test_tensors_named_by_number_are_reported(state):
    with pytest.raises(CheckpointError, match="expected tensors by name, got"):
        flat_state(state)
