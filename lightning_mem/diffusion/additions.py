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


class Together(AbstractAddition):
    """Several additions to one draw, such as an attack's guidance and a protection; their score terms add up.

    Args:
        parts: By class_path, in the order they are added.

    Raises:
        ValueError: If there are none.
    """

    def __init__(self, parts: list[AbstractAddition]) -> None:
        if not parts:
            raise ValueError("parts must name at least one addition, got none")
        self.parts = parts

    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        """The terms of all parts; see :class:`AbstractAddition`."""
        return [term for part in self.parts for term in part.terms(target, path, addresses)]
