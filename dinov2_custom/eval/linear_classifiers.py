"""Linear classifiers on the tokens of a frozen backbone, many at once. Upstream's names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.utils.rng import generator_for

# (patches (B, N, D), class token (B, D)) of some blocks, in order of depth
Tokens = Sequence[tuple[Tensor, Tensor]]
_MIN_DECIMALS, _MAX_DECIMALS = 5, 15


def create_linear_input(x_tokens_list: Tokens, use_n_blocks: int, use_avgpool: bool) -> Tensor:
    """Return (B, (use_n_blocks [+ 1]) * D) float32: the last blocks' class tokens [and the last block's mean patch]."""
    blocks = x_tokens_list[-use_n_blocks:]
    parts = [class_token for _, class_token in blocks]
    if use_avgpool:
        parts.append(blocks[-1][0].mean(dim=1))
    return torch.cat(parts, dim=-1).float()


class LinearClassifier(nn.Module):
    """One linear layer over :func:`create_linear_input`; weights start at N(0, 0.01), biases at 0.

    Args:
        out_dim: length of its input features.
        generator: for the weights; None for torch's global one.
    """

    def __init__(
        self,
        out_dim: int,
        use_n_blocks: int,
        use_avgpool: bool,
        num_classes: int = 1000,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.out_dim, self.use_n_blocks, self.use_avgpool = out_dim, use_n_blocks, use_avgpool
        self.num_classes = num_classes
        self.linear = nn.utils.skip_init(nn.Linear, out_dim, num_classes)
        nn.init.normal_(self.linear.weight, mean=0.0, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_tokens_list: Tokens) -> Tensor:
        """Return logits (B, num_classes)."""
        return self.linear(create_linear_input(x_tokens_list, self.use_n_blocks, self.use_avgpool))


class AllClassifiers(nn.Module):
    """Named classifiers applied to the same tokens."""

    def __init__(self, classifiers_dict: Mapping[str, LinearClassifier]) -> None:
        super().__init__()
        self.classifiers_dict = nn.ModuleDict(classifiers_dict)

    def forward(self, inputs: Tokens) -> dict[str, Tensor]:
        """Return ``{name: logits}``; inputs shared by classifiers are computed once."""
        made: dict[tuple[int, bool], Tensor] = {}
        logits = {}
        for name, classifier in self.classifiers_dict.items():
            kind = classifier.use_n_blocks, classifier.use_avgpool
            if kind not in made:
                made[kind] = create_linear_input(inputs, *kind)
            logits[name] = classifier.linear(made[kind])
        return logits

    def __len__(self) -> int:
        return len(self.classifiers_dict)


class LinearPostprocessor(nn.Module):
    """Map tokens to a metric's arguments: ``{"preds": logits, "target": targets}``.

    Args:
        class_mapping: index of the training class for each target class; None if they are the same.
    """

    def __init__(self, linear_classifier: LinearClassifier, class_mapping: Sequence[int] | None = None) -> None:
        super().__init__()
        self.linear_classifier = linear_classifier
        self.register_buffer("class_mapping", None if class_mapping is None else torch.as_tensor(class_mapping).long())

    def forward(self, samples: Tokens, targets: Tensor) -> dict[str, Tensor]:
        preds = self.linear_classifier(samples)
        if self.class_mapping is not None:
            preds = preds[:, self.class_mapping.to(preds.device)]
        return {"preds": preds, "target": targets}


def scale_lr(learning_rates: float, batch_size: int) -> float:
    """Scale a learning rate given for 256 images to the global batch."""
    return learning_rates * (batch_size * distributed.get_global_size()) / 256.0


def setup_linear_classifiers(
    sample_output: Tokens,
    n_last_blocks_list: Sequence[int],
    learning_rates: Sequence[float],
    batch_size: int,
    num_classes: int = 1000,
) -> tuple[AllClassifiers, list[dict]]:
    """Create one classifier for each number of blocks, with and without mean patch, and each learning rate.

    Args:
        sample_output: tokens of any image, which determine widths and device.
        learning_rates: for 256 images; see :func:`scale_lr`.
        batch_size: images per step on each rank.

    Returns:
        The classifiers, by upstream's names (see :func:`rate_names`), and the optimizer's groups.
    """
    rates = rate_names([scale_lr(rate, batch_size) for rate in learning_rates])
    classifiers: dict[str, LinearClassifier] = {}
    groups = []
    for n_blocks in n_last_blocks_list:
        for avgpool in (False, True):
            out_dim = create_linear_input(sample_output, n_blocks, avgpool).shape[1]
            for text, rate in rates.items():
                generator = generator_for(0, "linear", n_blocks, avgpool, rate)
                classifier = LinearClassifier(out_dim, n_blocks, avgpool, num_classes, generator=generator)
                classifiers[f"classifier_{n_blocks}_blocks_avgpool_{avgpool}_lr_{text}"] = classifier
                groups.append({"params": classifier.parameters(), "lr": rate})
    return AllClassifiers(classifiers).to(sample_output[0][0].device), groups


def rate_names(rates: Sequence[float]) -> dict[str, float]:
    """Return ``{text: rate}``: five decimals as upstream, more if two rates would share a name or round to zero.

    In upstream the later classifier replaces the earlier one then: of 13 rates, 10 are left at 8 images per step.
    """
    distinct = list(dict.fromkeys(rates))
    return {next(_texts(rate, distinct)).replace(".", "_"): rate for rate in distinct}


def _texts(rate: float, rates: Sequence[float]) -> Iterator[str]:
    for decimals in range(_MIN_DECIMALS, _MAX_DECIMALS):
        text = f"{rate:.{decimals}f}"
        is_close = decimals == _MIN_DECIMALS or math.isclose(float(text), rate, rel_tol=0.05)
        if is_close and sum(f"{other:.{decimals}f}" == text for other in rates) == 1 and (float(text) or not rate):
            yield text
    yield repr(rate)


def has_ddp_wrapper(m: nn.Module) -> bool:
    """Return whether ``m`` is wrapped for data parallelism."""
    return isinstance(m, nn.parallel.DistributedDataParallel)


def remove_ddp_wrapper(m: nn.Module) -> nn.Module:
    """Return the module inside a data-parallel wrapper, or ``m``."""
    return m.module if has_ddp_wrapper(m) else m


def sum_of_losses(logits: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return the sum over all classifiers of their mean cross-entropy; each one's gradient is that of its own loss."""
    return torch.stack([F.cross_entropy(one, labels) for one in logits.values()]).sum()
