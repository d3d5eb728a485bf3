import json
from pathlib import Path

import pytest

from dinov2_custom.errors import DataError
from dinov2_custom.plots.metrics_file import find_runs, read_metrics, read_run, short_names


def write_run(folder: Path, rows=({"iteration": 0, "total_loss": 1.0},), config="dino: {head_n_prototypes: 256}\n"):
    folder.mkdir(parents=True)
    (folder / "training_metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.mark.parametrize(
    "line",
    ['{"iteration": 9, "lo', "3", "[]", '{"loss": 1.0}', '{"iteration": null}', "\x00\x00", '{"iteration": Infinity}']
    + ["[" * 100_000],
    ids=range(8),
)
def test_lines_that_are_no_rows_are_left_out(tmp_path, line):
    file = write_run(tmp_path / "run") / "training_metrics.json"
    with open(file, "a") as out:
        out.write(line)
    assert [row["iteration"] for row in read_metrics(file)] == [0]


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    row = {"iteration": "3", "a": "text", "b": [1.0], "c": None, "d": 10**400, "e": 2, "f": float("inf"), "g": {}}
    (read,) = read_metrics(write_run(tmp_path / "run", rows=[row]) / "training_metrics.json")
    assert read == {"iteration": 3, "e": 2, "f": float("inf")}


def test_line_truncated_inside_a_character(tmp_path):
    file = write_run(tmp_path / "run") / "training_metrics.json"
    with open(file, "ab") as out:
        out.write('{"iteration": 1, "x": "é'.encode()[:-1])
    assert len(read_metrics(file)) == 1


def test_a_folder_of_runs_a_run_and_a_file_are_found_once(tmp_path):
    one, two = write_run(tmp_path / "all" / "seed_0"), write_run(tmp_path / "all" / "seed_1")
    assert find_runs([tmp_path / "all"]) == [one, two]
    assert find_runs([str(two), tmp_path / "all", one / "training_metrics.json"]) == [two, one]


def test_places_without_a_run_are_named_together(tmp_path):
    with pytest.raises(DataError, match=r"got none at .*nowhere, .*empty"):
        find_runs([write_run(tmp_path / "run"), tmp_path / "nowhere", tmp_path / "empty"])


@pytest.mark.parametrize("config", ["", "{torn", "- a list", "dino: 3"])
def test_settings_that_are_not_there_are_none(tmp_path, config):
    run = read_run(write_run(tmp_path / "run", config=config), "run")
    assert run.setting("dino.head_n_prototypes") is None and len(run.rows) == 1


def test_settings_by_dotted_key(tmp_path):
    assert read_run(write_run(tmp_path / "run"), "run").setting("dino.head_n_prototypes") == 256


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/a/b/run"], ["run"]),
        (["/a/run1", "/a/run2"], ["run1", "run2"]),
        (["/a/vits/seed_0", "/a/vitb/seed_0"], ["vits", "vitb"]),
        (["/a/x/1/out", "/a/y/2/out"], ["x/1", "y/2"]),
        (["/a/run", "/a/run/sub"], ["run", "run/sub"]),
    ],
)
def test_names_distinguish_runs(folders, names):
    assert short_names([Path(folder) for folder in folders]) == names
