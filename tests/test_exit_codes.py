import signal

from dinov2_custom import exit_codes
from dinov2_custom.exit_codes import should_restart, stopped_by


def test_codes_are_those_that_shells_and_the_documentation_know():
    assert [stopped_by(s) for s in exit_codes.STOP_SIGNALS] == [130, 143, 138, 140]
    assert (exit_codes.DONE, exit_codes.ERROR, exit_codes.USAGE, exit_codes.LOST_PROCESS) == (0, 1, 2, 75)


def test_what_a_machine_should_start_again():
    assert all(should_restart(code) for code in (75, 143, 138, 140, 137, -signal.SIGKILL, -signal.SIGTERM))
    assert not any(should_restart(code) for code in (0, 1, 2, 130, -signal.SIGINT))
