"""Check on every node, before training starts, that this is the requested interpreter and has what we need.

``slurm.py`` copies this file's text into the job script, because the interpreter may lack this package. It therefore
uses only the standard library and the syntax of Python 3.6. Arguments: node, expected sys.prefix or "", expected
executable or "". Prints one line and returns 0, or prints one sentence that starts with "error:" and returns 1.
"""

import importlib
import os
import sys


def main(arguments):
    """Return a sentence that describes the fault, or None."""
    node, prefix, executable = arguments
    here = f"node {node}: {sys.executable} (Python {'.'.join(map(str, sys.version_info[:3]))})"
    real = os.path.realpath
    if prefix and real(sys.prefix) != real(prefix):
        return f"{here} belongs to {sys.prefix}, expected {prefix}; check --conda-env, --venv and --setup"
    if executable and real(sys.executable) != real(executable):
        return f"{here} runs, expected {executable}; check --setup and --modules"
    if sys.version_info < (3, 10):  # noqa: UP036  (whatever Python the job found)
        return f"{here} is too old, expected Python 3.10 or later; choose one with --conda-env, --venv or --python"
    try:
        package = importlib.import_module("dinov2_custom")
        importlib.import_module("dinov2_custom.run.process")
    except Exception as e:  # report any failure to the user
        return f"{here} cannot import dinov2_custom: {type(e).__name__}: {e}; install it in this environment"
    print(f"environment: {here} prefix={sys.prefix} dinov2_custom={package.__version__} from {package.__path__[0]}")
    return None


if __name__ == "__main__":
    problem = main(sys.argv[1:])
    if problem:
        print("error: " + problem)
    sys.exit(1 if problem else 0)
