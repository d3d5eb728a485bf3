"""Launch a training run (``dinov2_custom/train/train.py``), under upstream's names. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable

from dinov2_custom import cli
from dinov2_custom.run.submit import Task, warn_of_absent


class Trainer(Task):
    """Run training in every process."""

    module, name, script = "dinov2_custom.train.train", "dinov2:train", "run/train/train.py"
    get_parser = staticmethod(cli.train_parser)

    def prepare(self, warn: Callable[[str], None]) -> str:
        """Check the configuration, set ``args.output_dir``, and return the configuration as YAML."""
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


main = Trainer.launch

if __name__ == "__main__":
    cli.main("train")
