"""Data from a real S3 server to a folder: whole, once, again after a kill, and never with a damaged archive."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.processes import wait_until
from tests.sky.conftest import KEY, REPOSITORY, SECRET

SCRIPT = REPOSITORY / "sky" / "stage.py"


def stage(bucket, source, folder, *options, **env):
    command = [sys.executable, str(SCRIPT), *options, str(source), str(folder)]
    done = subprocess.run(command, env={**bucket.env, **env}, capture_output=True, text=True, timeout=600)
    assert SECRET not in done.stdout + done.stderr and KEY not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def refused(bucket, source, folder, **env) -> str:
    done = stage(bucket, source, folder, **env)
    assert done.returncode == 1 and done.stderr.startswith("error: expected ") and done.stderr.count("\n") == 1
    assert not (folder / ".staged.json").exists()
    return done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def write_tar(path: Path, count: int = 5, size: int = 3000) -> bytes:
    rng = np.random.default_rng(count)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            member = tarfile.TarInfo(f"{i}.jpg")
            member.size = size
            archive.addfile(member, io.BytesIO(rng.bytes(size)))
    return path.read_bytes()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "source" / "images"
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / f"class {i % 3}" / f"bild_ä {i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(2000 + i))
    return folder


def test_a_folder_comes_whole_and_only_once(bucket, images, tmp_path):
    source, folder = bucket.put(images, "data/images"), tmp_path / "local"
    assert stage(bucket, source, folder, "--dataset-path").returncode == 1
    first = stage(bucket, source, folder)
    assert (first.returncode, first.stderr) == (0, "")
    assert "40 files" in first.stdout
    assert contents(folder) == contents(images)
    assert stage(bucket, source, folder, "--dataset-path").stdout == f"{folder}\n"

    again = stage(bucket, source, folder, RCLONE_S3_ENDPOINT="http://127.0.0.1:9")  # nobody has to be asked
    assert again.returncode == 0 and "was complete" in again.stdout


def test_tars_stay_tars_and_compressed_ones_become_plain(bucket, tmp_path):
    shards = tmp_path / "shards"
    plain = {f"{i}.tar": write_tar(shards / f"{i}.tar", count=i + 3) for i in range(2)}
    for name, compress in (("a.tar.gz", gzip.compress), ("sub/b.TGZ", gzip.compress)):
        plain[name[:-4] + ".tar" if name.endswith("TGZ") else "a.tar"] = content = write_tar(shards / name)
        (shards / name).write_bytes(compress(content))
    folder = tmp_path / "local"
    assert stage(bucket, bucket.put(shards, "shards"), folder).returncode == 0
    assert contents(folder) == plain
    assert stage(bucket, f"s3://{bucket.name}/shards", folder, "--dataset-path").stdout == f"Tar:path={folder}\n"


@pytest.mark.parametrize("name", ["one.tar", "one.tar.gz"])
def test_a_single_file(bucket, tmp_path, name):
    content = write_tar(tmp_path / "one.tar")
    (tmp_path / "one.tar.gz").write_bytes(gzip.compress(content))
    assert stage(bucket, bucket.put(tmp_path / name, f"d/{name}"), tmp_path / "local").returncode == 0
    assert contents(tmp_path / "local") == {"one.tar": content}


def test_training_reads_what_was_staged(bucket, tmp_path):
    from dinov2_custom.data.build import make_source
    from dinov2_custom.data.spec import parse_dataset

    write_tar(tmp_path / "source" / "x.tar", count=7)
    folder = tmp_path / "local"
    assert stage(bucket, bucket.put(tmp_path / "source", "d"), folder).returncode == 0
    spec = parse_dataset(stage(bucket, f"s3://{bucket.name}/d", folder, "--dataset-path").stdout.strip())
    assert len(make_source(spec)) == 7


def start_slowly(bucket, source, folder, log) -> subprocess.Popen:
    """Start a staging that takes half a minute, in a process group of its own."""
    command = [sys.executable, str(SCRIPT), source, str(folder)]
    with open(log, "w") as file:
        env = {**bucket.env, "RCLONE_BWLIMIT": "100k", "RCLONE_BUFFER_SIZE": "0"}
        return subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)


@pytest.mark.parametrize("compressed", [False, True])
def test_killed_midway_and_run_again(bucket, tmp_path, compressed):
    shards = tmp_path / "shards"
    expected = {}
    for i in range(4):
        content = expected[f"{i}.tar"] = write_tar(shards / f"{i}.tar", count=5 + i, size=150_000)
        if compressed:
            (shards / f"{i}.tar").rename(shards / f"{i}.tar.gz")
            (shards / f"{i}.tar.gz").write_bytes(gzip.compress(content, 1))
    source, folder = bucket.put(shards, "shards"), tmp_path / "local"
    process = start_slowly(bucket, source, folder, tmp_path / "log")
    wait_until(lambda: sum(map(len, contents(folder).values())) > 0, "a part of the data", [process])
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=600)
    assert contents(folder) != expected and not (folder / ".staged.json").exists()

    assert stage(bucket, source, folder).returncode == 0
    assert contents(folder) == expected


def test_a_second_call_waits_for_the_first_and_for_an_rclone_that_outlived_it(bucket, images, tmp_path):
    source, folder = bucket.put(images, "data"), tmp_path / "local"
    process = start_slowly(bucket, source, folder, tmp_path / "log")
    wait_until(lambda: contents(folder), "a part of the data", [process])
    os.kill(process.pid, signal.SIGKILL)  # its rclone goes on
    process.wait(timeout=600)
    second = stage(bucket, source, folder)
    assert second.returncode == 0 and "waiting for another process" in second.stdout
    assert contents(folder) == contents(images)


def damage_end(content: bytes) -> bytes:
    return content[:-9000]


def damage_header(content: bytes) -> bytes:
    return content[:3584] + b"\xff" * 512 + content[4096:]  # the second member's header


def no_tar(content: bytes) -> bytes:
    return b"<html>not found</html>" * 100


@pytest.mark.parametrize("damage", [damage_end, damage_header, no_tar])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_damaged_tar_is_named(bucket, tmp_path, damage, suffix):
    content = damage(write_tar(tmp_path / "x.tar"))
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "good.tar")
    (shards / f"bad{suffix}").write_bytes(gzip.compress(content) if suffix == ".tar.gz" else content)
    error = refused(bucket, bucket.put(shards, "d"), tmp_path / "local")
    assert f"expected a whole tar, got a damaged one: bad{suffix} (" in error

    (shards / f"bad{suffix}").unlink()
    write_tar(shards / "bad.tar")
    subprocess.run(["rclone", "sync", str(shards), f":s3:{bucket.name}/d"], env=bucket.env, check=True, timeout=600)
    assert stage(bucket, f"s3://{bucket.name}/d", tmp_path / "local").returncode == 0


def test_a_truncated_compressed_tar_is_named(bucket, tmp_path):
    shards = tmp_path / "shards"
    (shards / "sub").mkdir(parents=True)
    (shards / "sub" / "x.tar.gz").write_bytes(gzip.compress(write_tar(tmp_path / "x.tar"))[:-500])
    error = refused(bucket, bucket.put(shards, "d"), tmp_path / "local")
    assert f"expected a whole compressed tar, got a damaged one: sub/x.tar.gz of s3://{bucket.name}/d (" in error
    assert "unexpected end of file" in error


def test_what_cannot_be_staged_is_said_in_one_line(bucket, images, tmp_path):
    folder = tmp_path / "local"
    assert "got none; check DATA" in refused(bucket, f"s3://{bucket.name}/nothing/here", folder)
    assert "expected to copy s3://no-such-bucket" in refused(bucket, "s3://no-such-bucket-here/x", folder)
    for wrong in ("bucket/folder", "s3://", "http://host/x", "images"):
        assert f"got '{wrong}'; set DATA" in refused(bucket, wrong, folder)
    unreachable = {"RCLONE_S3_ENDPOINT": "http://127.0.0.1:9", "RCLONE_LOW_LEVEL_RETRIES": "1", "RCLONE_RETRIES": "1"}
    assert "from rclone" in refused(bucket, f"s3://{bucket.name}/x", folder, **unreachable)
    nobody = refused(bucket, f"s3://{bucket.name}/x", folder, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert "NoCredentialProviders" in nobody and nobody.endswith(
        "; give --secret AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY\n"
    )
    assert refused(bucket, bucket.put(images, "d"), Path("/proc/x")).endswith("; choose another DATA_DIR\n")
    assert "command rclone, got none" in refused(bucket, f"s3://{bucket.name}/x", folder, PATH="/nowhere")
    assert f"expected data in {tmp_path}/absent" in refused(bucket, tmp_path / "absent", folder)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_disk_that_is_too_small(bucket, tmp_path, name):
    shards, folder = tmp_path / "shards", tmp_path / "small"
    content = write_tar(tmp_path / "x.tar", 100, 30_000)
    shards.mkdir()
    (shards / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs root: to mount a small disk")
    try:
        error = refused(bucket, bucket.put(shards, "d"), folder)
    finally:
        subprocess.run(["umount", folder], check=True)
    assert error.endswith("; raise disk_size of the task or choose another DATA_DIR, start again\n")


def test_a_folder_with_other_data_is_left_alone(bucket, images, tmp_path):
    folder = tmp_path / "local"
    assert stage(bucket, bucket.put(images, "a"), folder).returncode == 0
    before = contents(folder)
    done = stage(bucket, bucket.put(images, "b"), folder)
    assert done.returncode == 1 and f"got a copy of s3://{bucket.name}/a; choose another DATA_DIR" in done.stderr
    assert contents(folder) == before


def test_a_local_folder_stays_where_it_is(bucket, images, tmp_path):
    done = stage(bucket, images, tmp_path / "local")
    assert done.returncode == 0 and "nothing to copy" in done.stdout and not (tmp_path / "local").exists()
    assert stage(bucket, images, tmp_path / "local", "--dataset-path").stdout == f"{images}\n"
    write_tar(images / "x.tar")
    assert stage(bucket, images, tmp_path / "local", "--dataset-path").stdout == f"Tar:path={images}\n"


def test_keys_in_a_connection_string_are_not_shown(bucket, images, tmp_path):
    bucket.put(images, "d")
    env = {**bucket.env, "RCLONE_S3_ENV_AUTH": "false"}
    endpoint = env.pop("RCLONE_S3_ENDPOINT")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del env[name]
    keys = f"access_key_id={KEY},secret_access_key={SECRET},endpoint='{endpoint}'"
    bucket.env = env
    for path in (f"{bucket.name}/d", "absent-bucket/d"):
        done = stage(bucket, f":s3,provider=Other,{keys}:{path}", tmp_path / "local")
        assert f":s3:{path}" in done.stdout + done.stderr
        if path.startswith(bucket.name):
            assert done.returncode == 0
            assert SECRET not in json.dumps((tmp_path / "local" / ".staged.json").read_text())
