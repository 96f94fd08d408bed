"""What a draw may carry besides its target, chosen by class_path: guidance, protection."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightning_mem.diffusion.sampling import ScoreTerm
from lightning_mem.diffusion.target import Target


class AbstractAddition(ABC):
    """Makes the score terms of one draw; cheap to build, reads what it needs when asked for them."""

    @abstractmethod
    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        """Score terms with ``settings``, in the order they are added.

        Args:
            target: What is drawn from.
            path: Where it came from, for messages.
            addresses: int64 [N], every address of the draw.

        Raises:
            ValueError: If it does not belong to this target.
        """
