import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.cli import verify_parser as get_args_parser
from dinov2_custom.data.decode import SEVERAL_PAGES
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.errors import ConfigError
from dinov2_custom.logging import remove_logging
from dinov2_custom.verify.main import MARKER, main, open_dataset, verify
from dinov2_custom.verify.report import as_text
from tests.data.pictures import encode
from tests.data.test_tar_shards import damage
from tests.data.test_tar_shards import write as write_tar
from tests.processes import REPOSITORY
from tests.verify.files import Listed, bad_files, jpeg, overwritten, sound_files, write_files
from tests.verify.killed import kill_when, wait_for_end_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")


@pytest.fixture
def mixed(tmp_path):
    write_files(tmp_path / "images" / "good", sound_files())
    write_files(tmp_path / "images" / "wrong", {name: data for name, (data, _) in bad_files().items()})
    return tmp_path / "images"


def run(dataset, folder, **options):
    folder.mkdir(exist_ok=True)
    (folder / MARKER).touch()
    return verify(dataset, folder, **options)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sound_and_bad_are_distinguished_with_any_number_of_processes(mixed, tmp_path):
    dataset = make_dataset(dataset_str=str(mixed))
    summaries = [run(dataset, tmp_path / f"{n}", workers=n) for n in (1, 2)]
    bad = rows(tmp_path / "1" / "bad_images.jsonl")
    assert [row["path"] for row in bad] == sorted(str(mixed / "wrong" / name) for name in bad_files())
    assert all(row["reason"] for row in bad)
    clean = (tmp_path / "1" / "clean.txt").read_text().splitlines()
    assert clean == sorted(str(mixed / "good" / name) for name in sound_files())
    assert summaries[0] == summaries[1] == json.loads((tmp_path / "2" / "summary.json").read_text())
    for name in ("bad_images.jsonl", "clean.txt", "summary.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_summary(tmp_path):
    files = {f"{i}.jpg": jpeg(i, (40 + i, 60)) for i in range(3)} | {
        "g.png": sound_files()["one_bit.png"],
        "e.jpg": b"",
    }
    write_files(tmp_path / "images" / "sub", files)
    summary = run(make_dataset(dataset_str=str(tmp_path / "images")), tmp_path / "out", workers=1, label="mine")
    assert summary["dataset"] == "mine"
    assert (summary["images"], summary["sound"], summary["bad"]) == (5, 4, 1)
    assert summary["formats"] == {"JPEG": 3, "PNG": 1}
    assert summary["modes"] == {"RGB": 3, "1": 1}
    assert summary["short_side"] == {"<32": 1, "32-63": 3}
    assert summary["sizes"] == {"20x16": 1, "40x60": 1, "41x60": 1, "42x60": 1}
    assert summary["reasons"] == {"empty": 1}
    assert summary["worst_folders"] == {str(tmp_path / "images" / "sub"): 1}


def test_clean_list_holds_what_it_can(tmp_path):
    files = {"a b.jpg": jpeg(), "new\nline.jpg": jpeg(1), os.fsdecode(b"\xff.jpg"): jpeg(2)}
    root = write_files(tmp_path / "images", files)
    summary = run(Listed(root.iterdir()), tmp_path / "out")
    listed = (tmp_path / "out" / "clean.txt").read_bytes().splitlines()
    assert sorted(os.path.basename(line) for line in listed) == [b"a b.jpg", b"\xff.jpg"]
    assert (summary["sound"], summary["sound_but_not_listable"]) == (3, 1)


def test_a_crashing_decoder_is_survived_and_named(tmp_path):
    files = {f"{i:03}.jpg": jpeg(i, (20, 16)) for i in range(60)} | {"crash.SIGSEGV": b"x", "hang.jpg": b"x"}
    root = write_files(tmp_path / "images", files)
    dataset = Listed(sorted(root.iterdir(), key=lambda path: (path.name[-6:], path.name)))
    summary = run(dataset, tmp_path / "out", workers=2, time_limit_s=3.0)
    assert (summary["sound"], summary["bad"]) == (60, 2)
    reasons = {Path(row["path"]).name: row["reason"] for row in rows(tmp_path / "out" / "bad_images.jsonl")}
    assert reasons["crash.SIGSEGV"] == "decoder died: the process was killed by SIGSEGV while decoding it"
    assert reasons["hang.jpg"].startswith("too slow: took longer")


def test_unreadable_files(tmp_path):
    root = write_files(tmp_path / "images", {f"{i}.jpg": jpeg() for i in range(3)})
    dataset = make_dataset(dataset_str=str(root))
    (root / "1.jpg").unlink()
    assert run(dataset, tmp_path / "out")["reasons"] == {"unreadable": 1}
    (root / "1.jpg").write_bytes(jpeg())
    assert run(dataset, tmp_path / "out")["bad"] == 0, "it is looked at again"


KILLED = """
from pathlib import Path
from dinov2_custom.verify.main import MARKER, verify
from dinov2_custom.verify.report import as_text
from tests.data.pictures import encode
from tests.verify.files import Listed
folder = Path({folder!r})
folder.mkdir()
(folder / MARKER).touch()
verify(Listed(sorted(Path({images!r}).iterdir()), Path({log!r}), 0.02), folder, workers={workers})
"""


def test_killed_and_started_again(tmp_path):
    files = {f"{i:03}.jpg": jpeg(i, (20, 16)) for i in range(120)} | {"077.jpg": b"", "011.jpg": b"x"}
    images, folder, log = write_files(tmp_path / "images", files), tmp_path / "out", tmp_path / "log"
    code = KILLED.format(folder=str(folder), images=str(images), log=str(log), workers=2)
    results = folder / MARKER
    kill_when(code, lambda: results.exists() and results.read_bytes().count(b"\n") >= 30)
    with open(results, "ab") as file:
        file.write(b'{"i": 3, "path"')
    wait_for_end_of({int(line.split()[0]) for line in log.read_text().splitlines()})
    done = {os.path.basename(row["path"]) for row in map(json.loads, results.read_text().splitlines()[:-1])}
    assert 30 <= len(done) < 120

    log.unlink()
    verify(Listed(sorted(images.iterdir()), log), folder, workers=2)
    read_again = [line.split()[1] for line in log.read_text().splitlines()]
    assert sorted(read_again) == sorted(set(files) - done), "the rest, once"
    fresh = run(Listed(sorted(images.iterdir())), tmp_path / "fresh", workers=1)
    assert (fresh["sound"], fresh["bad"]) == (118, 2)
    for name in ("bad_images.jsonl", "clean.txt", "summary.json"):
        assert (folder / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_clean_list_trains(mixed, tmp_path):
    run(make_dataset(dataset_str=str(mixed)), tmp_path / "out")
    dataset = make_dataset(dataset_str=str(tmp_path / "out" / "clean.txt"))
    assert len(dataset) == len(sound_files())
    assert all(dataset[i][0].mode == "RGB" for i in range(len(dataset)))


def test_datasets_of_the_command_line(tmp_path):
    for name in "ab":
        write_files(tmp_path / name, {"1.jpg": jpeg()})
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert len(open_dataset([a])) == 1
    assert len(open_dataset([a, b])) == 2
    mixture = open_dataset([f"[{{path: {a}, weight: 0.7}}, {{path: {b}, weight: 0.3}}]"])
    assert [mixture.name(i) for i in range(2)] == [f"{a}/1.jpg", f"{b}/1.jpg"]
    assert run(mixture, tmp_path / "out")["sound"] == 2
    with pytest.raises(ConfigError, match="expected a path"):
        open_dataset(["[{"])


@pytest.fixture
def quiet():
    yield
    remove_logging("dinov2")
    logging.getLogger("dinov2").setLevel(logging.NOTSET)


def test_command_line(tmp_path, capsys, quiet):
    root = write_files(tmp_path / "images", {"a.jpg": jpeg(), "b.jpg": jpeg(1)})
    arguments = [str(root), "--output-dir", str(tmp_path / "out"), "--workers", "1"]
    assert main(get_args_parser().parse_args(arguments)) == 0
    (root / "b.jpg").write_bytes(overwritten(jpeg(1), bytes(2000)))
    assert main(get_args_parser().parse_args(arguments)) == 1
    text = capsys.readouterr().out
    assert "verified_before=1" in text
    assert "images: 2, sound: 1, bad: 1" in text and "bad image: " in text
    assert str(tmp_path / "out" / "clean.txt") in text


def test_a_folder_that_cannot_be_listed_is_reported_and_is_no_success(tmp_path, capsys, quiet, monkeypatch):
    root = write_files(tmp_path / "images", {"a.jpg": jpeg(), "locked/b.jpg": jpeg(1)})
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    arguments = [f"[{root}, {write_files(tmp_path / 'others', {'c.jpg': jpeg()})}]"]
    arguments += ["--output-dir", str(tmp_path / "out"), "--workers", "1"]
    assert main(get_args_parser().parse_args(arguments)) == 1
    assert f"  {root / 'locked'} (unreadable: PermissionError: Permission denied)" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [one["path"] for one in summary["passed_over"]] == [str(root / "locked")] and summary["bad"] == 0


def test_an_archive_that_cannot_be_listed_to_its_end_is_no_success(tmp_path, capsys, quiet):
    path = write_tar(tmp_path / "x.tar", {"a.jpg": jpeg(), "b.jpg": jpeg(1)})
    damage(path, position=512 + -(-len(jpeg()) // 512) * 512)
    arguments = [f"Tar:path={path}", "--output-dir", str(tmp_path / "out"), "--workers", "1"]
    assert main(get_args_parser().parse_args(arguments)) == 1
    assert f"  {path} (damaged tar: " in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [one["path"] for one in summary["passed_over"]] == [path]
    assert (summary["sound"], summary["bad"]) == (1, 0)


@pytest.mark.parametrize("kind", ["pipe", "sparse"])
def test_non_regular_file_does_not_block_the_others(tmp_path, kind):
    root = write_files(tmp_path / "images", {f"{i}.jpg": jpeg() for i in range(3)})
    if kind == "pipe":
        os.mkfifo(root / "x.jpg")
    else:
        with open(root / "x.jpg", "wb") as file:
            file.truncate(10 << 30)
    summary = run(make_dataset(dataset_str=str(root)), tmp_path / "out")
    assert summary["reasons"] == {"unreadable" if kind == "pipe" else "too large": 1} and summary["sound"] == 3


def test_a_process_without_file_descriptors_ends_the_command_and_blames_no_image(tmp_path):
    root = write_files(tmp_path / "images", {f"{i}.jpg": jpeg() for i in range(3)})
    script = (
        "import os, resource, sys\n"
        "from dinov2_custom.verify.main import Checker, make_dataset\n"
        "from dinov2_custom.verify.pool import run_pool\n"
        "checker = Checker(make_dataset(dataset_str=sys.argv[1]), False)\n"
        "def work(i):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "    return checker(i)\n"
        "print(list(run_pool(work, range(3), workers=1)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode != 0 and "ResourceError" in done.stderr and "ulimit -n" in done.stderr, done


def test_script_reports_errors_of_the_dataset(tmp_path):
    script = [sys.executable, str(REPOSITORY / "run" / "data" / "verify.py")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(
        [*script, str(tmp_path / "none")], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: expected folders of images")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_help_needs_no_torch():
    code = (
        "import sys, dinov2_custom.cli as a; a.verify_parser().format_help(); print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert shown.stdout == "False\n"


@pytest.mark.parametrize("arguments", [[], ["x", "--workers", "0"], ["x", "--workers", "two"], ["x", "--work", "2"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        get_args_parser().parse_args(arguments)
    assert stop.value.code == 2


def test_range_levels_and_pages_are_reported(tmp_path):
    rng = np.random.default_rng(0)
    dim, bright = (encode(Image.fromarray(rng.integers(100, top, (40, 40), dtype=np.uint16))) for top in (400, 60_000))
    stack = [Image.fromarray(rng.integers(0, 255, (9, 9), dtype=np.uint8)) for _ in range(3)]
    files = {f"{i}.png": dim for i in range(4)} | {"bright.png": bright, "broken.png": bright[:200]}
    files["stack.tif"] = encode(stack[0], "TIFF", save_all=True, append_images=stack[1:])
    write_files(tmp_path / "images", files)
    summary = run(make_dataset(dataset_str=str(tmp_path / "images")), tmp_path / "out", workers=1)
    found = summary["intensity"]
    assert found["intensity"][1] > 50_000 and found["deep"] == 5
    assert found["levels"] > 200 > 64 > found["levels_an_image"]
    assert summary["pages"] == {SEVERAL_PAGES: 1}
    text = as_text(summary)
    for said in ("warning: the median image", "become 0..255", "clipped", SEVERAL_PAGES):
        assert said in text
    (tmp_path / "images" / "bright.png").unlink()
    again = run(make_dataset(dataset_str=str(tmp_path / "images")), tmp_path / "again", workers=1)
    assert again["intensity"]["intensity"][1] <= 400 and "warning" not in as_text(again)
