import json
import os

import pytest

from dinov2_custom.verify.check import Checked
from dinov2_custom.verify.results import BAD, SOUND, UNKNOWN, Results, stamp_of

GOOD = Checked("", "JPEG", "RGB", 40, 30, 1, "simplejpeg")
NAMES = ["a.jpg", "b.jpg", "c.jpg"]


@pytest.fixture
def files(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes(b"x" * 10)
    return [str(tmp_path / name) for name in NAMES]


def results_of(tmp_path, files):
    return Results(tmp_path / "results.jsonl", lambda i: files[i], len(files))


def test_results_are_loaded_again(tmp_path, files):
    with results_of(tmp_path, files) as results:
        results.add(0, GOOD, stamp_of(files[0]))
        results.add(2, Checked("damaged JPEG: x", "JPEG", "L", 5, 6), stamp_of(files[2]))
    again = results_of(tmp_path, files)
    assert again.take_over(has_simplejpeg=False) == 2
    assert again.status.tolist() == [SOUND, UNKNOWN, BAD]
    assert again.todo().tolist() == [1]
    assert again.sizes.tolist() == [[40, 30], [0, 0], [5, 6]]
    assert again.kinds[again.kind[0]] == ("JPEG", "RGB", "simplejpeg", "")
    assert again.reasons == {2: "damaged JPEG: x"}


def test_truncated_line_is_ignored(tmp_path, files):
    path = tmp_path / "results.jsonl"
    with results_of(tmp_path, files) as results:
        for i in range(3):
            results.add(i, GOOD, stamp_of(files[i]))
    whole = path.read_bytes()
    for length in range(len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with results_of(tmp_path, files) as results:
            assert results.take_over(True) == 2
            results.add(2, GOOD, stamp_of(files[2]))
        assert results_of(tmp_path, files).take_over(True) == 3


@pytest.mark.parametrize(
    "change",
    [{"i": "0"}, {"path": []}, {"reason": 3}, {"width": "wide"}, {"width": None}, {"format": {}}, {"frames": 0.5}],
)
def test_line_with_wrong_types_is_ignored(tmp_path, files, change):
    with results_of(tmp_path, files) as results:
        results.add(0, GOOD, stamp_of(files[0]))
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n" + "[" * 100_000 + "\n[]\n")
    assert results_of(tmp_path, files).take_over(True) == 0


def test_changed_and_renamed_files_are_distinguished(tmp_path, files):
    with results_of(tmp_path, files) as results:
        for i in range(3):
            results.add(i, GOOD, stamp_of(files[i]))
    os.utime(files[0], ns=(1, 1))
    with open(files[1], "ab") as file:
        file.write(b"more")
    new = str(tmp_path / "0.jpg")
    (tmp_path / "0.jpg").write_bytes(b"x" * 10)
    files.insert(0, new)
    again = results_of(tmp_path, files)
    assert again.take_over(True) == 1
    assert again.todo().tolist() == [0, 1, 2], "c.jpg moved to another number"


@pytest.mark.parametrize(
    "found, has_simplejpeg, kept",
    [
        (GOOD, True, 1),
        (GOOD._replace(by="pillow"), True, 0),
        (GOOD._replace(by="pillow"), False, 1),
        (GOOD._replace(by="pillow", format="PNG"), True, 1),
        (Checked("unreadable: EIO"), True, 0),
        (Checked("decoder died: x"), True, 0),
        (Checked("empty: x"), True, 1),
    ],
)
def test_possibly_changed_files_are_checked_again(tmp_path, files, found, has_simplejpeg, kept):
    with results_of(tmp_path, files) as results:
        results.add(0, found, stamp_of(files[0]))
    assert results_of(tmp_path, files).take_over(has_simplejpeg) == kept


def test_the_last_result_counts(tmp_path, files):
    with results_of(tmp_path, files) as results:
        results.add(0, Checked("empty: x"), stamp_of(files[0]))
        results.add(0, GOOD, stamp_of(files[0]))
    again = results_of(tmp_path, files)
    again.take_over(True)
    assert again.status[0] == SOUND and again.reasons == {}


def test_stamps(files, tmp_path):
    status = os.stat(files[0])
    assert stamp_of(files[0]) == [10, status.st_mtime_ns]
    assert stamp_of(files[0] + "!inside/x.jpg") == stamp_of(files[0] + "/x.jpg") == stamp_of(files[0])
    assert stamp_of(str(tmp_path / "gone.jpg")) is None
    assert stamp_of("Dataset[3]") is None
