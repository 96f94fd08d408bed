"""Fréchet distance between two sets of images in a feature space, by symmetric solvers in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mem.metrics.features import AbstractExtractor, extract_features
from lightning_mem.metrics.neighbors import Rows


@dataclass(frozen=True, eq=False)  # tensors have no single answer to ==
class FeatureStatistics:
    """Mean and covariance of feature vectors.

    Args:
        mu: float64 [d].
        sigma: float64 [d, d], unbiased (divided by n - 1).
        n: Number of vectors they were taken over, at least 2.

    Raises:
        ValueError: If shapes differ, n is below 2, or a value is not finite.
    """

    mu: Tensor
    sigma: Tensor
    n: int

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"n must be at least 2 for a covariance, got {self.n}")
        _check_moments("", self.mu, self.sigma)

    @classmethod
    def from_features(cls, features: Rows) -> "FeatureStatistics":
        """Statistics of features [n, d]; float64 sums.

        Raises:
            ValueError: If there are fewer than 2 rows or a value is not finite.
        """
        mu, centered = _centered("features", features)
        return cls(mu=mu, sigma=centered.T @ centered / (len(centered) - 1), n=len(centered))


def frechet_distance(mu1: Rows, sigma1: Rows, mu2: Rows, sigma2: Rows) -> float:
    r"""Fréchet distance of two Gaussians.

    .. math:: \lVert \mu_1 - \mu_2 \rVert^2
        + \operatorname{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2})

    With a Cholesky factor L of the first covariance, the last trace is the sum of the roots of the eigenvalues of the
    symmetric :math:`L^\top \Sigma_2 L`; where there is no factor (a covariance without full rank), an
    eigen-decomposition takes its place. In float64 with eigenvalues clipped at 0, so the value is never complex and
    never negative, for covariances of any rank.

    Args:
        mu1: [d] mean of one side.
        sigma1: [d, d] covariance of one side.
        mu2: [d] mean of the other.
        sigma2: [d, d] covariance of the other.

    Returns:
        The distance (the square of a metric), at least 0; 0 for equal Gaussians.

    Raises:
        ValueError: If shapes differ, a value is not finite, or a sigma is not a covariance.

    Undefined when:
        The moments come from few images: its expectation falls with n. Compare at equal n only.

    Source:
        Dowson and Landau, J. Multivariate Analysis 12 (1982); Heusel et al., arXiv:1706.08500.

    Example:
        >>> frechet_distance(torch.zeros(3), torch.eye(3), torch.ones(3), torch.eye(3))
        3.0
    """
    device = mu1.device if isinstance(mu1, Tensor) else torch.device("cpu")
    m1, s1, m2, s2 = (torch.as_tensor(part).detach().to(device, torch.float64) for part in (mu1, sigma1, mu2, sigma2))
    _check_moments("1", m1, s1)
    _check_moments("2", m2, s2)
    if m1.shape != m2.shape:
        raise ValueError(f"both sides must have the same features, got {len(m1)} and {len(m2)} of them")
    # S1^(1/2) S2 S1^(1/2) has the eigenvalues of R^T S2 R for any R with R R^T = S1
    root = _root(s1)
    product = root.T @ s2 @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    return _assembled(m1 - m2, s1.trace() + s2.trace(), eigenvalues.clamp(min=0).sqrt().sum())


def frechet_distance_from_features(a: Rows, b: Rows) -> float:
    r"""Fréchet distance of two sets of feature vectors.

    Where a side has fewer rows than features its covariance is never formed. With centred features A = a - mean and
    :math:`\Sigma_1 = A^\top A / (n_1 - 1)`,

    .. math:: \operatorname{tr} (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2}
        = \frac{\lVert A B^\top \rVert_*}{\sqrt{(n_1 - 1)(n_2 - 1)}}

    the sum of the singular values, taken on the small side.

    Args:
        a: [n1, d] features of one side, n1 >= 2.
        b: [n2, d] features of the other, n2 >= 2.

    Returns:
        The distance, at least 0; covariances are unbiased, as in torch-fidelity.

    Raises:
        ValueError: If a side has fewer than 2 rows, widths differ, or a value is not finite.

    Undefined when:
        Numbers of images differ between the distances that are compared: its expectation falls with n.

    Source:
        Heusel et al., arXiv:1706.08500; the trace identity is that of the nuclear norm.
    """
    mu1, first = _centered("a", a)
    mu2, second = _centered("b", b)
    if len(mu1) != len(mu2):
        raise ValueError(f"both sides must have the same features, got {len(mu1)} and {len(mu2)} of them")
    second = second.to(first.device)
    mu2 = mu2.to(first.device)
    if min(len(first), len(second)) >= len(mu1):
        sigmas = [part.T @ part / (len(part) - 1) for part in (first, second)]
        return frechet_distance(mu1, sigmas[0], mu2, sigmas[1])
    first /= (len(first) - 1) ** 0.5
    second /= (len(second) - 1) ** 0.5
    if len(second) < len(first):
        first, second = second, first
    # R of QR has the same Gram matrix in d rows
    root = torch.linalg.qr(second, mode="r").R if len(second) > len(mu1) else second
    total = first.square().sum() + second.square().sum()
    return _assembled(mu1 - mu2, total, torch.linalg.svdvals(first @ root.T).sum())


class FrechetDistance(Metric):
    """Fréchet distance of images to a fixed reference (:func:`frechet_distance`).

    Lower is better; at least 0; from two images on, but its expectation falls with n: state n and compare at equal n.
    The states are float64 sums, so the value is right under DDP with unequal batches.

    Args:
        reference: Features [n, d], ``(mu, sigma, n)`` or :class:`FeatureStatistics` of the reference images.
        extractor: The one the reference was extracted with.
        block: Images per call of the network.

    Raises:
        ValueError: If the reference is malformed or is of another width than the extractor's features.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    feature_sum: Tensor
    outer_sum: Tensor
    count: Tensor

    def __init__(
        self,
        reference: FeatureStatistics | Rows | tuple[Rows, Rows, int],
        extractor: AbstractExtractor,
        *,
        block: int = 64,
    ) -> None:
        super().__init__()
        if isinstance(reference, tuple):
            mu, sigma, n = reference
            reference = FeatureStatistics(torch.as_tensor(mu).double(), torch.as_tensor(sigma).double(), int(n))
        elif not isinstance(reference, FeatureStatistics):
            reference = FeatureStatistics.from_features(reference)
        dim = len(reference.mu)
        if extractor.dim not in (None, dim):
            raise ValueError(
                f"reference has {dim} features, {extractor.name} gives {extractor.dim}: extract both with the same one"
            )
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.reference = reference
        self.extractor = extractor
        self.block = block
        self.add_state("feature_sum", default=torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("outer_sum", default=torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """Take in uint8 images [B, C, H, W].

        Raises:
            ValueError: If their features are of another width than the reference's.
        """
        features = extract_features(images, self.extractor, block=self.block).to(self.count.device, torch.float64)
        if features.shape[1] != len(self.reference.mu):
            raise ValueError(
                f"reference has {len(self.reference.mu)} features, these images give {features.shape[1]}: "
                "images and reference must have the same shape and extractor"
            )
        # measured from the reference's mean, the sums stay small and the covariance loses no digits
        features -= self.reference.mu.to(features)
        self.feature_sum += features.sum(0)
        self.outer_sum += features.T @ features
        self.count += len(features)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            ValueError: If fewer than two images were given.
        """
        n = int(self.count)
        if n < 2:
            raise ValueError(f"FrechetDistance needs at least 2 images, got {n}")
        shift = self.feature_sum / n
        sigma = (self.outer_sum - n * torch.outer(shift, shift)) / (n - 1)
        mu, reference_sigma = self.reference.mu.to(shift), self.reference.sigma.to(shift)
        value = frechet_distance(mu, reference_sigma, mu + shift, sigma)
        return torch.tensor(value, dtype=torch.float64, device=shift.device)


def _assembled(gap: Tensor, traces: Tensor, cross: Tensor) -> float:
    return max(0.0, float(gap.square().sum() + traces - 2 * cross))


def _root(sigma: Tensor) -> Tensor:
    """R with R R^T = sigma."""
    root, failed = torch.linalg.cholesky_ex(sigma)  # an eighth of the work of an eigen-decomposition
    if not failed:
        return root
    values, vectors = torch.linalg.eigh(sigma)
    if values[0] < -1e-4 * values[-1].abs() or values[-1] < 0:
        raise ValueError(f"sigma1 is not a covariance: it has the eigenvalue {values[0]:.3g}")
    return vectors * values.clamp(min=0).sqrt()


def _centered(name: str, features: Rows) -> tuple[Tensor, Tensor]:
    rows = torch.as_tensor(features).detach()
    if rows.ndim != 2 or rows.shape[0] < 2 or rows.shape[1] < 1:
        raise ValueError(f"{name} must be [n >= 2, d >= 1], one feature vector per image, got {tuple(rows.shape)}")
    rows = rows.double()
    if not torch.isfinite(rows).all():
        row = int((~torch.isfinite(rows)).nonzero()[0, 0])
        raise ValueError(f"{name} row {row} holds a value that is not finite: extract that image again")
    mu = rows.mean(0)
    return mu, rows - mu


def _check_moments(side: str, mu: Tensor, sigma: Tensor) -> None:
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu{side} must be [d] and sigma{side} [d, d], got {tuple(mu.shape)} and {tuple(sigma.shape)}")
    for name, values in ((f"mu{side}", mu), (f"sigma{side}", sigma)):
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} holds {int((~torch.isfinite(values)).sum())} values that are not finite")
    if (sigma - sigma.T).abs().max() > 1e-4 * sigma.abs().max():
        raise ValueError(f"sigma{side} is not a covariance: it is not symmetric")
