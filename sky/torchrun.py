"""torchrun, except for its exit code: that of the process that failed first, where torchrun's own is always 1.

``sky/train.yaml`` lists the codes after which SkyPilot starts again, ``dinov2_custom/exit_codes.py`` what they mean. A
process that was killed counts 128 + signal, as in a shell.
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """Run torchrun with ``arguments`` and return the exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from dinov2_custom.exit_codes import stopped_by

    try:
        torchrun(arguments)
    except ChildFailedError as e:
        code = e.get_first_failure()[1].exitcode
        return code if code >= 0 else stopped_by(-code)
    except SignalException as e:
        return stopped_by(int(e.sigval))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
