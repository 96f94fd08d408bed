"""Attribution by leaving out: what each training unit does to the loss, or to the sample, of an encoded ensemble."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_mem.attribution.base import AbstractAttribution, Queries
from lightning_mem.attribution.counterfactual import Landscape, Score, evaluations, landscape
from lightning_mem.attribution.ensemble import Ensemble
from lightning_mem.attribution.losses import even_timesteps
from lightning_mem.data.split import read_indices
from lightning_mem.diffusion import Sampler, Target
from lightning_mem.diffusion.sampling import evaluation_mode
from lightning_mem.evaluation import Reference, Scene, Workers
from lightning_mem.randomness import generator
from lightning_mem.records import digest
from lightning_mem.types import Weights, to_float


class EnsembleAblation(AbstractAttribution):
    r"""Scores a training image by what an ensemble without its unit does otherwise; nothing is trained again.

    Of queries of any kind by the loss of the query, at noise and timesteps that all units share:

    .. math:: s_i(x) = L(x;\ A_i) - L(x;\ \text{all}), \qquad
        L(x;\ A) = \operatorname{mean}_{t, \epsilon} \frac{1}{D} \Big\lVert y - \frac{1}{|A|}
        \sum_{k \in A} f_k(x_t, t) \Big\rVert^2

    where :math:`A_i` are the members that never saw unit i and y is what a member is trained to predict. Of the
    ensemble's own samples also by ``displacement`` or ``moved_away`` of the sample itself; see
    :class:`lightning_mem.attribution.Landscape`. All images of a unit have its score.

    Args:
        ensemble: Manifest of its codes, or the folder that holds one; trained on the images of the target.
        score: ``loss``, or ``displacement`` or ``moved_away`` of queries that the ensemble drew.
        num_timesteps: Timesteps of the loss, evenly over all of training, at least 1.
        num_draws: Noise draws at each, at least 1.
        noise_seed: Of the loss's noise.
        seed: Of the draw of the queries, for the scores of samples.
        num_steps: Sampler steps of that draw.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        weights: Of the members: ``ema`` takes averaged weights where there are any.

    Raises:
        ValueError: If an option is out of range.

    Undefined when:
        The queries are samples of one model of all images: the ensemble has seen the same images, but copies far less,
        and tells what it would do.

    Source:
        Dai and Gifford, arXiv:2306.02174 (leaving out members) and arXiv:2406.07908 (counterfactuals); the difference
        of losses is ours.
    """

    name = "ensemble"

    def __init__(
        self,
        ensemble: str,
        score: Literal["loss", "displacement", "moved_away"] = "loss",
        num_timesteps: int = 10,
        num_draws: int = 4,
        noise_seed: int = 0,
        seed: int = 0,
        num_steps: int = 25,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        weights: Weights = "ema",
    ) -> None:
        if score not in ("loss", *get_args(Score)):
            raise ValueError(f"score must be loss, displacement or moved_away, got {score!r}")
        if num_timesteps < 1 or num_draws < 1:
            raise ValueError(f"num_timesteps and num_draws must be at least 1, got {num_timesteps} and {num_draws}")
        self.path, self.score, self.weights = ensemble, score, weights
        self.num_timesteps, self.num_draws, self.noise_seed = num_timesteps, num_draws, noise_seed
        self.drawing: dict[str, Any] = {"seed": seed, "num_steps": num_steps, "sampler": sampler, "eta": eta}
        self._costs: dict[str, float] = {}
        self._loaded: Ensemble | None = None

    @property
    def ensemble(self) -> Ensemble:
        """The ensemble, read once; see :meth:`Ensemble.load`."""
        if self._loaded is None:
            self._loaded = Ensemble.load(self.path, self.weights)
        return self._loaded

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of the ensemble and the settings; see :class:`AbstractAttribution`."""
        ensemble = self.ensemble
        if self.score == "loss":
            even_timesteps(self.num_timesteps, target.process.num_timesteps)
        if tuple(target.shape) != tuple(ensemble.members[0].shape):
            raise ValueError(
                f"{self.path} is an ensemble of images {tuple(ensemble.members[0].shape)} (C, H, W), but the target's "
                f"are {tuple(target.shape)}"
            )
        if (home / "members.json").is_file():
            ensemble.codes.unit_of(torch.from_numpy(read_indices(home / "members.json", "members")))
        how = self.drawing if self.score != "loss" else [self.num_timesteps, self.num_draws, self.noise_seed]
        return digest(ensemble.digest, self.score, how)

    def cost(self) -> Mapping[str, float]:
        """Trainings, and network calls of one image."""
        return self._costs

    def scores(self, scene: Scene, queries: Queries) -> Tensor:
        """The score of its unit for every training image; see :class:`AbstractAttribution`."""
        ensemble, reference = self.ensemble.on(scene.workers.device), scene.reference()
        unit_of = unit_of_images(ensemble, reference)
        queries = queries.fitting(tuple(reference.members.shape[1:]))
        if self.score == "loss":
            losses = ablation_losses(
                ensemble, queries.images, labels=queries.labels, num_timesteps=self.num_timesteps,
                num_draws=self.num_draws, seed=self.noise_seed, name=queries.kind, workers=scene.workers,
            )  # fmt: skip
            units = losses[:, 1:] - losses[:, :1]
            calls = len(queries) * self.num_timesteps * self.num_draws * len(ensemble.members)
        else:
            bank = unit_of[reference.owners]
            units = self._landscape(ensemble, queries, reference.members, bank, scene.workers).scores(self.score)
            calls = evaluations(ensemble, len(queries), self.drawing["num_steps"])
        self._costs = {"trainings": len(ensemble.members), "evaluations": calls}
        return units[:, unit_of]

    def _landscape(
        self, ensemble: Ensemble, queries: Queries, images: Tensor, unit_of: Tensor, workers: Workers
    ) -> Landscape:
        if queries.kind != "ensemble":
            raise ValueError(
                f"the score {self.score} is of samples that the ensemble drew (queries of kind ensemble), got "
                f"{queries.kind}: use score loss"
            )
        found = landscape(ensemble, images, unit_of, queries.addresses, workers=workers, **self.drawing)
        if not torch.equal(found.factual.cpu(), queries.images.cpu()):
            raise ValueError(
                f"the queries are not what the ensemble draws with {self.drawing}: give the settings they were drawn by"
            )
        return found


