"""Weight files: names and prefixes; of unusual, torn or malicious ones, a one-sentence error with problem and place."""

import argparse
import collections
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dinov2_custom.errors import CheckpointError
from dinov2_custom.models.vision_transformer import vit_nano
from dinov2_custom.utils.weights import flat_heads, flat_state, read_weights

WEIGHT = torch.ones(2, 2)


def itself():
    held = {"weight": WEIGHT}
    held["model"] = held
    return held


def list_in_itself():
    held = [WEIGHT]
    held.append({"more": held})
    return {"model": {"held": held}}


def deep():
    held = {}
    for _ in range(300):
        held = {"model": held}
    return held


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (itself, "something that holds itself at model"),
        (list_in_itself, r"something that holds itself at model\.held\.1\.more"),
        (deep, "100 levels of it at model.model"),
        (lambda: {"model": {"a": WEIGHT.to_sparse()}}, r"a sparse tensor at model\.a"),
        (lambda: {"a": WEIGHT.to_sparse_csr()}, "a sparse tensor at a"),
        (lambda: [torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)], "a quantized tensor at 0"),
        (lambda: {"a": {"b": WEIGHT.to("meta")}}, r"a meta tensor at a\.b"),
        (lambda: {"a": torch.nested.nested_tensor([WEIGHT, WEIGHT[:1]])}, "a nested tensor at a|RuntimeError"),
        (lambda: WEIGHT.to("meta"), "a meta tensor at its top"),
        (lambda: {"model": {}, "args": argparse.Namespace(a=1)}, "more than tensors and plain values: argparse.Names"),
        (lambda: {"model": {}, "loss": np.float64(1)}, r"values: numpy\.\S+scalar"),
        (lambda: {"model": collections.defaultdict(int)}, "values: collections.defaultdict"),
        (lambda: torch.nn.Linear(1, 1), "values: torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")  # torch's, of nested, quantized and sparse tensors
def test_non_plain_tensors_are_named(tmp_path, make, message, zipped):
    torch.save(make(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=message) as e:
        read_weights(tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(e.value) and "\n" not in str(e.value)


def test_shared_entries_are_read(tmp_path):
    shared = [{"weight": WEIGHT}]
    for _ in range(40):  # 2**40 paths to one tensor
        shared = [shared, shared]
    torch.save({"model": shared, "optimizer": {"state": {0: {"step": 3.0}}}}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth")["optimizer"] == {"state": {0: {"step": 3.0}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "an HTML or XML page"),
        (b"\n <?xml", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS"),
        (b"", "an empty file"),
        (b'{"error": "not found"}', "begins with"),
        (b"PK\x03\x04 and no more", "could not read it"),
        (b"\x80\x02}q\x00.", "could not read it"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_not_weights_are_described(tmp_path, content, message, suffix):
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("name", ["w.safetensors", "w", "w.pth", "w.bin"])
def test_safetensors_are_read_whatever_their_name(tmp_path, name):
    save_file({"a": WEIGHT}, tmp_path / name)
    assert torch.equal(read_weights(tmp_path / name)["a"], WEIGHT)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_refused_unopened(tmp_path, suffix):
    os.mkfifo(tmp_path / f"w{suffix}")
    with pytest.raises(CheckpointError, match="a folder, pipe or device"):
        read_weights(tmp_path / f"w{suffix}")


def parts(folder):
    save_file({"a": WEIGHT}, folder / "part1.safetensors")
    save_file({"b": WEIGHT}, folder / "part2.safetensors")
    return {"a": "part1.safetensors", "b": "part2.safetensors"}


def test_parts_are_read_by_their_folder_and_their_list(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts(tmp_path)}))
    assert set(read_weights(tmp_path)) == set(read_weights(index)) == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "list of a weight file's parts"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "expected a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no names of files"),
        ('{"weight_map": {}}', "no names of files"),
        ('{"weight_map": {"a": 1}}', "no names of files"),
        ('{"weight_map": {"a": "part1.safetensors", "a": "part2.safetensors"}}', "is there twice"),
        ('{"weight_map": {"a": "part1.safetensors", "c": "part2.safetensors"}}', "got no c in part1.safetensors"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors, found nothing"),
        ('{"weight_map": {"a": "../../part1.safetensors", "b": "/etc/passwd"}}', "passwd"),
    ],
    ids=range(11),
)
def test_broken_lists_of_parts(tmp_path, text, message):
    parts(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path)


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_a_file_that_is_cut_short_is_called_that(tmp_path, form):
    path, state = tmp_path / "a.pth", {"a": torch.zeros(2500), "b": torch.zeros(10)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    # inside the header or pickle, the tensors and the last bytes; of a zip also where torch says EINVAL
    for cut in (60, 165, len(whole) // 2, 4200, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=rf"{path}, could not read it: it is cut short, at {cut:,} bytes"):
            read_weights(path)
    path.write_bytes(whole[:50] + b"\xff" * 100 + whole[150:])
    try:
        read_weights(path)
    except CheckpointError as e:
        assert "it is cut short" not in str(e)


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
