"""What a draw may carry besides its target, chosen by class_path: guidance, protection."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_mem.diffusion.sampling import ScoreTerm
from lightning_mem.diffusion.target import Target


class Judge(Protocol):
    """Says which finished samples may leave. The network behind it, where there is one, is its attribute ``module``."""

    @property
    def settings(self) -> dict[str, Any]:
        """What identifies the rule, flat."""

    def __call__(self, images: Tensor) -> Tensor:
        """Whether each of uint8 [N, C, H, W] is accepted, bool [N]."""


class AbstractAddition(ABC):
    """Makes the score terms of one draw, and the judge of its samples; cheap to build, reads what it needs when asked.

    A sample that the judge does not accept is drawn again, see :func:`lightning_mem.evaluation.rejection_sample`.
    """

    @abstractmethod
    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        """Score terms with ``settings``, in the order they are added.

        Args:
            target: What is drawn from.
            path: Where it came from, for messages and to find its run folder.
            addresses: int64 [N], every address of the draw.

        Raises:
            ValueError: If it does not belong to this target.
        """

    def judge(self, target: Target, path: str) -> Judge | None:
        """Which finished samples may leave; None where all may.

        Args:
            target: What is drawn from.
            path: Where it came from, as for :meth:`terms`.

        Raises:
            ValueError: If it does not belong to this target.
        """
        return None


class AllAccept:
    """Accepts what every judge accepts.

    Args:
        judges: At least one.
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        self.judges = tuple(judges)
        networks = [network for judge in judges if (network := getattr(judge, "module", None)) is not None]
        self.module = torch.nn.ModuleList(networks)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of all judges; what several say under one key is joined by ``and``."""
        said: dict[str, list[Any]] = {}
        for judge in self.judges:
            for key, value in judge.settings.items():
                said.setdefault(key, []).append(value)
        return {k: found[0] if len(found) == 1 else " and ".join(map(str, found)) for k, found in said.items()}

    def __call__(self, images: Tensor) -> Tensor:
        """Whether no judge refuses; bool [N]."""
        return torch.stack([judge(images) for judge in self.judges]).all(0)


class Together(AbstractAddition):
    """Several additions to one draw, such as an attack's guidance and a protection; their score terms add up.

    Samples leave where every part that judges them accepts them.

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

    def judge(self, target: Target, path: str) -> Judge | None:
        """All judges of the parts in one; see :class:`AbstractAddition`."""
        found = [judge for part in self.parts if (judge := part.judge(target, path)) is not None]
        return (found[0] if len(found) == 1 else AllAccept(found)) if found else None
