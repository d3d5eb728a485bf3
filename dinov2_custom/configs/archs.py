"""Name the architectures and their depths, without importing torch.

Not the models: those are `dinov2_custom.models.vision_transformer`, and a test keeps both lists equal.
"""

DEPTH_OF_ARCH = {
    "vit_nano": 4,
    "vit_micro": 6,
    "vit_tiny": 12,
    "vit_small": 12,
    "vit_base": 12,
    "vit_large": 24,
    "vit_giant2": 40,
}


def plain_arch_name(arch: str) -> str:
    """Strip upstream's `_memeff` suffix, which selected an attention kernel there and has no effect here."""
    return arch.removesuffix("_memeff")
