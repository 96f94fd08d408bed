"""Memorized, spurious, generalized: near a training image, near other samples only, near neither."""

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_mem.metrics.intervals import wilson_interval
from lightning_mem.metrics.neighbors import Rows, check_images, nearest_neighbors

Phase = Literal["memorized", "spurious", "generalized"]
"""What a sample is; its place here is its number in :func:`sample_phases`."""

PHASES: tuple[Phase, ...] = get_args(Phase)


def sample_phases(to_members: Rows, to_samples: Rows, *, delta_members: float, delta_samples: float) -> Tensor:
    r"""The phase of each sample.

    .. math:: d(x, S) \le \delta_m : \text{memorized}; \quad
        d(x, S) > \delta_m,\; d(x, S') \le \delta_s : \text{spurious}; \quad
        \text{else generalized}

    with S the training images and S' other samples of the same model; the thresholds are rounded to the distances'
    precision. A spurious sample is one of a crowd that no training image explains: an attractor of its own.

    Args:
        to_members: [N] distance of each sample to its nearest training image.
        to_samples: [N] distance of each sample to its nearest *other* sample, on the same scale; the second column of
            ``nearest_neighbors(samples, samples, 2)``.
        delta_members: At or below it a sample is memorized; at least 0. :func:`phase_threshold` gives one.
        delta_samples: At or below it a sample is near another; at least 0.

    Returns:
        int64 [N]: 0 memorized, 1 spurious, 2 generalized, as in ``PHASES``.

    Raises:
        ValueError: If there is no sample, numbers differ, a distance is negative or not finite, or a delta is negative.

    Undefined when:
        Numbers of samples or of training images differ between the shares that are compared: with more of either, the
        nearest comes nearer. And with fewer than two samples, which have no other one.

    Source:
        Pham et al., Memorization to Generalization: Emergence of Diffusion Models from Associative Memory,
        arXiv:2505.21777. The thresholds are chosen by eye there.

    Example:
        >>> sample_phases([0.0, 0.5, 0.5], [0.0, 0.1, 0.6], delta_members=0.2, delta_samples=0.2).tolist()
        [0, 1, 2]
    """
    for name, delta in (("delta_members", delta_members), ("delta_samples", delta_samples)):
        if not delta >= 0:
            raise ValueError(f"{name} must be at least 0, got {delta}")
    members, samples = _checked("to_members", to_members), _checked("to_samples", to_samples)
    if len(members) != len(samples):
        raise ValueError(f"to_members and to_samples must be of the same samples, got {len(members)}, {len(samples)}")
    memorized = members <= delta_members
    near_another = samples.to(members.device) <= delta_samples
    return torch.where(memorized, 0, torch.where(near_another, 1, 2))


def phase_shares(
    to_members: Rows, to_samples: Rows, *, delta_members: float, delta_samples: float
) -> dict[Phase, float]:
    """Share of the samples in each phase (:func:`sample_phases`, with its arguments, errors and limits).

    Returns:
        ``memorized``, ``spurious`` and ``generalized`` to fractions that sum to 1. :func:`wilson_interval` holds for
        ``memorized``; the other two depend on pairs of samples, so a plain binomial interval is too narrow.
    """
    phases = sample_phases(to_members, to_samples, delta_members=delta_members, delta_samples=delta_samples)
    counts = torch.bincount(phases, minlength=len(PHASES)).tolist()
    return {phase: count / len(phases) for phase, count in zip(PHASES, counts, strict=True)}


