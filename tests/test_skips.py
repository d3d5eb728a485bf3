"""The last line of a run names the missing tools, and the tests that need them can be rerun by name."""

import os
import subprocess
import sys

from tests.processes import CEILING_S, REPOSITORY


def test_what_needs_a_tool_is_counted_in_the_last_line_and_listed(tmp_path):
    nothing = {"CUDA_VISIBLE_DEVICES": "", "DINOV2_SKIPPED": str(tmp_path / "skipped")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": CEILING_S}
    bare = subprocess.run([*command, "tests/gpu/test_embed.py"], env=os.environ | nothing, **options)
    skipped = (tmp_path / "skipped").read_text().splitlines()
    assert bare.returncode == 0 and skipped
    assert bare.stdout.splitlines()[-1].startswith(f"skipped: {len(skipped)} need a GPU; .ci/run, as root, ")
    again = subprocess.run([*command, "--collect-only", f"@{tmp_path}/skipped"], **options)
    assert set(skipped) < set(again.stdout.splitlines()), again.stdout
