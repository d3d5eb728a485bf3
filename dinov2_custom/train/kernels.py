"""Let a run's backbones use the attention kernel that is faster for its shapes. Kernels are in ``layers.backend``."""

from __future__ import annotations

from dinov2_custom import distributed
from dinov2_custom.layers.backend import fastest_attention
from dinov2_custom.train.fast_paths import is_wanted


def choose_attention(model) -> str:
    """Set the kernel of student and teacher, the main process's choice everywhere; return a line for the log.

    All processes must call it, when the model (``SSLMetaArch``) is on its device.
    """
    cfg, backbone = model.cfg, model.student["backbone"]
    if is_wanted(cfg.train.compile):
        return ""  # a compiled block may hold no kernel that the compiler cannot look into
    batch, crops = cfg.train.batch_size_per_gpu, cfg.crops
    segments = [
        (number * batch, 1 + backbone.num_register_tokens + (size // backbone.patch_size) ** 2)
        for number, size in ((2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size))
        if number
    ]
    found = None
    if distributed.is_main_process():
        head_dim = backbone.embed_dim // backbone.num_heads
        dtype = model.precision("student", "backbone")
        found = fastest_attention(segments, backbone.num_heads, head_dim, dtype, model.device)
    backend, line = distributed.broadcast_object(found)
    for part in (model.student, model.teacher):
        for block in part["backbone"].all_blocks():
            if hasattr(getattr(block, "attn", None), "backend"):  # one of ours, and not a user's own
                block.attn.backend = backend
    return line
