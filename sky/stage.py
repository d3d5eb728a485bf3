"""Bring a data set from a bucket to a local disk: python sky/stage.py s3://bucket/images /local/folder

Copies with rclone, checks that all has come and that tars are whole, then writes a marker: with the marker there is
nothing to do, without it the rest is fetched. A compressed tar is unpacked on its way to a plain ``.tar``; tars stay
tars, since training reads them in place. A source that is a folder of this machine is left where it is. Needs nothing
but Python and rclone. Read :func:`stage` first.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

MARKER, LOCK = ".staged.json", ".staging.lock"
DECOMPRESS = {".tar.gz": "gzip", ".tgz": "gzip", ".tar.bz2": "bzip2", ".tar.xz": "xz", ".tar.zst": "zstd"}
SCHEMES = {"s3": ":s3:", "gs": ":gcs:"}
ROWS = (".parquet", ".arrow")
_ADVICE = {  # what rclone may say -> what to do
    "credential|denied|forbidden|accesskeyid|signature": "give --secret AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "disk space|no space left": "raise disk_size of the task or choose another DATA_DIR, start again",
    "directory not found|nosuchbucket": "is there such a bucket and folder? check DATA",
}


class StagingError(Exception):
    """Data that cannot be brought here; the message says what was expected, what was found and what to do."""


def stage(source: str, folder: Path) -> str:
    """Make ``folder`` a complete copy of ``source`` and return what was done, in words.

    Raises:
        StagingError: nothing there, a transfer that failed, or a damaged archive; calling it again goes on.
    """
    if is_local(source):
        if not os.path.exists(source):
            raise StagingError(f"expected data in {source}, got nothing of that name; check DATA")
        return f"{source} is on this machine: nothing to copy"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock:
        if found := _marker(folder):
            if found["source"] != hashlib.sha256(source.encode()).hexdigest():
                raise StagingError(
                    f"expected {shown(source)} in {folder}, got a copy of {found['shown']}; choose another DATA_DIR or "
                    "remove that folder"
                )
            return f"{folder} was complete: {found['files']:,} files of {found['shown']}"
        files = list_files(source)
        plain = {name: size for name, size in files.items() if not _suffix(name)}
        print(f"{shown(source)} -> {folder}: {len(files):,} files, {sum(files.values()) / 1e9:.2f} GB", flush=True)
        single = len(files) == 1 and remote(source).rpartition("/")[2] in files
        if plain:  # rclone refuses filters with a single file
            filters = [] if single else [*(f"--exclude=*{suffix}" for suffix in DECOMPRESS), "--ignore-case"]
            _rclone(source, "copy", "--transfers=16", *filters, remote(source), str(folder), lock=lock)
        for name in sorted(files.keys() - plain.keys()):
            place = remote(source) if single else f"{remote(source)}/{name}"
            _unpack(source, place, name, folder / (name[: -len(_suffix(name))] + ".tar"), lock)
        _check_copies(source, folder, plain)
        _write_marker(source, folder, files)
        return f"{folder} is complete: {len(files):,} files of {shown(source)}"


def dataset_path(source: str, folder: Path) -> str:
    """Return what to give to ``train.dataset_path`` after :func:`stage`.

    Raises:
        StagingError: ``folder`` is not complete.
    """
    if is_local(source):
        names = os.listdir(source) if os.path.isdir(source) else []
        return _spec(source, {Path(name).suffix.lower() for name in names})
    found = _marker(folder)
    if found is None:
        raise StagingError(f"expected the data of {shown(source)} in {folder}, got no complete copy; run sky/setup.sh")
    return _spec(str(folder), set(found["suffixes"]))


def _spec(place: str, suffixes: set[str]) -> str:
    if ".tar" in suffixes:
        return f"Tar:path={place}"
    return f"Parquet:path={place}" if suffixes & set(ROWS) else place


def is_local(source: str) -> bool:
    """Return whether ``source`` is a path of this machine and not a URL or an rclone remote."""
    return source.startswith(("/", "./"))


def remote(source: str) -> str:
    """Return rclone's name for ``source``: s3://b/p, gs://b/p, or ``remote:path``, which stays as it is.

    Raises:
        StagingError: it is neither.
    """
    url = re.match(r"(\w+)://(.*)", source)
    if url and url[1] in SCHEMES and url[2].strip("/"):
        return SCHEMES[url[1]] + url[2].strip("/")
    if not url and ":" in source.lstrip(":"):
        return source.rstrip("/")
    raise StagingError(
        "expected s3://bucket/folder, gs://bucket/folder, rclone's remote:folder or an absolute path, got "
        f"{shown(source)!r}; set DATA"
    )


def shown(source: str) -> str:
    """Return ``source`` without the options of an rclone connection string, which may hold keys."""
    return re.sub(r"^(:?[\w.-]+),.*?:(?=[^:]*$)", r"\1:", source)


def list_files(source: str) -> dict[str, int]:
    """Return name -> size in bytes of every file.

    Raises:
        StagingError: none there, or rclone cannot read it.
    """
    listing = _rclone(source, "lsf", "-R", "--files-only", "--format", "sp", "--separator", "\t", remote(source))
    files = {}
    for line in listing.removesuffix("\n").split("\n") if listing else []:
        size, _, name = line.partition("\t")
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise StagingError(f"expected file names below {shown(source)}, got {name!r}; rename that object")
        files[name] = int(size)
    if doubled := [name for name in files if _suffix(name) and name[: -len(_suffix(name))] + ".tar" in files]:
        raise StagingError(
            f"expected each tar once in {shown(source)}, got {doubled[0]} beside the same .tar; remove one"
        )
    if not files:
        raise StagingError(f"expected files in {shown(source)}, got none; check DATA (bucket, folder, region)")
    return files


def _suffix(name: str) -> str:
    """Return the suffix of a compressed tar, "" for any other file."""
    return next((suffix for suffix in DECOMPRESS if name.lower().endswith(suffix)), "")


def _unpack(source: str, place: str, name: str, target: Path, lock: int) -> None:
    """Stream one compressed tar into a plain one; its name appears when it is whole."""
    partial = target.with_name(target.name + ".partial")
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "wb") as file:
        cat = _start(["rclone", "cat", place], lock, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        unpack = _start([DECOMPRESS[_suffix(name)], "-dc"], lock, stdin=cat.stdout, stdout=file, stderr=subprocess.PIPE)
        cat.stdout.close()
        trouble = unpack.communicate()[1]
        lost = cat.stderr.read()
    if cat.wait() and not (cat.returncode == -signal.SIGPIPE or b"broken pipe" in lost):
        raise StagingError(_explain(source, lost))
    if unpack.returncode and b"No space left" in trouble:
        raise StagingError(_explain(source, trouble))
    if unpack.returncode:
        reason = trouble.decode(errors="replace").strip().splitlines() or ["no message"]
        raise StagingError(
            f"expected a whole compressed tar, got a damaged one: {name} of {shown(source)} ({reason[0]}); "
            "make it again and upload it"
        )
    check_tar(partial, name)
    os.replace(partial, target)


def _check_copies(source: str, folder: Path, files: dict[str, int]) -> None:
    wrong = []
    for name, size in files.items():
        path = folder / name
        got = path.stat().st_size if path.is_file() else None
        if got != size:
            wrong.append(f"{name}: {'nothing' if got is None else f'{got:,} bytes'} instead of {size:,}")
        elif name.lower().endswith(".tar"):
            check_tar(path, name)
    if wrong:
        raise StagingError(
            f"expected a complete copy of {shown(source)} in {folder}, got {len(wrong)} wrong files: "
            f"{'; '.join(wrong[:5])}; start again"
        )


def check_tar(path: Path, name: str) -> None:
    """Walk the headers of a tar to its end mark; the contents are not read.

    Raises:
        StagingError: it is no tar, ends early or has a damaged header.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            while archive.next():
                archive.members = []  # millions of them
            position = archive.offset
        with open(path, "rb") as file:
            file.seek(position)
            block = file.read(tarfile.BLOCKSIZE)
        problem = "it ends early" if len(block) < tarfile.BLOCKSIZE else "damaged header" if any(block) else ""
        problem = problem and f"{problem}, byte {position:,}"
    except tarfile.TarError as e:
        problem = str(e).splitlines()[0]
    if problem:
        raise StagingError(f"expected a whole tar, got a damaged one: {name} ({problem}); make it again and upload it")


