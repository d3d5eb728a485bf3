"""What users read of errors that are not ours."""

import pytest

from dinov2_custom.errors import reason_of

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