def phase_threshold(distances: Rows, rate: float = 0.01) -> float:
    """A threshold from real images the model never saw: at or below it lie at most a stated share of such images.

    The k-th smallest distance with k the whole part of rate * (n + 1): a further image from the same source falls at
    or below it with probability k / (n + 1) <= rate (exactly so where no two distances are equal).

    Args:
        distances: [n] for ``delta_members``: of held-out images to their nearest training image, the bank that samples
            are compared with; for ``delta_samples``: of held-out images to their nearest *other* held-out image, as
            many as there are samples.
        rate: Accepted share of unseen images, in (0, 1).

    Returns:
        A distance, on the scale of those given.

    Raises:
        ValueError: If rate is outside (0, 1), a distance is malformed, or n is below 1 / rate - 1: too few to tell.

    Undefined when:
        Held-out images come from another source than the training images; or the bank they were compared with is of
        another size.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1), got {rate}")
    rows = _checked("distances", distances)
    place = math.floor(rate * (len(rows) + 1) * (1 + 1e-12))  # 0.01 * 100 is a hair below 1 for some counts
    if place < 1:
        raise ValueError(
            f"a rate of {rate} needs at least {math.ceil(1 / rate - 1 - 1e-9)} held-out images, got {len(rows)}: "
            "hold out more, or accept a larger rate"
        )
    return rows.sort().values[place - 1].item()


class SamplePhases(Metric):
    """Shares of memorized, spurious and generalized samples against a fixed bank (:func:`phase_shares`).

    Lower is better for ``memorized`` and ``spurious``; bounds 0 and 1; from two samples on. Compare equal numbers of
    samples and banks of one size. Samples are compared with each other, so the state holds them all (uint8); processes
    gather them. The bank is a plain attribute, in no checkpoint.

    Args:
        bank: uint8 [N, C, H, W] training images; tensor or (memory-mapped) array.
        delta_members: RMS-L2 on the [0, 1] scale, at least 0; :func:`phase_threshold` gives one.
        delta_samples: RMS-L2 on the [0, 1] scale, at least 0.
        chunk_bytes: Working memory of a search in bytes. Null: 512 MiB.

    Raises:
        ValueError: If a delta is negative or the bank is not uint8 [N, C, H, W].
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    samples: list[Tensor] | Tensor  # one tensor once processes have gathered
    to_members: list[Tensor] | Tensor

    def __init__(
        self, bank: Rows, delta_members: float, delta_samples: float, *, chunk_bytes: int | None = None
    ) -> None:
        super().__init__()
        check_images("bank", bank)
        for name, delta in (("delta_members", delta_members), ("delta_samples", delta_samples)):
            if not delta >= 0:
                raise ValueError(f"{name} must be at least 0, got {delta}")
        self.bank, self.chunk_bytes = bank, chunk_bytes
        self.delta_members, self.delta_samples = delta_members, delta_samples
        self.add_state("samples", default=[], dist_reduce_fx="cat")
        self.add_state("to_members", default=[], dist_reduce_fx="cat")

    def update(self, images: Tensor) -> None:
        """Take in uint8 images [B, C, H, W] of the bank's shape."""
        check_images("images", images)
        if tuple(images.shape[1:]) != tuple(self.bank.shape[1:]):
            raise ValueError(
                f"images must have the bank's shape {tuple(self.bank.shape[1:])}, got {tuple(images.shape[1:])}"
            )
        nearest, _ = nearest_neighbors(images, self.bank, 1, chunk_bytes=self.chunk_bytes)
        for state, part in ((self.samples, images), (self.to_members, nearest[:, 0])):
            cast(list[Tensor], state).append(part)

    def sync(self, *given: Any, **options: Any) -> None:
        """Gather the processes' states (torchmetrics' own, which knows no shape where a process saw no sample)."""
        if isinstance(self.samples, list) and not self.samples:
            self.samples.append(torch.empty(0, *self.bank.shape[1:], dtype=torch.uint8, device=self.device))
            cast(list[Tensor], self.to_members).append(torch.empty(0, device=self.device))
        super().sync(*given, **options)

    def phases(self) -> Tensor:
        """The phase of each sample held, int64, in the order they came (:func:`sample_phases`).

        Raises:
            ValueError: If fewer than two samples were given.
        """
        held = len(self.samples) if isinstance(self.samples, Tensor) else sum(len(part) for part in self.samples)
        if held < 2:
            raise ValueError(f"{type(self).__name__} needs at least 2 samples, got {held}")
        samples = dim_zero_cat(self.samples)
        root = math.sqrt(math.prod(samples.shape[1:]))
        # itself, or its equal, comes first: the second is the nearest other one
        between, _ = nearest_neighbors(samples, samples, 2, chunk_bytes=self.chunk_bytes)
        return sample_phases(
            dim_zero_cat(self.to_members).double() / root,
            between[:, 1].double() / root,
            delta_members=self.delta_members,
            delta_samples=self.delta_samples,
        )

    def compute(self) -> dict[str, Tensor]:
        """``memorized``, ``spurious`` and ``generalized``, float64 scalars that sum to 1.

        Raises:
            ValueError: If fewer than two samples were given.
        """
        phases = self.phases()
        return {phase: (phases == number).double().mean() for number, phase in enumerate(PHASES)}

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float] | None]:
        """Wilson's of ``memorized``, over all processes (each must call it); null for what depends on pairs."""
        with self.sync_context():
            distances = dim_zero_cat(self.to_members).double() / math.sqrt(math.prod(self.bank.shape[1:]))
            hits = int((distances <= self.delta_members).sum())
            return {
                "memorized": wilson_interval(hits, len(distances), level),
                "spurious": None,
                "generalized": None,
            }


def _checked(name: str, distances: Rows) -> Tensor:
    rows = torch.as_tensor(distances).detach()
    if rows.ndim != 1 or len(rows) == 0 or not rows.is_floating_point():
        raise ValueError(f"{name} must be floats [N >= 1], got {rows.dtype} {tuple(rows.shape)}")
    wrong = ~((rows >= 0) & torch.isfinite(rows))
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"{name} row {row} is {float(rows[row])}: a distance is finite and at least 0")
    return rows
