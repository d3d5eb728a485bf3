"""What of a training step may be computed from weights instead of by calling modules (``train.lean``).

The modules are looked at in every step, as users hook, patch and replace them at any time. Not here: what counts as a
change (``layers/unmodified``), and the computations. Read :func:`find_shortcuts` first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from dinov2_custom.layers import DINOHead
from dinov2_custom.layers.unmodified import find_change, find_change_of_all, methods_of, unmodified_blocks
from dinov2_custom.loss import DINOLoss, iBOTPatchLoss

if TYPE_CHECKING:
    from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

_LOSSES = {cls: methods_of(cls) for cls in (DINOLoss, iBOTPatchLoss)}  # as they are defined; users may replace them


def takes_options(backbone: nn.Module) -> bool:
    """Return whether the methods of ``backbone`` take ``draws`` and ``packed``; others' overrides have upstream's
    parameters."""
    methods = (getattr(backbone, name) for name in ("forward", "forward_features", "forward_features_list"))
    return all(_takes_options(getattr(method, "__func__", method)) for method in methods)


@functools.lru_cache(maxsize=64)  # looked at in every step, for a fifth of a millisecond
def _takes_options(function: Callable) -> bool:
    taken = inspect.signature(function).parameters
    return "packed" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values())


class Shortcuts(NamedTuple):
    """What is as it was built.

    Attributes:
        student, teacher: blocks of the two backbones.
        heads: whether all heads are, and the losses on them.
        changes: of everything else, what is changed.
    """

    student: frozenset[nn.Module] = frozenset()
    teacher: frozenset[nn.Module] = frozenset()
    heads: bool = False
    changes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Say what is changed and what that costs."""
        others = f" and {len(self.changes) - 1} more" if len(self.changes) > 1 else ""
        return (
            f"train.lean: expected modules as they were built, got {self.changes[0]}{others}; the blocks, "
            "heads or losses that contain it are called as modules, which keeps about twice as much for the backward "
            "pass, and all logits of a head at once; the results are the same (docs/drop-in.md, Hooks, patches, "
            "subclasses)"
        )


def find_shortcuts(model: SSLMetaArch) -> Shortcuts:
    """Look at the modules of ``model`` as they are now."""
    everywhere = find_change_of_all()
    if everywhere is not None:
        return Shortcuts(changes=(everywhere,))
    blocks, changes, changed_heads = {}, [], []
    for side in ("student", "teacher"):
        for name, part in getattr(model, side).items():
            if name == "backbone":
                blocks[side], found = unmodified_blocks(part.blocks, f"{side}.{name}.blocks")
                if not takes_options(part):
                    blocks[side], found = frozenset(), [f"other parameters of {side}.{name}.forward_features"]
                changes += found
            else:
                changed_heads.append(find_change(part, (DINOHead,), f"{side}.{name}", sharded_for="cross_entropy"))
    changed_heads += [_find_changed_loss(getattr(model, name), name) for name in ("dino_loss", "ibot_patch_loss")]
    changed_heads = [change for change in changed_heads if change is not None]
    return Shortcuts(blocks["student"], blocks["teacher"], not changed_heads, (*changes, *changed_heads))


def _find_changed_loss(loss: nn.Module, name: str) -> str | None:
    change = find_change(loss, _LOSSES, name)
    if change is not None:
        return change
    for method, function in _LOSSES[type(loss)].items():
        if method in vars(loss) or getattr(type(loss), method) is not function:
            return f"another {method} of {name}"
    return None
