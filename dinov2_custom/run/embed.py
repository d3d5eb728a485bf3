"""Launch the features of a dataset. Torch-free."""

from __future__ import annotations

from collections.abc import Callable

from dinov2_custom import cli
from dinov2_custom.run.eval.evaluation import check_weights
from dinov2_custom.run.submit import Task, warn_of_absent
from dinov2_custom.utils.run_folder import default_output


class Embedding(Task):
    """The features in every process, which share the images."""

    module, name, script = "dinov2_custom.embed.main", "dinov2:embed", "run/embed.py"
    get_parser = staticmethod(cli.embed_parser)

    def prepare(self, warn: Callable[[str], None]) -> None:
        """Look for weights and images; choose the output directory, the same for all processes.

        Raises:
            ConfigError: no weights there.
        """
        check_weights("checkpoint", self.args.checkpoint)
        warn_of_absent("dataset", self.args.dataset, warn)
        self.args.output_dir = self.args.output_dir or str(default_output("embed", self.args.checkpoint))


main = Embedding.launch

if __name__ == "__main__":
    cli.main("embed")
