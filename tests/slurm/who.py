"""A task that needs nothing but Python, of no class of ours: says where it runs."""

import json
import os
import sys
from pathlib import Path


class Who:
    """Write ``who.json`` into the output directory."""

    def __init__(self, args):
        self.args = args

    def __call__(self):
        names = ("CONDA_PREFIX", "VIRTUAL_ENV", "HOOK", "LOADEDMODULES", "FROM_LINE")
        facts = {"prefix": sys.prefix, "version": list(sys.version_info[:2]), "executable": sys.executable}
        facts |= {name: os.environ.get(name) for name in names}
        (Path(self.args.output_dir) / "who.json").write_text(json.dumps(facts))
        return 0


if __name__ == "__main__":
    from dinov2_custom import entry
    from dinov2_custom.run.submit import get_args_parser, submit_jobs
    from tests.slurm.who import Who as Importable

    parser = get_args_parser()
    parser.add_argument("--output-dir")
    sys.exit(entry.reported(lambda: submit_jobs(Importable, parser.parse_args(), name="who")))
