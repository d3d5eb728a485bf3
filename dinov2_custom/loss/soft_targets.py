"""Teacher assignments computed on demand, so that the saved memory does not grow with the batch.

A centre turns logits into assignments, softmax((logits - centre) / temperature): the running mean (``centering``) or
the one that uses all prototypes equally (``sinkhorn``). Neither is in here, nor are the formulas' definitions for users
(``DINOLoss``, ``iBOTPatchLoss``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dinov2_custom.layers.prototype_loss import chunk_size
from dinov2_custom.layers.weight_norm import row_chunks

# Elements kept of logits that are used several times, 128 MiB in 16 bits: 1,024 rows of 65,536 prototypes,
# what ViT-S/14 has at batch 13. Recomputing a logit takes a product over the bottleneck, and no memory.
_KEPT_LOGITS = 2**26


class TeacherLogits:
    """Logits of R rows over K prototypes, computed a chunk of rows at a time.

    Args:
        kept: (R0, K), the logits of the first rows.
        features, weight: (R, D) and (K, D), whose product gives the logits, in the precision of that product; None if
            all are kept.
    """

    def __init__(self, kept: Tensor, features: Tensor | None = None, weight: Tensor | None = None) -> None:
        self.kept, self.features, self.weight = kept, features, weight
        self.num_prototypes, self.device = kept.shape[1], kept.device

    @classmethod
    def of_factors(cls, features: Tensor, weight: Tensor, keep: bool) -> TeacherLogits:
        """Return the logits features weight^T; ``keep``: store them, up to a limit, for repeated use."""
        kept = _product(features[: _KEPT_LOGITS // len(weight) if keep else 0], weight)
        return cls(kept) if len(kept) == len(features) else cls(kept, features, weight)

    def __len__(self) -> int:
        return len(self.kept if self.features is None else self.features)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the logits of some rows, (stop - start, K) float32, in newly allocated memory."""
        if stop <= len(self.kept):
            return self.kept[start:stop].to(torch.float32, copy=True)
        return _product(self.features[start:stop], self.weight).to(torch.float32)

    def chunks(self) -> Iterator[slice]:
        """Return slices of the rows that are computed at a time."""
        return row_chunks(len(self), chunk_size(self.num_prototypes, self.device))


@torch.no_grad()
def _product(features: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        return features @ weight.T


class SoftTargets:
    """Probabilities softmax((logits - center) / temp) of R rows over K prototypes; padding is 0.

    Attributes:
        center: (K,) float32, which must not change while rows are computed.
        real_rows: (R,) 1, or 0 for rows of padding; None if all are real.

    Source: Caron et al. 2021, section 3.1.
    """

    def __init__(
        self, logits: TeacherLogits, center: Tensor, teacher_temp: float, real_rows: Tensor | None = None
    ) -> None:
        self.logits, self.center = logits, center
        self.teacher_temp, self.real_rows = teacher_temp, real_rows

    def __len__(self) -> int:
        return len(self.logits)

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> Tensor:
        """Return the probabilities of some rows, (stop - start, K) float32, in newly allocated memory."""
        probabilities = self._softmax(start, stop)
        return probabilities if self.real_rows is None else probabilities.mul_(self.real_rows[start:stop, None])

    def chunks(self) -> Iterator[Tensor]:
        """Yield all rows, a chunk at a time."""
        for rows in self.logits.chunks():
            yield self.rows(rows.start, rows.stop)

    @torch.no_grad()
    def sum(self) -> Tensor:
        """Return the sum over all rows except padding, (K,) float32."""
        total = torch.zeros(self.logits.num_prototypes, dtype=torch.float32, device=self.logits.device)
        for rows in self.logits.chunks():
            real_rows = None if self.real_rows is None else self.real_rows[rows]
            total += sum_of_rows(self._softmax(rows.start, rows.stop), real_rows)
        return total

    def _softmax(self, start: int, stop: int) -> Tensor:
        logits = self.logits.rows(start, stop).sub_(self.center).mul_(1.0 / self.teacher_temp)
        return torch.softmax(logits, dim=-1)


@torch.no_grad()
def sum_of_logits(features: Tensor, weight: Tensor, real_rows: Tensor | None) -> Tensor:
    """Return the sum of features weight^T over all rows except padding, (K,) float32, without the (R, K) product."""
    with torch.autocast(features.device.type, enabled=False):
        total = sum_of_rows(features.float(), real_rows)
        chunks = row_chunks(len(weight), 2**21 // weight.shape[1])
        return torch.cat([weight[rows].float() @ total for rows in chunks])


def sum_of_rows(rows: Tensor, real_rows: Tensor | None) -> Tensor:
    """Return the sum (K,) of the rows of ``rows`` (R, K) for which ``real_rows`` (R,) is 1."""
    return rows.sum(dim=0) if real_rows is None else real_rows @ rows
