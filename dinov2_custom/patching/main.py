"""Apply, revert and show patches."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

import dinov2_custom
from dinov2_custom.errors import ConfigError
from dinov2_custom.patching.checkout import find_package, names_of_blocks, plan, state_of, unused_names, write
from dinov2_custom.patching.patch_file import Patch, read_series, table

_MARKERS = ("<!-- table: made by python -m dinov2_custom.patching.main -->\n", "<!-- end of table -->\n")


def main(args: argparse.Namespace) -> int:
    """Run the action that ``args`` (``cli.patches_parser``) describe and print what changed; return the exit code."""
    root = find_package(args.checkout)
    series = read_series(patches_folder(args.patches))
    chosen = _chosen(series, args.only)
    if args.status:
        for patch in chosen:
            unused = unused_names(patch, root)
            print(f"{patch.name:20} {state_of(patch, root)}" + (f"; {_without_effect(unused)}" if unused else ""))
        return 0
    changes = plan(root, series, chosen, args.revert)
    for path, (now, wanted) in changes.items():
        relative = path.relative_to(root).as_posix()
        if args.diff:
            lines = (text.decode(errors="replace").splitlines(keepends=True) for text in (now, wanted))
            sys.stdout.writelines(difflib.unified_diff(*lines, f"a/{relative}", f"b/{relative}"))
        else:
            write(path, wanted)
            print(f"changed: {relative}")
    if args.diff:
        return 0
    what = f"{len(changes)} files changed" if changes else "nothing to change"
    if args.revert:
        blocks = [(names_of_blocks(now), names_of_blocks(wanted)) for now, wanted in changes.values()]
        taken_out = {name: None for now, wanted in blocks for name in now if name not in wanted}
        print(f"reverted: {', '.join(taken_out) or 'none'} ({what})")
        return 0
    unused = {patch.name: unused_names(patch, root) for patch in chosen}
    print(f"applied: {', '.join(name for name in unused if not unused[name]) or 'none'} ({what})")
    for name in filter(unused.get, unused):
        print(f"{name}: in place, but {_without_effect(unused[name])}")
    return 0


def _without_effect(unused: list[str]) -> str:
    return (
        f"without effect, as the checkout's own training never uses {', '.join(unused)}; let it call that, or wrap in "
        "the same way what it calls instead"
    )


def _chosen(series: list[Patch], only: str) -> list[Patch]:
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = [patch.name for patch in series]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return [patch for patch in series if not names or patch.name in names]


def patches_folder(given: str = "") -> Path:
    """Return the folder of the patch series: ``given``, or ``patches/`` beside the package.

    Raises:
        ConfigError: the package is installed without its repository.
    """
    folder = Path(given).expanduser() if given else Path(dinov2_custom.__file__).parents[1] / "patches"
    if not folder.is_dir():
        raise ConfigError(
            f"--patches: expected the folder patches/ of the repository, got none at {folder}; give its path"
        )
    return folder


def readme_with_table(readme: str, patches: list[Patch]) -> str:
    """Return ``readme`` with the table between its markers regenerated."""
    before, _, rest = readme.partition(_MARKERS[0])
    return before + _MARKERS[0] + table(patches) + _MARKERS[1] + rest.partition(_MARKERS[1])[2]


if __name__ == "__main__":
    home = patches_folder()
    text = readme_with_table((home / "README.md").read_text(encoding="utf-8"), read_series(home))
    (home / "README.md").write_text(text, encoding="utf-8")