def unit_of_images(ensemble: Ensemble, reference: Reference) -> Tensor:
    """The unit that each training image of a reference belongs to, int64 [N], both orientations being one image.

    Raises:
        ValueError: If the units do not cover the images (named), or a unit has none of them.
    """
    units = ensemble.codes.unit_of(reference.indices)
    missing = len(ensemble.codes.units) - len(units.unique())
    if missing:
        raise ValueError(
            f"{missing} of the ensemble's {len(ensemble.codes.units)} units have no image among the "
            f"{len(reference.indices)} training images: it was trained on other data"
        )
    return units


@torch.no_grad()
def ablation_losses(
    ensemble: Ensemble,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    num_timesteps: int = 10,
    num_draws: int = 4,
    seed: int = 0,
    name: str = "",
    workers: Workers | None = None,
) -> Tensor:
    r"""Losses of the whole ensemble and without each unit, all from one pass through the members.

    With :math:`r_k` the residual of member k, the loss of a mean over members A is a quadratic form of the residuals'
    products: :math:`\lVert \sum_k a_k r_k \rVert^2 = a^\top R R^\top a`, so n units cost no further network call.

    Args:
        ensemble: On the workers' device.
        images: uint8 [Q, C, H, W].
        labels: int64 [Q]; class-conditional members need them.
        num_timesteps: Timesteps that are averaged over; see :func:`lightning_mem.attribution.losses.even_timesteps`.
        num_draws: Noise draws at each.
        seed: Of the noise, which depends on seed, name, row, timestep and draw only.
        name: Address of these images' noise.
        workers: How blocks are dealt out.

    Returns:
        float64 [Q, 1 + n]: of all members, then without each unit.

    Raises:
        ValueError: If a label is missing, more timesteps are asked for than there are, or a loss is not finite.
    """
    first, workers = ensemble.members[0], workers or Workers()
    if first.num_classes is not None and labels is None:
        raise ValueError(f"the members have {first.num_classes} classes: give the label of every query")
    times = even_timesteps(num_timesteps, first.process.num_timesteps)
    denoisers = [member.denoiser for member in ensemble.members]

    def compute(rows: Tensor) -> Tensor:
        x0 = first.codec.encode(to_float(images[rows]).to(first.device))
        condition = None if labels is None or first.num_classes is None else labels[rows].to(first.device)
        products = torch.zeros(len(rows), len(denoisers), len(denoisers), dtype=torch.float64, device=first.device)
        for at in times:
            t = torch.full((len(rows),), at, dtype=torch.int64, device=first.device)
            for number in range(num_draws):
                draws = [generator(seed, "ablation loss", name, int(row), at, number) for row in rows]
                eps = torch.stack([torch.randn(first.shape, generator=draw) for draw in draws]).to(first.device)
                x_t, wanted = first.process.add_noise(x0, eps, t), first.process.training_target(x0, eps, t)
                outputs = [denoiser(x_t, t, condition).float() for denoiser in denoisers]
                residuals = torch.stack([(output - wanted).double().flatten(1) for output in outputs], 1)
                products += residuals @ residuals.mT / residuals.shape[2]
        return products / (len(times) * num_draws)

    with evaluation_mode(ensemble.target().denoiser):
        products = workers.in_blocks(len(images), compute, label="losses of the ensemble").cpu()
    active = torch.cat([torch.ones(1, len(denoisers), dtype=torch.bool), ~ensemble.codes.codes]).double()
    mean = active / active.sum(1, keepdim=True)
    losses = torch.einsum("ik,qkl,il->qi", mean, products, mean)
    if not torch.isfinite(losses).all():
        raise ValueError(f"{int((~torch.isfinite(losses)).sum())} of {losses.numel()} losses are not finite")
    return losses
