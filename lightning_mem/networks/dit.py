"""The call by which a class-conditional diffusion transformer becomes a Denoiser."""

import torch
from torch import Tensor, nn

from lightning_mem.diffusion.target import Condition
from lightning_mem.types import Prediction


class DiTDenoiser:
    r"""A diffusers DiTTransformer2DModel as a :class:`~lightning_mem.diffusion.Denoiser`, guided by its own label.

    .. math:: \epsilon(x_t, \varnothing) + w\,(\epsilon(x_t, y) - \epsilon(x_t, \varnothing))

    The channels of a learned variance, where it has them, are left out: no sampler here uses them.

    Args:
        module: The transformer.
        prediction: What it outputs.
        num_classes: Its labels are 0 .. num_classes - 1; num_classes itself stands for none.
        cfg_weight: w; 1 is the conditional output itself, at half the cost.

    Raises:
        ValueError: When called without labels.

    Source:
        Peebles and Xie, arXiv:2212.09748, section 3.1.
    """

    def __init__(self, module: nn.Module, prediction: Prediction, num_classes: int, cfg_weight: float = 1.0) -> None:
        self.module, self.prediction = module, prediction
        self.num_classes, self.cfg_weight = num_classes, cfg_weight

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """The network's own output at training timestep t, conditional and unconditional combined."""
        if not isinstance(condition, Tensor):
            raise ValueError(f"a class-conditional transformer needs int64 labels in [0, {self.num_classes})")
        channels = x_t.shape[1]
        if self.cfg_weight == 1:
            return self.module(x_t, timestep=t, class_labels=condition).sample[:, :channels]
        labels = torch.cat([condition, torch.full_like(condition, self.num_classes)])
        both = self.module(x_t.repeat(2, 1, 1, 1), timestep=t.repeat(2), class_labels=labels).sample[:, :channels]
        given, without = both.chunk(2)
        return without + self.cfg_weight * (given - without)
