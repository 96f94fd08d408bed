"""Counterfactuals by ablation: what an ensemble draws from the same noise when a unit is left out, for every unit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_mem.attribution.ensemble import Ensemble
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, Target, sample
from lightning_mem.evaluation import Workers
from lightning_mem.evaluation.draw import draw_labels
from lightning_mem.metrics.similarities import float64_rows, squared_distances
from lightning_mem.records import atomic_write

Score = Literal["displacement", "moved_away"]
"""How far the sample moves without the unit (``displacement``), or how much farther from the unit (``moved_away``)."""

CONVENTION = 256 * 256 * 3
"""Values of the image that the field's counterfactual radii are told for."""


@dataclass(frozen=True)
class Landscape:
    r"""What leaving out each of n units does to each of Q samples.

    With x the sample of the whole ensemble, :math:`x^{(i)}` that of the members that never saw unit i from the same
    noise, and :math:`d_i(x) = \min_{y \in i} \lVert x - y \rVert` the distance to the nearest image of unit i:

    .. math:: \text{displacement}_i = \lVert x^{(i)} - x \rVert, \qquad
        \text{moved away}_i = d_i(x^{(i)}) - d_i(x)

    All distances are plain L2 at the images' own size, pixels in [0, 1].

    Args:
        factual: uint8 [Q, C, H, W], the samples of the whole ensemble.
        displacement: float64 [Q, n], at least 0.
        moved_away: float64 [Q, n].
        to_units: float64 [Q, n], :math:`d_i(x)`.
        nearest_after: int64 [Q, n], the unit nearest to :math:`x^{(i)}`; of equally near ones the lowest.

    Source:
        Dai and Gifford, arXiv:2406.07908 (counterfactuals by ablation); ``moved_away`` is ours.
    """

    factual: Tensor
    displacement: Tensor
    moved_away: Tensor
    to_units: Tensor
    nearest_after: Tensor

    def __len__(self) -> int:
        return len(self.factual)

    @property
    def nearest(self) -> Tensor:
        """The unit nearest to each sample, int64 [Q]; of equally near ones the lowest."""
        return self.to_units.argmin(1)

    @property
    def radius(self) -> Tensor:
        """The counterfactual radius, float64 [Q]: the largest displacement over all units; 0 is unattributable."""
        return self.displacement.amax(1)

    def scores(self, score: Score) -> Tensor:
        """The attribution scores of units, larger = helps the sample, float64 [Q, n]."""
        return self.displacement if score == "displacement" else self.moved_away

    def source_rank(self, score: Score) -> Tensor:
        """The rank of the nearest unit by a score, int64 [Q], 1 = first; whoever ties with it is put before it."""
        found = self.scores(score)
        own = found.gather(1, self.nearest[:, None])
        return (found >= own).sum(1)

    def false_attribution(self) -> tuple[Tensor, Tensor]:
        """Whether each sample is still attributed to its nearest unit after that, or another one, was left out.

        Returns:
            bool [Q] without the nearest unit, and float64 [Q], the share of all other units without which it is.
        """
        still = self.nearest_after == self.nearest[:, None]
        own = still.gather(1, self.nearest[:, None])[:, 0]
        return own, (still.sum(1) - own.long()).double() / (still.shape[1] - 1)

    def save(self, path: str | Path, identity: str, **costs: float) -> None:
        """Write all as ``.npz``, with what decided it."""
        arrays = {field.name: getattr(self, field.name).numpy() for field in fields(self)}
        with atomic_write(path, "wb") as file:
            np.savez(file, allow_pickle=False, identity=np.array(identity), **arrays, **costs)

    @classmethod
    def load(cls, path: str | Path, identity: str) -> tuple["Landscape", dict[str, float]] | None:
        """What :meth:`save` wrote for this identity, with the costs; null where there is none."""
        if not Path(path).is_file():
            return None
        with Path(path).open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if str(archive["identity"]) != identity:
                return None
            own = [field.name for field in fields(cls)]
            costs = {key: float(archive[key]) for key in archive.files if key not in {*own, "identity"}}
            return cls(*(torch.from_numpy(archive[key]) for key in own)), costs


