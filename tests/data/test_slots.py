"""Shared slots: separate arrays, shared by processes, gone afterwards."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from dinov2_custom.data import slots as slots_module
from dinov2_custom.data.slots import Field, Slots, allocate
from dinov2_custom.errors import DataError

FIELDS = {"a": Field((3, 5)), "b": Field((2,), np.int64), "none": Field((0, 4)), "c": Field((7, 1), np.float32)}


def test_arrays_have_their_shapes_and_do_not_overlap():
    slots = Slots(FIELDS, 3, num_words=4)
    every = [slots.arrays(i) for i in range(3)]
    for n, arrays in enumerate(every):
        assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
            name: (f.shape, np.dtype(f.dtype)) for name, f in FIELDS.items()
        }
        for k, array in enumerate(arrays.values()):
            array[...] = 10 * n + k
    slots.words[:] = 99
    for n, arrays in enumerate(every):
        assert [np.unique(a).tolist() for a in arrays.values()] == [[10 * n], [10 * n + 1], [], [10 * n + 3]]
    assert np.shares_memory(slots.arrays(1)["a"], every[1]["a"]) and slots.words.tolist() == [99] * 4
    assert {name: a.shape for name, a in allocate(FIELDS).items()} == {name: f.shape for name, f in FIELDS.items()}


def test_slots_outlive_their_closing_as_long_as_arrays_look_at_them():
    slots = Slots(FIELDS, 1)
    array = slots.arrays(0)["b"]
    array[:] = 5
    slots.close()
    slots.close()
    assert array.tolist() == [5, 5]


@pytest.mark.parametrize("memfd", ["absent", "refused"])
def test_without_anonymous_memory_a_nameless_file_is_used_and_said(monkeypatch, tmp_path, caplog, memfd):
    def refuse(name):
        raise OSError("not here")

    if memfd == "absent":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    else:
        monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    monkeypatch.setattr(slots_module.tempfile, "gettempdir", lambda: str(tmp_path))
    caplog.set_level("INFO", logger="dinov2")
    slots = Slots(FIELDS, 2)
    slots.arrays(1)["b"][:] = 7
    assert slots.arrays(1)["b"].tolist() == [7, 7] and list(tmp_path.iterdir()) == []
    assert f"batches travel through a file in {tmp_path}" in caplog.text


def test_no_room_is_one_error(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(slots_module.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(slots_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 2**20))
    with pytest.raises(DataError, match="expected 19 MiB for batches in .*got 5 MiB free; set TMPDIR"):
        Slots({"a": Field((2**20,))}, 19)