# the marker


def _marker(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MARKER).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _write_marker(source: str, folder: Path, files: dict[str, int]) -> None:
    suffixes = {".tar" if _suffix(name) else PurePosixPath(name).suffix.lower() for name in files}
    content = {
        "source": hashlib.sha256(source.encode()).hexdigest(),
        "shown": shown(source),
        "files": len(files),
        "suffixes": sorted(suffixes & {".tar", *ROWS}),
    }
    temporary = folder / (MARKER + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, folder / MARKER)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold ``folder``: a second caller waits, also for an rclone that outlived a killed first one."""
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that fills {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _rclone(source: str, *arguments: str, lock: int | None = None) -> str:
    process = _start(["rclone", *arguments], lock, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    if process.returncode:
        raise StagingError(_explain(source, err))
    return out.decode(errors="surrogateescape")


def _start(command: list[str], lock: int | None, **pipes: Any) -> subprocess.Popen:
    env = {"RCLONE_S3_PROVIDER": "AWS", "RCLONE_S3_ENV_AUTH": "true", "RCLONE_GCS_ENV_AUTH": "true", **os.environ}
    if region := env.get("AWS_REGION"):
        env.setdefault("RCLONE_S3_REGION", region)
    try:
        return subprocess.Popen(command, env=env, pass_fds=() if lock is None else (lock,), **pipes)
    except FileNotFoundError as e:
        raise StagingError(f"expected the command {command[0]}, got none; install it") from e


def _explain(source: str, stderr: bytes) -> str:
    text = stderr.decode(errors="replace").strip()
    last = re.split(r"^\d{4}/\d\d/\d\d [\d:]+ ", text, flags=re.MULTILINE)[-1]  # a message may have several lines
    reason = " ".join(last.replace("For verbose messaging see aws.Config.CredentialsChainVerboseErrors", "").split())
    known = (advice for words, advice in _ADVICE.items() if re.search(words, reason.lower()))
    advice = next(known, "check DATA and credentials, start again")
    return f"expected to copy {shown(source)}, got from rclone: {shown(reason) or 'no message'}; {advice}"


def main(arguments: list[str] | None = None) -> int:
    """Stage, or print the dataset path; one line of error, and return the exit code."""
    parser = argparse.ArgumentParser(description="Bring a data set from a bucket to a local disk.")
    parser.add_argument(
        "source", help="s3://bucket/folder, gs://bucket/folder, rclone's remote:folder, or a local path"
    )
    parser.add_argument("folder", type=Path, help="where it goes")
    parser.add_argument(
        "--dataset-path", action="store_true", help="copy nothing; print what train.dataset_path is to be"
    )
    args = parser.parse_args(arguments)
    try:
        print((dataset_path if args.dataset_path else stage)(args.source, args.folder))
    except StagingError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"error: expected to write {e.filename}, got {e.strerror}; choose another DATA_DIR", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