@torch.no_grad()
def landscape(
    ensemble: Ensemble,
    images: Tensor,
    unit_of: Tensor,
    addresses: Sequence[int] | Tensor,
    *,
    seed: int,
    num_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    workers: Workers | None = None,
) -> Landscape:
    """Samples of an ensemble, and their counterfactuals without every unit in turn, from the same addressed noise.

    Asks a member's network ``num_steps`` times a sample: all members for the samples, and for each of n counterfactuals
    those that never saw the unit (half of them, with balanced codes).

    Args:
        ensemble: Which draws them.
        images: uint8 [N, C, H, W], all images of the units, in every orientation that is trained on.
        unit_of: int64 [N], the unit of each.
        addresses: Of the samples' noise, int64 [Q].
        seed: Of the draw.
        num_steps: Sampler steps.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        workers: How blocks are dealt out.

    Raises:
        ValueError: If units and images do not fit together.
    """
    workers = workers or Workers()
    units, wanted = len(ensemble.codes.units), torch.as_tensor(addresses).to(torch.int64)
    if unit_of.shape != (len(images),) or not torch.equal(unit_of.unique(), torch.arange(units)):
        raise ValueError(
            f"the units do not cover the data: unit_of must name each of {units} units and have one entry per image "
            f"({len(images)}), got {len(unit_of.unique())} units of {tuple(unit_of.shape)} images"
        )
    drawing: dict[str, Any] = {"seed": seed, "num_steps": num_steps, "sampler": sampler, "eta": eta}

    def draw(target: Target, rows: Tensor) -> Tensor:
        own = wanted[rows]
        condition = None if target.num_classes is None else draw_labels(target.num_classes, own, seed)
        return sample(target, own, condition=condition, block=BLOCK, **drawing)

    def to_units(drawn: Tensor) -> Tensor:
        return unit_distances(drawn, images, unit_of, units)

    whole = ensemble.target()
    factual = workers.in_blocks(len(wanted), lambda rows: draw(whole, rows))
    before = to_units(factual)
    blocks = -(-len(wanted) // BLOCK)

    def without(places: Tensor) -> Tensor:
        block, unit = divmod(int(places[0]), units)
        rows = torch.arange(block * BLOCK, (block + 1) * BLOCK).clamp(max=len(wanted) - 1)
        drawn = draw(ensemble.target([unit]), rows)
        after = to_units(drawn)
        moved = (drawn.double() - factual[rows].double()).flatten(1).norm(dim=1) / 255
        return torch.stack([moved, after[:, unit] - before[rows, unit], after.argmin(1).double()], 1)[None]

    found = workers.in_blocks(blocks * units, without, block=1, label="counterfactuals")
    found = found.reshape(blocks, units, BLOCK, 3).transpose(1, 2).flatten(0, 1)[: len(wanted)]
    return Landscape(factual, found[..., 0].clone(), found[..., 1].clone(), before, found[..., 2].long())


def evaluations(ensemble: Ensemble, num_samples: int, num_steps: int) -> int:
    """Network calls of one image behind a :func:`landscape`: of all samples, and of all counterfactuals."""
    unseen = int((~ensemble.codes.codes).sum())
    return num_samples * num_steps * (ensemble.codes.num_members + unseen)


def unit_distances(drawn: Tensor, images: Tensor, unit_of: Tensor, num_units: int) -> Tensor:
    """Distance to the nearest image of each unit, float64 [B, n]: L2, pixels in [0, 1]; sums are of integers."""
    home = torch.device("cpu")
    queries = float64_rows("samples", drawn, slice(0, len(drawn)), home, scaled=False)
    bank = float64_rows("images", images, slice(0, len(images)), home, scaled=False)
    found = squared_distances(queries, bank).sqrt() / 255
    nearest = torch.full((len(drawn), num_units), torch.inf, dtype=torch.float64)
    return nearest.scatter_reduce(1, unit_of.expand(len(drawn), -1), found, "amin")


def at_convention(radius: float, shape: Sequence[int]) -> float:
    """A native L2 radius as that of images enlarged to 256 x 256 x 3: times the root of the ratio of their values."""
    return radius * math.sqrt(CONVENTION / math.prod(shape))


def geometric_mean(radii: Tensor) -> tuple[float | None, int]:
    """The geometric mean of the radii above 0, and how many are 0; null where all are.

    Args:
        radii: [Q], at least 0.

    Source:
        Dai and Gifford, arXiv:2406.07908 (the mean over samples); a radius of 0 has no logarithm and is told apart.
    """
    positive = radii[radii > 0]
    mean = float(positive.double().log().mean().exp()) if len(positive) else None
    return mean, len(radii) - len(positive)


def false_attribution_rate(kept: float, control: float) -> float:
    r"""Share of attributions that stand although their unit is gone, relative to what stands when another one is.

    .. math:: \mathrm{FAR} = 1 - \frac{(1 - f) - (1 - b)}{b} = \frac{f}{b}

    Args:
        kept: f in [0, 1], share of samples still attributed to their unit without it.
        control: b in (0, 1], the same without another unit.

    Raises:
        ValueError: If a share is out of range, or the control is 0: nothing is attributed twice then.

    Source:
        Dai and Gifford, arXiv:2406.07908, the released demo; the quotient is derived.
    """
    if not 0 <= kept <= 1 or not 0 < control <= 1:
        raise ValueError(f"kept must lie in [0, 1] and control in (0, 1], got {kept} and {control}")
    return kept / control
