"""Gradients of every example by itself, in the parameters of a network."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Gradient = Mapping[str, Tensor]
"""Of one example, by the parameter's name."""


class _Called(nn.Module):
    """A function of a network as a module, so that the network can be called with other parameters."""

    def __init__(self, network: nn.Module, value: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.value = network, value

    def forward(self, *row: Tensor) -> Tensor:
        """The value of one example."""
        return self.value(*row)


def per_example_gradients(
    network: nn.Module,
    value: Callable[..., Tensor],
    *rows: Tensor,
    chunk_size: int | None = None,
    then: Callable[[Gradient], Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""The gradient of every example's own value, :math:`\nabla_\theta f(\theta; x_i)`.

    Taken together by ``vmap`` over ``grad``: several times as fast as one after another. All parameters count, frozen
    ones too. Attention takes its plain form, which has a rule for this. Put the network into evaluation mode: dropout
    is refused, because an example's gradient would depend on its company.

    Args:
        network: What ``value`` calls; its parameters are differentiated.
        value: Scalar of one example: gets one row of each of ``rows``.
        rows: Tensors with B rows each.
        chunk_size: Examples that are differentiated together; null for all. Bounds the memory: each holds its
            activations and a gradient as large as the network.
        then: What becomes of each example's gradient before the next chunk; null keeps it, as one vector.
        out: [B, P], where gradients that are kept are written; null for new memory, which takes a fifth longer.

    Returns:
        [B, ...], of what ``then`` gives; [B, P] with null, parameters in the network's order.

    Raises:
        ValueError: If the network has no parameters, chunk_size is not positive, or out is of another size.

    Example:
        >>> network = nn.Linear(2, 1, bias=False)
        >>> per_example_gradients(network, lambda x: network(x).sum(), torch.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    called = _Called(network, value)
    parameters = {name: part.detach() for name, part in called.named_parameters()}
    if not parameters:
        raise ValueError(f"gradients need a network with parameters, and {type(network).__name__} has none")

    def differentiated(values: dict[str, Tensor], *row: Tensor) -> Any:
        return functional_call(called, values, row)

    def one(*row: Tensor) -> Any:
        gradient = grad(differentiated)(parameters, *row)
        return gradient if then is None else then(gradient)

    size = len(rows[0]) if chunk_size is None else chunk_size
    chunks = zip(*(part.split(size) for part in rows), strict=True)
    with sdpa_kernel(SDPBackend.MATH):
        if then is not None:
            return torch.cat([vmap(one)(*chunk).detach() for chunk in chunks])
        # written in place: gradients are large, and every further copy of them takes as long as a layer
        sizes = [part.numel() for part in parameters.values()]
        shape = (len(rows[0]), sum(sizes))
        found = next(iter(parameters.values())).new_empty(shape) if out is None else out
        if found.shape != shape:
            raise ValueError(
                f"out must be {shape}, as many rows as examples and as long as a gradient, got {tuple(found.shape)}"
            )
        for place, chunk in zip(found.split(size), chunks, strict=True):
            parts = place.split(sizes, dim=1)
            for own, part in zip(parts, vmap(one)(*chunk).values(), strict=True):
                own.copy_(part.detach().flatten(1))
    return found
