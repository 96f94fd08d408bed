"""TRAK: gradients, projected, under the inverse of their own second moment."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_mem.attribution.base import AbstractAttribution, Queries
from lightning_mem.attribution.features import GradientFeatures, GradientOptions, total_cost
from lightning_mem.attribution.gradients import OutputName
from lightning_mem.attribution.regularisation import GRID, RidgeScores
from lightning_mem.diffusion import Target
from lightning_mem.evaluation import Scene
from lightning_mem.records import digest

HELDOUT = 64
"""Held-out images that lam is chosen on, at most."""


class TRAK(AbstractAttribution):
    r"""How much each training image helps a query, by projected gradients of the loss.

    .. math:: \tau(x, \cdot) = \phi(x)\,(\Phi^\top \Phi + \lambda I)^{-1}\,\Phi^\top, \qquad
        \phi(x) = P^\top \frac{1}{K} \sum_k \nabla_\theta F(\theta; x_{t_k}, t_k)

    with F the loss. Positive: training on the image lowers the query's loss. White box. lam is chosen, where none is
    given, on at most 64 held-out images, never on the queries: the value with which the training gradients put theirs
    together with the least error (:meth:`RidgeScores.prediction_errors`); that needs no trained model beside the
    target. Whoever has retrained models asks for :meth:`scores_by_lam` on queries apart from those reported, and
    gives ``lam``.

    Args:
        lam: Regularisation, in units of the mean squared norm of a training feature; null chooses it.
        gradients: How gradients are taken; null for the defaults.

    Raises:
        ValueError: If lam is not positive, the target has no network, or lam must be chosen and nothing is held out.

    Undefined when:
        The training's gradients all vanish.

    Source:
        Park et al., arXiv:2303.14186, section 3; for diffusion models as in Zheng et al., arXiv:2311.00500, section 3
        (no residuals, one model).
    """

    name = "trak"
    output: OutputName = "loss"

    def __init__(self, lam: float | None = None, gradients: GradientOptions | None = None) -> None:
        if lam is not None and not lam > 0:
            raise ValueError(f"lam must be positive, got {lam}")
        self.lam = lam
        self.gradients = gradients if gradients is not None else GradientOptions()
        self.chosen: float | None = None
        """The lam of the last scores."""
        self._cost: dict[str, float] = {}

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Of target, output, lam and settings; see :class:`AbstractAttribution`."""
        self.gradients.check(target)
        return digest(self.name, target.digest, self.output, self.lam, self.gradients.settings())

    def scores(self, scene: Scene, queries: Queries) -> Tensor:
        """See :class:`AbstractAttribution`; one column an image, whichever way round training saw it."""
        features = self._features(scene)
        ridge = RidgeScores(features.of_members())
        self.chosen = self.lam if self.lam is not None else ridge.choose(features.of_heldout(HELDOUT, queries))
        found = ridge.scores(features.of_queries(queries), self.chosen)
        self._cost = total_cost([features])
        return found

    def scores_by_lam(self, scene: Scene, queries: Queries, grid: tuple[float, ...] = GRID) -> dict[float, Tensor]:
        """Scores of these queries for every lam of a grid; to choose one where there is a ground truth.

        Args:
            scene: As in :meth:`scores`.
            queries: Apart from those that are reported.
            grid: Values, positive.
        """
        features = self._features(scene)
        found = RidgeScores(features.of_members()).scores_by_lam(features.of_queries(queries), grid)
        self._cost = total_cost([features])
        return dict(zip(grid, found, strict=True))

    def cost(self) -> Mapping[str, float]:
        """Gradients of the network, and bytes of features on disk."""
        return self._cost

    def _features(self, scene: Scene) -> GradientFeatures:
        return GradientFeatures(scene, scene.target, self.gradients, self.output)
