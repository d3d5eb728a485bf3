"""The two-layer feed-forward network of a block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dinov2_custom.layers.lean import activation_linear, by_autograd, gelu_activation, norm_linear
from dinov2_custom.layers.pieces import Pieces


class Mlp(nn.Module):
    """fc2(act(fc1(x))), with dropout after each layer."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

    def forward_lean(
        self, x_TD: Tensor, norm: nn.LayerNorm, gamma: Tensor | None, scale: float, pieces: Pieces
    ) -> Tensor:
        """Return scale * gamma * forward(norm(x)), keeping less for the backward pass; see ``lean``."""
        act = self.act
        activation = gelu_activation(act.approximate, pieces) if type(act) is nn.GELU else by_autograd(act.forward)
        return activation_linear(norm_linear(x_TD, norm, self.fc1, pieces), activation, self.fc2, gamma, scale, pieces)
