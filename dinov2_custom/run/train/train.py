"""Launch a training, under upstream's names. Not the training (``dinov2_custom/train/train.py``). Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dinov2_custom import entry
from dinov2_custom.commands import command
from dinov2_custom.run.submit import Task, get_args_parser, submit_jobs, warn_of_absent
from dinov2_custom.train.args import get_args_parser as get_train_args_parser

__all__ = ["Trainer", "main"]


class Trainer(Task):
    """A training in every process."""

    module = "dinov2_custom.train.train"

    def prepare(self, warn: Callable[[str], None]) -> str:
        """Check the configuration, set ``args.output_dir`` and return the configuration as YAML."""
        from omegaconf import OmegaConf

        from dinov2_custom.configs.load import load_run_config, to_yaml

        args = self.args
        cfg = load_run_config(
            args.config_file,
            args.opts or [],
            args.output_dir,
            allow_unknown_keys=args.allow_unknown_keys,
            world_size=(args.ngpus or 1) * (args.nodes or 1),
            warn=warn,
        )
        args.output_dir = cfg.train.output_dir
        plain = OmegaConf.to_container(cfg, resolve=True)
        warn_of_absent("train.dataset_path", plain["train"]["dataset_path"], warn)
        warn_of_absent("student.pretrained_weights", plain["student"]["pretrained_weights"], warn)
        return to_yaml(cfg)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, launch, and return the exit code."""
    train_parser = get_train_args_parser(add_help=False)
    parser = get_args_parser(train_parser.description, parents=[train_parser])
    parser.prog = command("run/train/train.py")
    return submit_jobs(Trainer, parser.parse_args(arguments), name="dinov2:train")


if __name__ == "__main__":
    entry.leave(entry.reported(main))
