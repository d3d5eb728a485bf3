"""Launch the training of a decoder (``dinov2_custom/decoder/``). Does not import torch."""

from __future__ import annotations

from collections.abc import Callable

from dinov2_custom import cli
from dinov2_custom.run.submit import Task, warn_of_absent


class DecoderTraining(Task):
    """Train a decoder in every process."""

    module, name, script = "dinov2_custom.decoder.train", "dinov2:decoder", "run/decoder/train.py"
    get_parser = staticmethod(cli.decoder_train_parser)

    def prepare(self, warn: Callable[[str], None]) -> None:
        """Check the settings, and warn of weights and labels that are not on this machine."""
        from dinov2_custom.decoder.settings import read_settings

        read_settings(self.args.opts or [])
        for flag in ("backbone", "train", "val"):
            warn_of_absent(f"--{flag}", getattr(self.args, flag), warn)


main = DecoderTraining.launch

if __name__ == "__main__":
    cli.main("decode-train")
