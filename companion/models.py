"""A torch module and a criterion as a loss for the companion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

__all__ = ["functional", "mlp"]

_DROPOUT = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def functional(
    module: nn.Module, criterion: Callable[[Any, Any], torch.Tensor]
) -> tuple[Callable, dict[str, torch.Tensor]]:
    """A loss ``loss(theta, (x, y))`` and its parameters from a module.

    Parameters
    ----------
    module
        Any module. It is copied: nothing done with the loss changes it, and
        what happens to it later does not change the loss.
    criterion
        ``criterion(module(x), y)``, a scalar, such as
        ``torch.nn.functional.mse_loss``.

    Returns
    -------
    loss : Callable
        ``loss(theta, (x, y))``.
    theta : dict[str, Tensor]
        The parameters that require gradients, detached copies by their names.
        Frozen parameters and buffers are constants of the loss.

    Raises
    ------
    ValueError
        If no parameter requires a gradient, or the module draws random
        numbers (dropout in training mode): an objective that is another
        function at every call has no gradient to check.

    Notes
    -----
    Batch normalisation uses the statistics of the batch that it sees, in
    either mode, and its running statistics neither matter nor move; so no
    task leaks into another.
    """
    for name, part in module.named_modules():
        if isinstance(part, _DROPOUT) and part.training and part.p > 0:
            raise ValueError(
                f"the module draws random numbers in {name or 'itself'} "
                f"({part}); call module.eval() first, or set p to 0"
            )
        if isinstance(part, nn.RNNBase) and part.training and part.dropout > 0:
            raise ValueError(
                f"the module draws random numbers in {name or 'itself'} "
                f"({part}); call module.eval() first, or set dropout to 0"
            )
    module = copy.deepcopy(module)
    torch.func.replace_all_batch_norm_modules_(module)
    theta, constants = {}, {}
    for name, value in module.named_parameters():
        kept = theta if value.requires_grad else constants
        kept[name] = value.detach().clone()
    constants |= {name: b.detach() for name, b in module.named_buffers()}
    if not theta:
        raise ValueError(
            "the module has no parameter that requires a gradient; "
            "unfreeze one with .requires_grad_()"
        )
    module.requires_grad_(False)

    def loss(theta, data):
        x, y = data
        output = torch.func.functional_call(
            module, {**constants, **theta}, (x,)
        )
        return criterion(output, y)

    return loss, theta


def mlp(
    sizes: Sequence[int],
    activation: type[nn.Module] = nn.Tanh,
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> nn.Sequential:
    """A fully connected network with torch's default initial weights.

    Parameters
    ----------
    sizes
        The widths of the layers, input and output included: ``(1, 40, 40, 1)``
        is the network of the MAML paper's regression.
    activation
        Between the layers. Smooth (tanh) where a theorem wants a Hessian.
    seed
        Determines the weights; torch's global generator is left alone.
    dtype
        float64 by default.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(sizes):
            layers += [nn.Linear(wide, narrow, dtype=dtype), activation()]
    return nn.Sequential(*layers[:-1])
