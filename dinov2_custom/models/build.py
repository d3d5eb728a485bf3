"""Build student and teacher backbones, and heads, from a configuration."""

from __future__ import annotations

from dinov2_custom.errors import ConfigError
from dinov2_custom.layers import DINOHead
from dinov2_custom.models import vision_transformer
from dinov2_custom.models.vision_transformer import DinoVisionTransformer


def build_model(args, only_teacher: bool = False, img_size: int = 224):
    """Build the backbones that ``args`` (the ``student`` section of a configuration) describes.

    Returns:
        (student, teacher, embed_dim), or (teacher, embed_dim) with ``only_teacher``. The teacher has no drop path.

    Raises:
        ConfigError: unknown ``arch``.
    """
    arch = args.arch.removesuffix("_memeff")
    factory = getattr(vision_transformer, arch, None) if arch.startswith("vit_") else None
    if factory is None:
        known = ", ".join(vision_transformer.ARCHITECTURES)
        raise ConfigError(f"student.arch: expected one of {known}, got {args.arch!r}")
    kwargs = {
        "img_size": img_size,
        "patch_size": args.patch_size,
        "init_values": args.layerscale,
        "ffn_layer": args.ffn_layer,
        "block_chunks": args.block_chunks,
        "qkv_bias": args.qkv_bias,
        "proj_bias": args.proj_bias,
        "ffn_bias": args.ffn_bias,
        "num_register_tokens": args.get("num_register_tokens", 0),
        "interpolate_offset": args.get("interpolate_offset", 0.1),
        "interpolate_antialias": args.get("interpolate_antialias", False),
        "in_chans": args.get("in_chans", 3),
        "channel_adaptive": args.get("channel_adaptive", False),
    }
    teacher: DinoVisionTransformer = factory(**kwargs)
    if only_teacher:
        return teacher, teacher.embed_dim
    student: DinoVisionTransformer = factory(
        **kwargs, drop_path_rate=args.drop_path_rate, drop_path_uniform=args.drop_path_uniform
    )
    return student, teacher, student.embed_dim


def build_model_from_cfg(cfg, only_teacher: bool = False):
    """Build from a whole configuration; position embeddings are sized for ``crops.global_crops_size``."""
    return build_model(cfg.student, only_teacher=only_teacher, img_size=cfg.crops.global_crops_size)


def build_heads(cfg, embed_dim: int) -> dict[str, DINOHead]:
    """Return the heads that the losses of ``cfg`` need: ``dino_head``, ``ibot_head``, or both."""
    separate = cfg.ibot.loss_weight > 0 and cfg.ibot.separate_head
    wanted = {
        "dino_head": cfg.dino.loss_weight > 0 or (cfg.ibot.loss_weight > 0 and not separate),
        "ibot_head": separate,
    }
    sections = {"dino_head": cfg.dino, "ibot_head": cfg.ibot}
    return {
        name: DINOHead(
            in_dim=embed_dim,
            out_dim=sections[name].head_n_prototypes,
            hidden_dim=sections[name].head_hidden_dim,
            bottleneck_dim=sections[name].head_bottleneck_dim,
            nlayers=sections[name].head_nlayers,
        )
        for name in ("dino_head", "ibot_head")
        if wanted[name]
    }
