"""Simulate limited file systems and power cuts by patching ``os``, for the tests of checkpoints.

Its effects on the disk are real; only the success of calls and their number of steps are simulated.
"""

import builtins
import errno
import os

from dinov2_custom.utils import checkpoint_folder

KINDS = ("posix", "no_fsync", "copying_rename")


class PowerCutError(BaseException):
    """Nothing after it reaches the disk."""


class Mount:
    """Patch the calls that change a disk; the ``cut_at``-th of them, and all after it, raise :class:`PowerCutError`.

    ``kind``: ``no_fsync``: flushing fails. ``copying_rename``: a folder is renamed file by file, and a file
    replaced by removing and copying it.
    """

    def __init__(self, monkeypatch, kind: str, cut_at: int = 0) -> None:
        self.kind, self.cut_at, self.count = kind, cut_at, 0
        self.real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")}
        for name in ("unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self._counted(self.real[name]))
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "rename", self.rename)
        monkeypatch.setattr(os, "replace", self.rename)
        open_file = builtins.open

        def open_counted(file, mode="r", *args, **options):
            opened = open_file(file, mode, *args, **options)
            return _Writer(opened, self.tick) if set(mode) & set("wax") else opened

        monkeypatch.setattr(builtins, "open", open_counted)
        save_file = checkpoint_folder.save_file

        def save_file_counted(tensors, path, metadata):  # it writes in Rust, bypassing the patches above
            save_file(tensors, path, metadata)
            data = path.read_bytes()
            with open_counted(path, "wb") as file:
                file.write(data)

        monkeypatch.setattr(checkpoint_folder, "save_file", save_file_counted)

    def tick(self) -> None:
        self.count += 1
        if self.cut_at and self.count >= self.cut_at:
            raise PowerCutError

    def _counted(self, call):
        def counted(*args, **options):
            self.tick()
            return call(*args, **options)

        return counted

    def fsync(self, descriptor) -> None:
        self.tick()
        if self.kind == "no_fsync":
            raise OSError(errno.EINVAL, "Invalid argument")
        self.real["fsync"](descriptor)

    def rename(self, source, target) -> None:
        self.tick()
        if self.kind != "copying_rename":
            self.real["replace"](source, target)
        elif os.path.isdir(source):
            os.mkdir(target)
            for name in sorted(os.listdir(source)):
                self.rename(os.path.join(source, name), os.path.join(target, name))
            os.rmdir(source)
        else:
            if os.path.exists(target):
                os.unlink(target)
            self.tick()
            with open(source, "rb") as file:
                data = file.read()
            with open(target, "wb") as file:
                file.write(data)
            os.unlink(source)


class _Writer:
    """A file opened for writing, each write of which is two steps: half of it, and the rest."""

    def __init__(self, file, tick) -> None:
        self._file, self._tick = file, tick

    def write(self, data) -> int:
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            self._tick()
            self._file.write(part)
            self._file.flush()
        return len(data)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))
