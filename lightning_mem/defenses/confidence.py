"""How sure a random-label classifier is of an image: the logit, the confidence q, and the slopes that change it."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_mem.diffusion.guidance import Classifier, frozen

Form = Literal["attract", "repel"]
"""Which log-probability moves: up that of the label not guessed, or down that of the guessed one."""


def check_tol(tol: float) -> float:
    r"""The logit at which q exceeds 1 - tol: log((1 - tol) / tol), exact where 1 - tol rounds to 1.

    Args:
        tol: Tolerance in (0, 0.5]; at 0.5 every image is over it that is not exactly undecided.

    Raises:
        ValueError: If tol is outside.
    """
    if not 0 < tol <= 0.5:
        raise ValueError(f"tol must lie in (0, 0.5], a distance of the confidence from 1; got {tol}")
    return math.log1p(-tol) - math.log(tol)


def binary_logits(classifier: Classifier, x_t: Tensor, t: Tensor) -> Tensor:
    """l = log p(1 | x_t) - log p(0 | x_t) of every labeling, [B, R], in at least float32.

    Args:
        classifier: Its ``num_labelings`` R is 1 where it does not say it.
        x_t: [B, C, H, W].
        t: int64 [B], training timesteps.

    Raises:
        ValueError: If the classifier's output is not [B, 2 R], the two logits of each labeling side by side.
    """
    logits, width = classifier(x_t, t), 2 * getattr(classifier, "num_labelings", 1)
    if logits.shape != (len(x_t), width):
        raise ValueError(
            f"a random-label classifier must return logits [{len(x_t)}, {width}], two a labeling; got "
            f"{list(logits.shape)}: train one with RandomLabelModule"
        )
    pairs = logits.to(torch.promote_types(logits.dtype, torch.float32)).unflatten(1, (-1, 2))
    return pairs[..., 1] - pairs[..., 0]


@torch.no_grad()
def logits_of(classifier: Classifier, x_t: Tensor, t: Tensor) -> Tensor:
    """:func:`binary_logits` with the classifier in evaluation mode and without a graph, whatever runs around it."""
    with torch.autocast(x_t.device.type, enabled=False), frozen(classifier):
        return binary_logits(classifier, x_t.to(torch.promote_types(x_t.dtype, torch.float32)), t)


def confidence(logits: Tensor) -> Tensor:
    """q = max(p, 1 - p) in [1/2, 1], float64 [B]; over several labelings the smallest: a copy is sure in all.

    Args:
        logits: [B, R], see :func:`binary_logits`.
    """
    return logits.double().abs().amin(1).sigmoid()


def certainty_slope(
    classifier: Classifier, x_t: Tensor, t: Tensor, form: Form, acts: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    r"""The direction d in which the certainty of the guess grows, and the logits there.

    .. math:: d_{\text{repel}} = \nabla_{x_t} \log p(\hat y \mid x_t) = (1 - q)\,\mathrm{sgn}(l)\,\nabla l, \qquad
        d_{\text{attract}} = -\nabla_{x_t} \log p(1 - \hat y \mid x_t) = q\,\mathrm{sgn}(l)\,\nabla l

    the mean over labelings where there are several. 0 where l = 0: nothing is guessed there. One forward pass gives
    both; the backward pass goes through the rows that are asked for, and does not run where there are none.

    Args:
        classifier: See :func:`binary_logits`; frozen and in evaluation mode meanwhile.
        x_t: [B, C, H, W].
        t: int64 [B], training timesteps.
        form: ``repel`` or ``attract``.
        acts: Logits [B, R] -> bool [B], the rows whose slope is wanted; d is 0 in the others. Null for all.

    Returns:
        d [B, C, H, W] and logits [B, R], in at least float32.

    Raises:
        ValueError: If the logits do not depend on x_t in a way autograd knows.
    """
    # inference mode is left, not only gradients switched on; its tensors cannot enter a graph, their copies can
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x_t.device.type, enabled=False):
        x = x_t.detach().clone().to(torch.promote_types(x_t.dtype, torch.float32)).requires_grad_()
        with frozen(classifier):
            logits = binary_logits(classifier, x, t.clone())
            own = logits if acts is None else logits[acts(logits.detach())]
            if len(own) == 0:
                return torch.zeros_like(x, requires_grad=False), logits.detach()
            sign = own.detach().sign()
            log_p = logsigmoid(sign * own) if form == "repel" else -logsigmoid(-sign * own)
            total = (log_p * sign.abs()).mean(1).sum()
            slope = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
    if slope is None:
        raise ValueError("the classifier's logits carry no gradient to x_t: remove no_grad or detach from its call")
    return slope, logits.detach()
