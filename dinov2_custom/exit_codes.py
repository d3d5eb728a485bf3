"""What a process of ours ends with, for shells, launchers and schedulers. Read :func:`should_restart`.

=========  ==================================================================================================
0          done, or nothing to do
1          a mistake or fault that a person has to look at; one line of error, or a traceback, is in the log
2          a command line that cannot be understood
75         a process of the job is gone or hangs (this one too); the same command goes on from the newest checkpoint
128 + n    asked to stop by signal n: 130 SIGINT, 143 SIGTERM, 138 SIGUSR1, 140 SIGUSR2; in training, saved first
=========  ==================================================================================================
"""

from __future__ import annotations

import signal

DONE = 0
ERROR = 1
USAGE = 2
LOST_PROCESS = 75  # sysexits.h calls it EX_TEMPFAIL: try again
# what a child ends with, as Python has it, because another one did: it lost that one, or a launcher stopped it
CONSEQUENCES = (LOST_PROCESS, -signal.SIGTERM)
# a user's Ctrl-C, a kill, and what schedulers send some minutes before they take a node away
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


def stopped_by(signum: int) -> int:
    """Return the exit code of a run that signal ``signum`` asked to stop."""
    return 128 + signum


def to_shell_code(code: int) -> int:
    """Return ``code``, where Python's for a child killed by a signal, which is negative, becomes 128 + signal."""
    return code if code >= 0 else stopped_by(-code)


def should_restart(code: int) -> bool:
    """Return whether the same command, started again by a machine, has work to do and a chance to do it.

    So after a preemption, a kill and a lost process; not after the end, a mistake, or a person's Ctrl-C.
    """
    code = to_shell_code(code)
    return code == LOST_PROCESS or (code > 128 and code != stopped_by(signal.SIGINT))
