"""A task, not derived from our class, that needs only Python and records where it runs."""

import json
import os
import sys
import time
from pathlib import Path


class Who:
    """Write ``who.json`` to the output directory, after sleeping in the job's attempt ``args.wait_in_attempt``."""

    def __init__(self, args):
        self.args = args

    def __call__(self):
        out = Path(self.args.output_dir)
        out.mkdir(exist_ok=True)
        if os.environ.get("SLURM_RESTART_COUNT", "0") == self.args.wait_in_attempt:
            (out / f"waiting{os.environ['SLURM_PROCID']}").touch()
            time.sleep(1000)
        names = ("CONDA_PREFIX", "VIRTUAL_ENV", "HOOK", "LOADEDMODULES", "FROM_LINE")
        facts = {"prefix": sys.prefix, "version": list(sys.version_info[:2]), "executable": sys.executable}
        foreign = ("RANK", "MASTER_PORT", "OMPI_COMM_WORLD_RANK")
        facts["foreign"] = {name: os.environ[name] for name in foreign if name in os.environ}
        facts["opts"] = getattr(self.args, "opts", None)
        facts |= {name: os.environ.get(name) for name in names}
        (out / "who.json").write_text(json.dumps(facts))
        return 0


if __name__ == "__main__":
    from dinov2_custom import entry
    from dinov2_custom.run.submit import get_args_parser, submit_jobs
    from tests.slurm.who import Who as Importable

    parser = get_args_parser()
    parser.add_argument("--output-dir")
    parser.add_argument("--wait-in-attempt")
    sys.exit(entry.reported(lambda: submit_jobs(Importable, parser.parse_args(), name="who")))
