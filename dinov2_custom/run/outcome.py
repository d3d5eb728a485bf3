"""How each process of a launched run ended: one small JSON file a rank, written by ``task.py``, read by the launcher.

Exit codes do not tell enough: when one process fails, srun and torch elastic kill the others, and the largest wins.
Torch-free. Read :class:`Outcome` first.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER_VARIABLE = "DINOV2_OUTCOMES"
KINDS = ("done", "stopped", "lost", "refused", "crashed")


@dataclass(frozen=True)
class Outcome:
    """``kind``: done, stopped (by a signal), lost (sight of another process), refused (for the user to mend), crashed.

    A process that was killed leaves none.
    """

    rank: int
    kind: str
    code: int
    message: str = ""


def write(outcome: Outcome, folder: Path) -> None:
    """Write ``outcome`` into ``folder``, which has to exist."""
    (folder / f"rank{outcome.rank}.json").write_text(json.dumps(asdict(outcome)), encoding="utf-8")


def read(folder: Path) -> list[Outcome]:
    """Return what the processes wrote, by rank; a torn file counts as none."""
    outcomes = []
    for path in folder.glob("rank*.json"):
        try:
            outcomes.append(Outcome(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError):  # killed while writing
            continue
    return sorted(outcomes, key=lambda outcome: outcome.rank)
