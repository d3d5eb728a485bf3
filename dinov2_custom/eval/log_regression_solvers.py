"""Multinomial logistic regression with an L2 penalty, by L-BFGS: torch's on any device, or scikit-learn's on a CPU.

Both minimise C * (sum of cross-entropies) + |weight|^2 / 2; the bias is not penalised.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor

from dinov2_custom.errors import ConfigError, DataError, optional

logger = logging.getLogger("dinov2")
SOLVERS = ("torch", "sklearn")
_HISTORY = 20  # size of the L-BFGS history
_CHUNK_ELEMENTS = 1 << 26  # logits at a time: 512 MiB in float64
# largest element of the scaled gradient, smallest change, by dtype
_TOLERANCES = {torch.float64: (1e-7, 1e-14), torch.float32: (1e-5, 1e-9)}
_MOST_IN_FLOAT32 = 1e-4  # largest acceptable ratio of the float64 gradient to that tolerance after a float32 fit
Solution = tuple[Tensor, Tensor]  # weight (classes, D), bias (classes,)


def fit(
    features: Tensor,
    labels: Tensor,
    C: float,
    max_iter: int,
    num_classes: int,
    *,
    solver: str = "torch",
    start: Solution | None = None,
) -> Solution:
    """Return the minimum for features (N, D) and labels (N,) in 0..num_classes-1, with ``features``' dtype and device.

    Classes without a sample get the bias -inf: they are never predicted.

    Args:
        solver: one of :data:`SOLVERS`.
        start: solution for another ``C``; the minimum is the same, but torch needs fewer iterations.

    Raises:
        ConfigError: unknown solver, or scikit-learn is not installed.
        DataError: fewer than two classes.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"--solver: expected one of {', '.join(SOLVERS)}, got {solver}")
    seen, labels = labels.unique(return_inverse=True)
    if len(seen) < 2:
        raise DataError(f"--train-dataset: expected images of at least two classes, got {len(seen)}")
    if solver == "sklearn":
        found = fit_sklearn(features, labels, C, max_iter)
    else:
        start = None if start is None else (start[0][seen], start[1][seen])
        found = fit_torch(features, labels, C, max_iter, start)
    weight = features.new_zeros(num_classes, features.shape[1])
    bias = features.new_full((num_classes,), float("-inf"))
    weight[seen], bias[seen] = (part.to(features) for part in found)
    return weight, bias


def fit_torch(
    features: Tensor,
    labels: Tensor,
    C: float,
    max_iter: int,
    start: Solution | None = None,
    dtype: torch.dtype | None = None,
) -> Solution:
    """Find the minimum if every class has samples; see :func:`fit`.

    L-BFGS uses centred features, and variables scaled so that the diagonal of the Hessian is about 1. After a
    float32 fit converges, the gradient is computed once in float64; if it is not small, the fit continues in float64.

    Args:
        dtype: dtype of the computation; None for that of ``features``.
    """
    dtype = dtype or features.dtype
    num_classes, count = int(labels.max()) + 1, len(features)
    mean = features.mean(dim=0)
    curvature = (num_classes - 1) / num_classes**2  # p (1 - p) of a sample with equal probability for all classes
    centred = features - mean
    scale = (curvature * centred.square().mean(dim=0) + 1 / (C * count)).rsqrt()
    bias_scale = curvature**-0.5
    weight, bias = start or (features.new_zeros(num_classes, features.shape[1]), features.new_zeros(num_classes))
    mean, scale, weight, bias = (one.to(dtype) for one in (mean, scale, weight, bias))
    variables = (weight / scale).requires_grad_(), ((bias + weight @ mean) / bias_scale).requires_grad_()
    tolerance_grad, tolerance_change = _TOLERANCES.get(dtype, _TOLERANCES[torch.float32])
    optimizer = torch.optim.LBFGS(
        variables,
        max_iter=max_iter,
        max_eval=max_iter * 2,
        tolerance_grad=tolerance_grad,
        tolerance_change=tolerance_change,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def objective() -> Tensor:
        v, b = variables
        loss, grad_weight, grad_bias = mean_objective(centred, labels, v * scale, b * bias_scale, C)
        v.grad, b.grad = grad_weight * scale, grad_bias * bias_scale
        return loss

    optimizer.step(objective)
    iterations = optimizer.state[variables[0]]["n_iter"]
    logger.debug(f"L-BFGS C={C:.5g} iterations={iterations}")
    if iterations >= max_iter:
        logger.info(f"L-BFGS C={C:.5g}: not at the minimum after --max-train-iters {max_iter}")
    weight, bias = variables[0].detach() * scale, variables[1].detach() * bias_scale
    solution = weight, bias - weight @ mean
    if dtype == torch.float64 or iterations >= max_iter:
        return solution
    _, grad_weight, grad_bias = mean_objective(centred, labels, weight.double(), bias.double(), C)
    largest = max((grad_weight * scale).abs().max().item(), grad_bias.abs().max().item() * bias_scale)
    if largest <= _MOST_IN_FLOAT32:
        return solution
    logger.info(f"L-BFGS C={C:.5g}: a gradient of {largest:.1e} is left in {dtype}; continuing in float64")
    return fit_torch(features, labels, C, max_iter - iterations, solution, torch.float64)


def mean_objective(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, C: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the objective divided by C * N, and its gradients with respect to weight and bias, computed in chunks.

    Computed in the dtype of ``weight`` and ``bias``.
    """
    count = len(features)
    rows_at_once = max(1, _CHUNK_ELEMENTS // len(weight))
    loss = 0.5 / (C * count) * weight.square().sum()
    grad_weight, grad_bias = weight / (C * count), torch.zeros_like(bias)
    for x, y in zip(features.split(rows_at_once), labels.split(rows_at_once), strict=True):
        x = x.to(weight.dtype)
        log_probs = torch.log_softmax(torch.addmm(bias, x, weight.T), dim=1)
        loss = loss - log_probs.gather(1, y[:, None]).sum() / count
        residual = log_probs.exp_()
        residual[torch.arange(len(y), device=y.device), y] -= 1
        residual /= count
        grad_weight = grad_weight.addmm(residual.T, x)
        grad_bias = grad_bias + residual.sum(dim=0)
    return loss, grad_weight, grad_bias


def check_solver(solver: str) -> None:
    """Check that ``solver`` is installed, before features are computed for it."""
    if solver == "sklearn":
        optional("sklearn", "--solver sklearn", otherwise="--solver torch")


def fit_sklearn(features: Tensor, labels: Tensor, C: float, max_iter: int) -> Solution:
    """Find the same minimum with scikit-learn, in float64 on the CPU."""
    check_solver("sklearn")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # for two classes it fits one vector w; the pair -w/2, w/2 has half its penalty
    is_pair = int(labels.max()) == 1
    model = LogisticRegression(C=2 * C if is_pair else C, tol=1e-12, max_iter=max_iter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it never reaches its tolerance
        model.fit(features.cpu().double().numpy(), labels.cpu().numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if is_pair:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias
