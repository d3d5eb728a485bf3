"""How every script in ``run/`` ends: its main function's exit code, or one line of error. Imports no torch itself."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from dinov2_custom.errors import DINOv2Error


def run(module: str, args: Any, *, error_code: int = 1, quiet_threads: bool = False) -> int:
    """Import ``module``, call its ``main(args)`` and return the exit code; ``error_code`` after a DINOv2Error.

    ``quiet_threads``: compute threads sleep while they wait. Spinning ones slow a CPU run tenfold when data loading
    shares the cores. Torch reads this when it is imported, so it has to be set here.
    """
    if quiet_threads:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main = importlib.import_module(module).main
    try:
        return main(args)
    except DINOv2Error as e:
        print(f"error: {e}", file=sys.stderr)
        return error_code
