"""torchrun, except for its exit code: that of the process that failed first, where torchrun's own is always 1.

``sky/train.yaml`` lists the codes after which SkyPilot starts again, ``dinov2_custom/exit_codes.py`` what they mean. A
process that was killed counts 128 + signal, as in a shell. Read :func:`code_of_the_cause`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable


def code_of_the_cause(failures: Iterable) -> int:
    """Return the exit code of the failure that the others followed from.

    A process that lost another, or that torchrun stopped, may be noticed before the one whose end it felt: torchrun
    looks at its processes now and then.
    """
    from dinov2_custom.exit_codes import CONSEQUENCES, as_a_shell_has_it

    codes = [failure.exitcode for failure in sorted(failures, key=lambda failure: failure.timestamp)]
    causes = [code for code in codes if code not in CONSEQUENCES]
    return as_a_shell_has_it((causes or codes)[0])


def main(arguments: list[str]) -> int:
    """Run torchrun with ``arguments`` and return the exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from dinov2_custom.exit_codes import stopped_by

    try:
        torchrun(arguments)
    except ChildFailedError as e:
        return code_of_the_cause(e.failures.values())
    except SignalException as e:
        return stopped_by(int(e.sigval))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
