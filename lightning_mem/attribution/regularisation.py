"""Ridge scores of features, with the amount of regularisation chosen where no ground truth exists."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mem.attribution.features import products
from lightning_mem.attribution.store import FeatureStore

GRID = tuple(10.0 ** (half / 2) for half in range(-12, 7))
"""Values of lam that are tried, 1e-6 to 1e3 by half decades, in units of the mean squared norm of a feature."""


class RidgeScores:
    r"""Scores of queries by the features of N training images, for any amount of regularisation.

    .. math:: \tau(x, \cdot) = \phi(x)\,(\Phi^\top \Phi + \lambda I)^{-1}\,\Phi^\top
        = \phi(x)\,\Phi^\top\,(\Phi \Phi^\top + \lambda I)^{-1}, \qquad
        \lambda = \mathrm{lam} \cdot \tfrac{1}{N} \sum_i |\phi_i|^2

    The smaller of the two matrices, D x D or N x N, is decomposed once, in float64. The scores are also the weights
    with which the training features are summed to come near a query's,
    :math:`\tau = \arg\min_w |\phi(x) - w \Phi|^2 + \lambda |w|^2`.

    Args:
        members: Features of the training images.

    Raises:
        ValueError: If all features are 0.

    Source:
        TRAK, arXiv:2303.14186, eq. 13, without its residuals, as D-TRAK, arXiv:2311.00500, uses it.
    """

    def __init__(self, members: FeatureStore) -> None:
        self.members = members
        self.is_kernel = members.count <= members.width
        if self.is_kernel:
            gram = products(members, members)
        else:
            gram = torch.zeros(members.width, members.width, dtype=torch.float64)
            for part in members.blocks():
                gram += part.T @ part
        self.scale = float(gram.diagonal().sum()) / members.count
        if not self.scale > 0:
            raise ValueError("the gradients of all training images are 0: the target's output does not depend on it")
        values, self._vectors = torch.linalg.eigh((gram + gram.T) / 2)
        self._values = values.clamp(min=0)

    def scores(self, queries: FeatureStore, lam: float) -> Tensor:
        """float64 [Q, N].

        Args:
            queries: Features of the queries.
            lam: Regularisation in units of the mean squared norm of a training feature; positive.
        """
        return self.scores_by_lam(queries, [lam])[0]

    def scores_by_lam(self, queries: FeatureStore, lams: Sequence[float]) -> Tensor:
        """float64 [L, Q, N], of several amounts; arguments as in :meth:`scores`."""
        _check(lams)
        shrunk = [1 / (self._values + lam * self.scale) for lam in lams]
        if self.is_kernel:
            turned = products(queries, self.members) @ self._vectors
            return torch.stack([(turned * factor) @ self._vectors.T for factor in shrunk])
        turned = torch.cat([part @ self._vectors for part in queries.blocks()])
        own = [part @ self._vectors for part in self.members.blocks()]
        return torch.stack([torch.cat([(turned * factor) @ part.T for part in own], 1) for factor in shrunk])

    def prediction_errors(self, queries: FeatureStore, lams: Sequence[float]) -> Tensor:
        r"""Generalised cross-validation of each lam, float64 [L]; smaller is better.

        .. math:: \mathrm{GCV}(\lambda) = \frac{\frac{1}{D} \sum_x |\phi(x) - \tau(x) \Phi|^2}
            {\big(1 - \frac{1}{D} \mathrm{tr}\,H\big)^2 \sum_x |\phi(x)|^2}, \qquad
            H = \Phi^\top (\Phi \Phi^\top + \lambda I)^{-1} \Phi

        The error with which the gradient of a query that no training saw is put together from those of the training
        images, in directions that were not fitted. The D projected directions are exchangeable, so leaving out one is
        like leaving out another, and what is left out need not be computed. No model is trained.

        Args:
            queries: Features of images that are not reported on.
            lams: Amounts, positive.

        Source:
            Golub, Heath and Wahba (1979), eq. 1.4; its use for attributions is ours.
        """
        _check(lams)
        values = self._values
        norms = torch.cat([part.square().sum(1) for part in queries.blocks()])
        if self.is_kernel:
            turned = products(queries, self.members) @ self._vectors
        else:
            turned = torch.cat([part @ self._vectors for part in queries.blocks()])
        errors = []
        for lam in lams:
            shift = lam * self.scale
            if self.is_kernel:
                fitted = turned.square() * (values + 2 * shift) / (values + shift).square()
                left = norms - fitted.sum(1)
            else:
                left = (turned * shift / (values + shift)).square().sum(1)
            freedom = 1 - float((values / (values + shift)).sum()) / self.members.width
            errors.append(left.clamp(min=0).sum() / norms.sum() / freedom**2)
        return torch.stack(errors)

    def choose(self, queries: FeatureStore, grid: Sequence[float] = GRID) -> float:
        """The lam of the grid with the smallest :meth:`prediction_errors`; of equal ones the larger."""
        errors = self.prediction_errors(queries, grid)
        best = (errors == errors.min()).nonzero().flatten()
        return max(grid[int(place)] for place in best)


def _check(lams: Sequence[float]) -> None:
    for lam in lams:
        if not lam > 0:
            raise ValueError(f"lam must be positive, got {lam}")
