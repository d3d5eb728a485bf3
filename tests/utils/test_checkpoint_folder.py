import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils.checkpoint_folder import Piece, StoredState, checksum, write_marker, write_pieces

WIDE = torch.arange(30.0).view(10, 3)
PIECES = [
    {"wide": Piece(WIDE[:4], 0, (10, 3)), "half": Piece.whole(torch.tensor([1.5, -2.0], dtype=torch.bfloat16))},
    {"wide": Piece(WIDE[4:5], 4, (10, 3)), "count": Piece.whole(torch.tensor(7))},
    {"wide": Piece(WIDE[5:], 5, (10, 3)), "none": Piece.whole(torch.zeros(0, 2)), "turned": Piece.whole(WIDE.T)},
]


def written(folder):
    names = [f"rank_{rank:05d}.safetensors" for rank in range(len(PIECES))]
    files = {name: write_pieces(folder / name, pieces) for name, pieces in zip(names, PIECES, strict=True)}
    write_marker(folder, files, {"iteration": 3})
    return files


def test_rows_of_any_range_come_from_the_files_that_have_them(tmp_path):
    written(tmp_path)
    state = StoredState(tmp_path)
    state.verify()
    assert state.shapes == {"wide": (10, 3), "half": (2,), "count": (), "none": (0, 2), "turned": (3, 10)}
    for start in range(11):
        for stop in range(start, 11):
            assert torch.equal(state.rows("wide", start, stop), WIDE[start:stop])
    assert state.read("count") == 7 and state.read("half").dtype == torch.bfloat16
    assert state.read("none").shape == (0, 2) and torch.equal(state.read("turned"), WIDE.T)


def test_read_tensors_survive_truncation_of_the_file(tmp_path):
    """A memory-mapped tensor would crash the process."""
    written(tmp_path)
    wide = StoredState(tmp_path).read("wide")
    for file in tmp_path.glob("*.safetensors"):
        os.truncate(file, 0)
    assert torch.equal(wide, WIDE)


def test_the_checksum_is_the_files_and_of_what_was_to_be_written(tmp_path, monkeypatch):
    for name, one in written(tmp_path).items():
        assert one == checksum(tmp_path / name)

    def altering(tensors, path, metadata):
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr("dinov2_custom.utils.checkpoint_folder.save_file", altering)
    written(tmp_path)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors"):
        StoredState(tmp_path).verify()


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_a_file_has_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        written(tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize(
    "rows",
    [
        [-1, 10, 3], [7, 10, 3], [4.0, 10, 3], [True, 10, 3], ["4", 10, 3], [4, 10], [4, 10, 4], [4, 10, 3, 1], 4, "ab",
        {"a": 1}, [4, [10], 3], [4, 10**4000, 3], [0, 10, 3], [4, 11, 3],
    ],
)  # fmt: skip
def test_rows_that_cannot_be_are_one_error_that_names_the_place(tmp_path, rows):
    files = written(tmp_path)
    path = tmp_path / "rank_00001.safetensors"
    save_file(load_file(path), path, {"rows": json.dumps({"wide": rows})})
    write_marker(tmp_path, files | {path.name: checksum(path)}, {"iteration": 3})
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        StoredState(tmp_path)


@pytest.mark.parametrize("text", ["[", "[]", '{"wide": [4, 10, 3], "wide": []}', None])
def test_metadata_that_is_not_ours_is_one_error(tmp_path, text):
    files = written(tmp_path)
    path = tmp_path / "rank_00001.safetensors"
    save_file(load_file(path), path, text and {"rows": text})
    write_marker(tmp_path, files | {path.name: checksum(path)}, {"iteration": 3})
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        StoredState(tmp_path)
