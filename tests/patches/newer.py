"""The wheel, adapted to 7764ea0 (2026-06-03) at the places that patches touch."""

from __future__ import annotations

from pathlib import Path

_GUARD = "try:\n    from xformers.ops import"
_SWITCHED = (
    'import os\nXFORMERS_ENABLED = os.environ.get("XFORMERS_DISABLED") is None\n'
    "try:\n    if not XFORMERS_ENABLED:\n        raise ImportError\n    from xformers.ops import"
)
_CHANNELS = "  in_chans: 3\n  channel_adaptive: false\n"
_EDITS = {
    "layers/attention.py": [(_GUARD, _SWITCHED), ("unbind, fmha\n", "unbind\n")],
    "layers/block.py": [(_GUARD, _SWITCHED)],
    "models/__init__.py": [
        ("= dict(\n", "= dict(\n            in_chans=args.in_chans, channel_adaptive=args.channel_adaptive,\n"),
    ],
    "models/vision_transformer.py": [
        (f"def vit_{size}(patch_size=16, ", f"def vit_{size}(patch_size=16, channel_adaptive=False, ")
        for size in ("small", "base", "large", "giant2")
    ],
    "data/loaders.py": [('("root", "extra", "split")', '("root", "extra", "split", "mode", "wildcard")')],
    "data/augmentations.py": [("\nclass DataAug", "\nclass CellAugmentationDINO:\n    pass\n\n\nclass DataAug")],
    "data/__init__.py": [("import DataAugmentationDINO", "import CellAugmentationDINO, DataAugmentationDINO")],
    "train/train.py": [
        ("collate_data_and_cast, Data", "collate_data_and_cast, CellAugmentationDINO, Data"),
        ("= DataAug", "= (CellAugmentationDINO if cfg.train.cell_augmentation else DataAug"),
        ("DataAugmentationDINO(\n", "DataAugmentationDINO)(\n"),
    ],
    "configs/ssl_default_config.yaml": [
        ("  centering:", "  cell_augmentation: false\n  centering:"),
        ("\nstudent:\n", f"\nstudent:\n{_CHANNELS}"),
        ("\nteacher:\n", f"\nteacher:\n{_CHANNELS}"),
    ],
}  # fmt: skip


def as_7764ea0(checkout: Path) -> Path:
    """Edit a copy of the wheel in place; return it."""
    for path, edits in _EDITS.items():
        file = checkout / "dinov2" / path
        text = file.read_text()
        for old, new in edits:
            assert old in text, (path, old)
            text = text.replace(old, new)
        file.write_text(text)
    return checkout
