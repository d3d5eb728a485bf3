"""Write a trained decoder as ONNX, and compare it with torch in onnxruntime."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2_custom import cli
from dinov2_custom.decoder import bridge
from dinov2_custom.decoder.bridge import Decoder
from dinov2_custom.errors import CheckpointError, optional
from dinov2_custom.export.onnx_file import normalized, write_graph
from dinov2_custom.export.write import replacing
from dinov2_custom.reading import to_facts

TOLERANCE = 1e-5
OUTPUTS = {
    "detection": ("logits", "pred_boxes"),
    "instance": ("logits", "pred_boxes", "pred_masks"),
    "semantic": ("logits",),
}


class _Graph(nn.Module):
    def __init__(self, decoder: Decoder, normalizes: bool) -> None:
        super().__init__()
        self.model, self.names = decoder.model, OUTPUTS[decoder.facts.task]
        self.normalize = decoder.facts.normalize if normalizes else None

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        output = self.model(pixel_values=normalized(image, self.normalize) if self.normalize else image)
        return tuple(getattr(output, name) for name in self.names)


def main(args: argparse.Namespace) -> int:
    """Run the command line parsed by ``cli.decoder_export_parser``; return the exit code."""
    for name in ("onnx", "onnxscript"):
        optional(name, "the export of a decoder")
    decoder = bridge.load(args.decoder)
    path = Path(args.output).expanduser()
    with replacing(path, args.overwrite, ".onnx") as written:
        difference = write(decoder, written, args.normalize)
    print(f"outputs in onnxruntime differ by at most {difference:.1e}", file=sys.stderr)
    print(path)
    return 0


def write(decoder: Decoder, path: Path, normalizes: bool) -> float:
    """Write the graph ``image`` (batch, C, S, S) -> :data:`OUTPUTS`; return the largest difference in onnxruntime.

    The metadata has the class names, ``image_size``, ``mean``, ``std`` and ``normalizes``, each as JSON.

    Raises:
        CheckpointError: a difference is above ``TOLERANCE`` of the largest output.
    """
    import onnxruntime

    facts = decoder.facts
    graph = _Graph(decoder, normalizes).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, len(facts.normalize["mean"]), facts.image_size, facts.image_size, generator=generator)
    about = {**facts.normalize, "classes": facts.classes, "image_size": facts.image_size, "task": facts.task}
    about |= {"normalizes": normalizes, **to_facts(facts.reading)}
    with torch.no_grad():
        write_graph(graph, image, graph.names, about, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = []
    for batch in (image, image[:1]):  # the batch dimension is dynamic
        with torch.inference_mode():
            wanted = graph(batch)
        for own, got in zip(wanted, session.run(None, {"image": batch.numpy()}), strict=True):
            differences.append(float((own - torch.from_numpy(got)).abs().max() / own.abs().max().clamp_min(1)))
    if not max(differences) <= TOLERANCE:
        raise CheckpointError(
            f"expected onnxruntime to compute the same outputs, got a difference of {max(differences):.1e} (allowed "
            f"{TOLERANCE:.0e}); nothing was written"
        )
    return max(differences)


if __name__ == "__main__":
    cli.main("decode-export")
