"""Base class of the evaluation launchers (``dinov2_custom/eval/`` has the evaluations). Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.run.submit import Task, warn_of_absent
from dinov2_custom.utils.run_folder import find_weights


class Evaluation(Task):
    """Evaluate ``args.pretrained_weights`` in every process."""

    def prepare(self, warn: Callable[[str], None]) -> None:
        """Check that the weights and the data exist.

        Raises:
            ConfigError: if there are no weights there, or a dataset was not given.
        """
        check_weights("--pretrained-weights", self.args.pretrained_weights)
        given_data = {f"--{name}-dataset": getattr(self.args, f"{name}_dataset_str", None) for name in ("train", "val")}
        if missing := [flag for flag, text in given_data.items() if text and re.fullmatch(r"ImageNet:split=\w+", text)]:
            raise ConfigError(
                f"{', '.join(missing)}: expected a dataset with labels, got none; add LabelledFolder:root=<a folder a "
                "class>, or ImageNet:split=TRAIN:root=<folder>"
            )
        given_data["--test-datasets"] = getattr(self.args, "test_dataset_strs", None)
        for flag, text in given_data.items():
            warn_of_absent(flag, text, warn)


def check_weights(flag: str, given: str) -> None:
    """Check that the weights given by ``flag`` exist.

    Raises:
        ConfigError: if there is nothing, or a directory without weights.
    """
    try:
        weights = given and find_weights(given)
    except CheckpointError as e:
        raise ConfigError(f"{flag}: {e}") from e
    if not weights or ("://" not in weights and not Path(weights).exists()):
        got = given or "nothing"
        raise ConfigError(f"{flag}: expected a weight file or a run directory, got {got}; check it")
