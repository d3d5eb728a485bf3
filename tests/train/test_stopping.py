import os
import signal
import threading

import pytest

from dinov2_custom.train.stopping import StopRequests


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_signal_is_remembered_with_its_echo_and_a_later_one_acts():
    clock = Clock()
    with pytest.raises(KeyboardInterrupt):
        with StopRequests(clock) as stop:
            assert stop.signum == 0
            os.kill(os.getpid(), signal.SIGINT)
            clock.now = 0.5  # a launcher forwards what the whole group received
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT
            clock.now = 2.0
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_schedulers_warnings_may_come_again(signum):
    clock = Clock()
    with StopRequests(clock) as stop:
        for clock.now in (0.0, 10.0, 20.0):
            os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signal.SIGTERM)  # the end of the time limit, during the save
        assert stop.signum == signum
    assert signal.getsignal(signum) is signal.SIG_DFL


def test_earlier_handlers_are_restored():
    calls = []
    signal.signal(signal.SIGUSR2, lambda *a: calls.append("launcher"))
    try:
        with StopRequests() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.signum == signal.SIGUSR2 and calls == []
        os.kill(os.getpid(), signal.SIGUSR2)
        assert calls == ["launcher"]
    finally:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def test_outside_the_main_thread_no_handler_is_installed():
    def body():
        with StopRequests() as stop:
            seen.append(stop.signum)

    seen = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [0]
