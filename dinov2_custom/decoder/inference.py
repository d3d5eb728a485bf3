"""Apply a trained decoder: boxes and masks as COCO results, or the class of each pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_custom.decoder.bridge import Facts

MAX_DETECTIONS = 100  # per image, as COCO's AP counts


@torch.inference_mode()
def predict(model: Any, pixels: Tensor, sizes: list[tuple[int, int]], facts: Facts) -> list[Any]:
    """Return the predictions of images (B, C, S, S) whose original sizes are (width, height).

    For semantic segmentation these are arrays (height, width) of classes, else lists of dicts with ``category_id``,
    ``bbox`` (x, y, width, height in pixels), ``score``, and ``segmentation`` (RLE) for instances.
    """
    output = model(pixel_values=pixels)
    if facts.task == "semantic":
        return [
            F.interpolate(logits[None].float(), (height, width), mode="bilinear").argmax(1)[0].byte().cpu().numpy()
            for logits, (width, height) in zip(output.logits, sizes, strict=True)
        ]
    masks = output.pred_masks if facts.task == "instance" else [None] * len(sizes)
    rows = zip(output.logits.float(), output.pred_boxes.float(), masks, sizes, strict=True)
    return [_instances(*row) for row in rows]


def _instances(logits: Tensor, boxes: Tensor, masks: Tensor | None, size: tuple[int, int]) -> list[dict[str, Any]]:
    width, height = size
    scores, best = logits.sigmoid().flatten().topk(min(MAX_DETECTIONS, logits.numel()))
    queries, classes = best // logits.shape[1], best % logits.shape[1]
    x, y, w, h = (boxes[queries] * boxes.new_tensor([width, height, width, height])).unbind(1)
    left, right = (x - w / 2).clamp(0, width), (x + w / 2).clamp(0, width)
    top, bottom = (y - h / 2).clamp(0, height), (y + h / 2).clamp(0, height)
    corners = torch.stack([left, top, right - left, bottom - top], dim=1).tolist()
    found = [
        {"category_id": int(c), "bbox": box, "score": float(s)}
        for c, box, s in zip(classes.tolist(), corners, scores.tolist(), strict=True)
    ]
    if masks is not None:
        from pycocotools.mask import encode

        for one, query in zip(found, queries.tolist(), strict=True):
            mask = F.interpolate(masks[query][None, None].float(), (height, width), mode="bilinear")[0, 0] > 0
            code = encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
            one["segmentation"] = {"size": code["size"], "counts": code["counts"].decode("ascii")}
    return found
