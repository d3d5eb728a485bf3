"""Exit codes, messages for errors of other libraries, and the message for a missing package."""

import re
import signal
import sys
from pathlib import Path

import pytest

from dinov2_custom import errors
from dinov2_custom.errors import (
    OF_EXTRA,
    ConfigError,
    DataError,
    install,
    missing,
    optional,
    reason_of,
    should_restart,
    stopped_by,
)

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
GLOO = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:60634. This is typically caused by a remote worker crashing. Check the logs of the remote worker "
    "before reporting an error. GLHF! \U0001f3d6\ufe0f"
)
STORE = (
    "The server socket has failed to listen on any local network address. port: 29500, code: -98, message: address "
    "already in use\nException raised from listenImpl at /pytorch/torch/csrc/distributed/c10d/socket.cpp:1 (most "
    "recent call first):\nframe #0: c10::Error::Error(c10::SourceLocation, std::string) (0x7f in libc10.so)"
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (GLOO, "Connection closed by peer [127.0.0.1]:60634"),
        (STORE, STORE.partition("\n")[0]),
        ("[enforce fail at alloc_cpu.cpp:121] err == 0. not enough memory", None),
        ("boom in [a list] of 3", None),
    ],
)
def test_the_reason_is_kept_and_the_build_path_and_the_jokes_are_not(said, reason):
    assert reason_of(RuntimeError(said)) == (reason or said)


def test_codes_are_those_that_shells_and_the_documentation_know():
    assert [stopped_by(s) for s in errors.STOP_SIGNALS] == [130, 143, 138, 140]
    assert (errors.DONE, errors.ERROR, errors.USAGE, errors.LOST_PROCESS) == (0, 1, 2, 75)


def test_what_a_machine_should_start_again():
    assert all(should_restart(code) for code in (75, 143, 138, 140, 137, -signal.SIGKILL, -signal.SIGTERM))
    assert not any(should_restart(code) for code in (0, 1, 2, 3, 130, -signal.SIGINT))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11; CI runs this there")
def test_every_extra_brings_its_package():
    import tomllib

    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    for package, extra in OF_EXTRA.values():
        assert package in [re.split(r"[<>=]", one)[0] for one in extras[extra]]


def test_an_installed_package_is_returned():
    assert optional("matplotlib.figure", "figures").__name__ == "matplotlib.figure"


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError) as caught:
        optional("sklearn", "--solver sklearn", otherwise="--solver torch")
    assert re.fullmatch(
        r"--solver sklearn: expected the package scikit-learn, got none \(.*sklearn.*\); "
        r"pip install 'dinov2_custom\[eval\]', or --solver torch",
        str(caught.value),
    )
    for name in ("pyarrow", "pyarrow.ipc"):  # which other tests import
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="Parquet: expected the package pyarrow"):
        optional("pyarrow.ipc", "Parquet", DataError)
    assert missing("wandb", "wandb.mode") == f"wandb.mode: expected the package wandb, got none; {install('wandb')}"
