"""The closed-form optimum of the training loss: the oracle of the whole project, everything it samples is a copy."""

from typing import Literal

import torch
from torch import Tensor

from lightning_mem.diffusion.process import DiffusionProcess
from lightning_mem.diffusion.target import Condition, Target
from lightning_mem.records import digest
from lightning_mem.types import Prediction, to_float


class EmpiricalDenoiser:
    r"""The denoiser that minimises the loss on a finite set, optionally per label.

    .. math:: E[x_0 \mid x_t] = \sum_i \mathrm{softmax}_i\!\left(
        -\frac{\lVert x_t - \sqrt{\bar\alpha_t}\,y_i \rVert^2}{2 (1 - \bar\alpha_t)}\right) y_i

    Args:
        images: uint8 [N, C, H, W], or floats in [-1, 1]; non-empty.
        process: Its noising process; the output is in the process's own prediction.
        labels: int64 [N]; with them the sum runs over images of the asked label only.
        chunk: Rows of the set handled at once; memory is B x chunk.

    Raises:
        ValueError: If the set is empty, labels do not match it, or a label without images is asked for.

    Source:
        Gu et al., arXiv:2310.02664 (the theoretical optimum); variance-preserving form derived.
    """

    def __init__(
        self, images: Tensor, process: DiffusionProcess, labels: Tensor | None = None, chunk: int = 4096
    ) -> None:
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images must be a non-empty [N, C, H, W], got {tuple(images.shape)}")
        if labels is not None and labels.shape != (len(images),):
            raise ValueError(f"labels must have one entry per image ({len(images)}), got {tuple(labels.shape)}")
        self.images = images if images.dtype == torch.uint8 else images.float()
        self.labels = labels
        self.process = process
        self.prediction: Prediction = process.prediction
        self.chunk = chunk

    def _chunk(self, start: int, device: torch.device) -> Tensor:
        rows = self.images[start : start + self.chunk].to(device)
        return (to_float(rows) if rows.dtype == torch.uint8 else rows).flatten(1).double()

    def posterior_mean(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x0 | x_t] by a streaming log-sum-exp in float64; arguments as in the call."""
        flat = x_t.flatten(1).double()
        alpha_bar = self.process.alpha_bar_at(t, flat)
        top = torch.full((len(flat), 1), -torch.inf, dtype=torch.float64, device=flat.device)
        mass = torch.zeros_like(top)
        mean = torch.zeros_like(flat)
        for start in range(0, len(self.images), self.chunk):
            y = self._chunk(start, flat.device)
            # the part of the squared distance that does not depend on the image cancels in the softmax
            square = alpha_bar * y.square().sum(1) - 2 * alpha_bar.sqrt() * (flat @ y.T)
            logits = -square / (2 * (1 - alpha_bar))
            if labels is not None and self.labels is not None:
                own = self.labels[start : start + self.chunk].to(flat.device)
                logits = logits.masked_fill(labels[:, None] != own, -torch.inf)
            new_top = torch.maximum(top, logits.amax(1, keepdim=True))
            safe = new_top.masked_fill(new_top.isinf(), 0.0)  # rows that met no image of their label yet
            weight = (logits - safe).exp()
            rescale = (top - safe).exp()
            mass = mass * rescale + weight.sum(1, keepdim=True)
            mean = mean * rescale + weight @ y
            top = new_top
        if (mass == 0).any():
            missing = labels[(mass == 0).flatten()].unique().tolist() if labels is not None else []
            raise ValueError(f"no image has the labels {missing}; legal are those of the set")
        return (mean / mass).reshape(x_t.shape)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """The optimal output in the process's prediction.

        Args:
            x_t: [B, C, H, W].
            t: int64 [B].
            condition: int64 labels [B], or None for the unconditional optimum.
        """
        if isinstance(condition, Tensor) and self.labels is None:
            raise ValueError("labels were asked for, but the empirical denoiser was built without: pass labels=")
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
