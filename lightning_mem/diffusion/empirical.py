"""Closed forms of a finite set: the optimum of the training loss, and the classifier of the set's own groups.

Everything the optimum samples is a copy: it is the oracle of the whole project.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_mem.diffusion.posterior import Posterior
from lightning_mem.diffusion.process import DiffusionProcess
from lightning_mem.diffusion.target import Condition, Target
from lightning_mem.records import digest
from lightning_mem.types import Prediction


class EmpiricalDenoiser:
    r"""The denoiser that minimises the loss on a finite set, optionally per label.

    .. math:: E[x_0 \mid x_t] = \sum_i \mathrm{softmax}_i\!\left(
        -\frac{\lVert x_t - \sqrt{\bar\alpha_t}\,y_i \rVert^2}{2 (1 - \bar\alpha_t)}\right) y_i

    Args:
        images: uint8 [N, C, H, W], or floats in [-1, 1]; non-empty.
        process: Its noising process; the output is in the process's own prediction.
        labels: int64 [N]; with them the sum runs over images of the asked label only.
        chunk: Rows of the set handled at once; a large set needs chunk x (B + C H W) float64 and no more.

    Raises:
        ValueError: If the set is empty, labels do not match it, or a label without images is asked for.

    Source:
        Gu et al., arXiv:2310.02664 (the theoretical optimum); variance-preserving form derived.
    """

    def __init__(
        self, images: Tensor, process: DiffusionProcess, labels: Tensor | None = None, chunk: int = 4096
    ) -> None:
        self._legal: Tensor | None = None
        groups = None
        if labels is not None:
            self._legal, groups = labels.cpu().unique(return_inverse=True)
        self.posterior = Posterior(images, process, groups, chunk)
        self.images = self.posterior.images
        self.labels = labels
        self.process = process
        self.prediction: Prediction = process.prediction

    def posterior_mean(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x0 | x_t] in float64; arguments as in the call."""
        if labels is None:
            return self.posterior.mean(x_t, t)
        if self._legal is None:
            raise ValueError("labels were asked for, but the empirical denoiser was built without: pass labels=")
        asked = labels[:, None] == self._legal.to(labels.device)
        missing = labels[~asked.any(1)].unique().tolist()
        if missing:
            raise ValueError(f"no image has the labels {missing}; legal are those of the set")
        return self.posterior.mean(x_t, t, asked)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """The optimal output in the process's prediction.

        Args:
            x_t: [B, C, H, W].
            t: int64 [B].
            condition: int64 labels [B], or None for the unconditional optimum.
        """
        labels = condition if isinstance(condition, Tensor) else None
        x0 = self.posterior_mean(x_t, t, labels)
        return self.process.from_x0(x0, x_t.double(), t).to(x_t.dtype)

    def target(self, kind: Literal["raw", "ema"] = "raw") -> Target:
        """Itself as the target of any verb."""
        labels = self.labels
        return Target(
            denoiser=self,
            process=self.process,
            shape=(self.images.shape[1], self.images.shape[2], self.images.shape[3]),
            num_classes=None if labels is None else int(labels.max()) + 1,
            weights=kind,
            digest=digest(self.images, labels if labels is not None else torch.empty(0), self.process.digest),
        )


class EmpiricalClassifier:
    r"""The classifier of noised images that minimises the cross-entropy on a finite labelled set.

    .. math:: p(c \mid x_t) = \frac{\sum_{i \in c} N(x_t; \sqrt{\bar\alpha_t}\,y_i, (1 - \bar\alpha_t) I)}
        {\sum_i N(x_t; \sqrt{\bar\alpha_t}\,y_i, (1 - \bar\alpha_t) I)}, \qquad
        \nabla_{x_t} \log p(c \mid x_t) = \frac{\sqrt{\bar\alpha_t}}{1 - \bar\alpha_t}
        \left(E[x_0 \mid x_t, c] - E[x_0 \mid x_t]\right)

    Args:
        images: uint8 [N, C, H, W], or floats in [-1, 1], in the denoiser's space; non-empty.
        labels: int64 [N] in [0, num_classes).
        process: The target's noising process.
        num_classes: Number of classes; null for one more than the largest label.
        chunk: Rows of the set handled at once; a large set needs chunk x (B + C H W) float64 and no more.

    Raises:
        ValueError: If the set is empty, labels do not match it or lie outside, or a class has no image.

    Source:
        Derived: Bayes' rule on the noised set; the closed-form surrogate of SIDE, arXiv:2410.02467.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        process: DiffusionProcess,
        num_classes: int | None = None,
        chunk: int = 4096,
    ) -> None:
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be integers, one per image ({len(images)}), got {labels.dtype} {tuple(labels.shape)}"
            )
        labels = labels.cpu().to(torch.int64)
        classes = num_classes if num_classes is not None else int(labels.max()) + 1 if len(labels) else 0
        if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
            raise ValueError(f"labels must lie in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")
        empty = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"the classes {empty} of {classes} have no image: renumber the labels or add images")
        self.posterior = Posterior(images, process, labels, chunk)
        self.num_classes = classes
        self.process = process
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.digest = digest(self.posterior.images, labels, process.alpha_bar)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits float64 [B, num_classes]; their softmax is p(c | x_t), differentiable in x_t.

        Args:
            x_t: [B, C, H, W].
            t: int64 [B], training timesteps.
        """
        return self.posterior.log_mass(x_t, t)
