"""torchrun with the exit code of the process that failed first (``exit_codes.py``), where its own is always 1.

``sky/train.yaml`` lists the codes after which SkyPilot starts again. Read :func:`code_of_the_cause`.
"""

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from dinov2_custom.exit_codes import CONSEQUENCES, as_a_shell_has_it, stopped_by


def code_of_the_cause(failures) -> int:
    """Return the code of the failure that the others followed from; torchrun may notice it after theirs."""
    codes = [failure.exitcode for failure in sorted(failures, key=lambda failure: failure.timestamp)]
    causes = [code for code in codes if code not in CONSEQUENCES]
    return as_a_shell_has_it((causes or codes)[0])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ChildFailedError as e:
        sys.exit(code_of_the_cause(e.failures.values()))
    except SignalException as e:
        sys.exit(stopped_by(int(e.sigval)))
