"""Unusual, torn or malicious weight files: a one-sentence error that names the problem and its place."""

import argparse
import collections
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils.weight_file import read_weights

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
