"""Launch the computation of a dataset's features (``dinov2_custom/embed/``). Does not import torch."""

from __future__ import annotations

from collections.abc import Callable

from dinov2_custom import cli
from dinov2_custom.run.eval.evaluation import check_weights
from dinov2_custom.run.submit import Task, warn_of_absent
from dinov2_custom.utils.run_folder import default_output


class Embedding(Task):
    """Compute features, with the images divided among the processes."""

    module, name, script = "dinov2_custom.embed.main", "dinov2:embed", "run/embed.py"
    get_parser = staticmethod(cli.embed_parser)

    def prepare(self, warn: Callable[[str], None]) -> None:
        """Check that weights and images exist, and choose one output directory for all processes."""
        check_weights("checkpoint", self.args.checkpoint)
        warn_of_absent("dataset", self.args.dataset, warn)
        self.args.output_dir = self.args.output_dir or str(default_output("embed", self.args.checkpoint))


main = Embedding.launch

if __name__ == "__main__":
    cli.main("embed")
