"""Learning-rate schedules that torch lacks as one class."""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    r"""Linear warm-up, then a cosine to zero (or level).

    .. math:: \min(1, s / w) \cdot \tfrac12 (1 + \cos(\pi \min(s / S, 1)))

    Args:
        optimizer: Given by the module.
        warmup_steps: w, optimizer steps of the warm-up; 0 for none.
        total_steps: S, where the cosine reaches zero; null keeps the rate level after the warm-up.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None) -> None:
        if warmup_steps < 0 or (total_steps is not None and total_steps < 1):
            raise ValueError(
                f"warmup_steps must be at least 0 and total_steps at least 1, got {warmup_steps}, {total_steps}"
            )
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Share of the base rate used by the step with this number, counted from 1."""
        rise = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.total_steps is None:
            return rise
        return rise * 0.5 * (1 + math.cos(math.pi * min(step / self.total_steps, 1.0)))

    def get_lr(self) -> list[float | Tensor]:
        """Rates of the coming step."""
        return [base * self.factor(self.last_epoch + 1) for base in self.base_lrs]
