"""The projection head of DINO and iBOT: an MLP, L2 normalisation, and a weight-normalised layer of prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from dinov2_custom.layers.prototype_loss import PrototypeJob, prototype_cross_entropy
from dinov2_custom.layers.weight_norm import normalised


class WeightNormLinear(nn.Module):
    """Bias-free linear layer whose rows are ``weight_g`` * ``weight_v`` / |``weight_v``| (Salimans & Kingma 2016).

    The parameter names are those of torch's first weight norm, which released heads carry; its successor's differ.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw ``weight_v`` uniformly in +-1/sqrt(in_features), as ``nn.Linear`` does; set ``weight_g`` to 1."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight_v, -bound, bound, generator=generator)
        nn.init.ones_(self.weight_g)

    def weight(self) -> Tensor:
        """Return the effective (out_features, in_features) weight matrix."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.linear(x, self.weight())
        return F.linear(x, normalised(self.weight_v, self.weight_g, x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class DINOHead(nn.Module):
    """Map features (..., in_dim) to prototype logits (..., out_dim).

    Args:
        nlayers: linear layers of the MLP; 1 makes ``mlp`` a single layer.
        use_bn: batch norm after each hidden layer.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (max(nlayers, 1) - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for index in range(len(widths) - 1):
            layers.append(nn.Linear(widths[index], widths[index + 1], bias=mlp_bias))
            if index < len(widths) - 2:
                layers += [nn.BatchNorm1d(widths[index + 1]), nn.GELU()] if use_bn else [nn.GELU()]
        self.mlp = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.chunk_loss = None  # or a replacement for prototype_loss.chunk_cross_entropy

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.embed(x))

    def cross_entropy(self, x: Tensor, jobs: Sequence[PrototypeJob]) -> tuple[Tensor, Tensor]:
        """Return the jobs' summed loss over the prototypes of features (R, in_dim), and the losses without gradient.

        Equal to cross-entropies of ``forward``'s logits, which are never materialised in full.
        """
        last = self.last_layer
        return prototype_cross_entropy(self.embed(x), last.weight_v, last.weight_g, jobs, self.chunk_loss)

    @torch.no_grad()
    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (R, bottleneck_dim) and (out_dim, bottleneck_dim), both in the product's precision, without gradient.

        The first times the second's transpose are ``forward``'s logits of features (R, in_dim).
        """
        features = self.embed(x)
        return features, normalised(self.last_layer.weight_v, self.last_layer.weight_g, features.dtype)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients down to a total norm of at most ``max_norm``; return the original norm. FSDP's name."""
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm, norm_type)

    def embed(self, x: Tensor) -> Tensor:
        """Return the L2-normalised bottleneck features (..., bottleneck_dim)."""
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return F.normalize(x.float(), dim=-1, eps=eps).to(x.dtype)
