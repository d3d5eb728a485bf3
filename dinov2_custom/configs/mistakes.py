"""Collect the mistakes of a configuration and raise them as one error.

Not the finding of mistakes (load.py, values.py, combinations.py). Read `Mistakes` first.
"""

import difflib
import os

from dinov2_custom.configs.schema import all_options
from dinov2_custom.errors import ConfigError

# Names people try first, and the key they mean.
_OTHER_NAMES = {
    "lr": "optim.base_lr",
    "learning_rate": "optim.base_lr",
    "batch_size": "train.batch_size_per_gpu",
    "data_path": "train.dataset_path",
    "dataset": "train.dataset_path",
    "workers": "train.num_workers",
    "epoch_length": "train.OFFICIAL_EPOCH_LENGTH",
    "registers": "student.num_register_tokens",
    "use_torch_compile": "train.compile",
}
# Keys and sections of known forks that are not adopted, and what is here instead.
OF_FORKS = {
    "daino": "the supervised side loss of a fork, which is not here",
    "tune": "kNN during training of a fork: not here; run/eval/knn.py, in the command that a run ends with",
    "early_stopping": "stop when a score no longer rises, of a fork: not here",
    "optim.max_iter": "train.max_steps",
    "optim.warmup_pct": "optim.warmup_epochs with a share of the run, such as 10%",
    "optim.freeze_last_layer_pct": "optim.freeze_last_layer_epochs with a share of the run, such as 1%",
    "teacher.warmup_teacher_temp_pct": "teacher.warmup_teacher_temp_epochs with a share of the run, such as 30%",
    "train.save_every": "checkpointing.period, in iterations",
    "train.save_frequency": "checkpointing.period",
    "wandb.dir": "nothing: W&B's files are in the output directory's logs/wandb",
    "wandb.enable": "wandb.mode: online",
    "wandb.exp_name": "wandb.name",
    "wandb.resume_id": "wandb.id",
    "wandb.username": "wandb.entity",
}


class Mistakes:
    """A list of mistakes with one closing advice; the keys are remembered so that no check builds on a bad value."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.keys: set[str] = set()
        self.advice = ""

    def add(self, where: str, expected: str, got: str, fix: str = "", *, key: str = "") -> None:
        """Add one line: where it is (key and source), what was expected, what was found, what to do."""
        advice = f" -> {fix}" if fix else ""
        self.lines.append(f"{where}: expected {expected}, got {got}{advice}")
        if key:
            self.keys.add(key)

    def raise_if_any(self) -> None:
        """Raise one ConfigError naming all mistakes, if there are any."""
        if not self.lines:
            return
        count = "1 mistake" if len(self.lines) == 1 else f"{len(self.lines)} mistakes"
        lines = [f"{count} in the configuration:", *(f"  - {line}" for line in self.lines), self.advice]
        raise ConfigError("\n".join(lines).rstrip())


def suggest_key(key: str) -> str:
    """Name the known keys or sections nearest to an unknown dotted key, in any section; "" if nothing is near.

    Of a fork's key, say what is here instead.
    """
    if key in OF_FORKS:
        return OF_FORKS[key]
    options = all_options()
    sections = {name.rsplit(".", count)[0]: None for name in options for count in range(1, name.count(".") + 1)}
    known = [name for name, option in options.items() if not option.unused and name != "optim.lr"] + list(sections)
    leaf = key.rsplit(".", 1)[-1].lower()
    near = [name for name in known if _leaf(name) == leaf]
    if not near and leaf in _OTHER_NAMES:
        near = [_OTHER_NAMES[leaf]]
    near = near or difflib.get_close_matches(key, known, n=2, cutoff=0.8)
    if not near:
        by_leaf = {_leaf(name): name for name in reversed(known)}
        near = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=2, cutoff=0.65)]
    return f"did you mean {' or '.join(near[:3])}?" if near else ""


def explain_bad_override(text: str) -> str:
    """Say what to do about an override that is not of the form key=value."""
    if text.endswith((".yaml", ".yml")):
        return f"for a config file write --config-file {text}"
    if text in all_options():
        return f"write {text}=VALUE"
    if os.path.exists(os.path.expanduser(text)):
        return f"for images write train.dataset_path={text}"
    if ":" in text and text.split(":", 1)[0] in all_options():
        return "write = instead of the first colon"
    if text != text.strip("[]{},:"):
        return "a list or mapping with blanks needs quotes around the whole override: 'key=[a, b]'"
    return suggest_key(text).replace("?", "=VALUE?") or "write key=value, without spaces around ="


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1].lower()
