"""The verb's judge: does an attribution foresee the models that were trained on subsets of the training images?"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from lightning_mem.attribution.asking import (
    Scores,
    check_names,
    heldout_queries,
    kept_scores,
    member_digests,
    model_queries,
    scores_of,
)
from lightning_mem.attribution.base import AbstractAttribution, AbstractExplanation, Queries
from lightning_mem.attribution.datamodeling_report import Judged, datamodeling_table, write_datamodeling
from lightning_mem.attribution.losses import denoising_losses, even_timesteps
from lightning_mem.attribution.trak import TRAK
from lightning_mem.diffusion import Sampler, Target
from lightning_mem.evaluation import Scene
from lightning_mem.metrics import compare_datamodeling_scores, linear_datamodeling_score, subset_predictions
from lightning_mem.modules import load_target
from lightning_mem.records import Record, atomic_write, digest
from lightning_mem.types import Weights

Kind = Literal["model", "heldout"]

RETRAINED = "retrained"
"""What stands for the ceiling: the losses of other trainings on the same subsets."""


@dataclass(frozen=True)
class SubsetModels:
    """Models trained on subsets of the training images.

    Args:
        folders: Run folders [T][M]: T trainings of each of M subsets.
        digests: Content digests of the images of each subset [M].
    """

    folders: Sequence[Sequence[str]]
    digests: Sequence[frozenset[str]]

    @classmethod
    def read(cls, folders: Sequence[Sequence[str]]) -> "SubsetModels":
        """What the runs say they were trained on.

        Raises:
            ValueError: If there are fewer than 3 subsets, trainings of other numbers, a folder twice, a folder without
                ``members.json``, or two trainings of a place on other images.
        """
        sizes, flat = {len(own) for own in folders}, [folder for own in folders for folder in own]
        if len(sizes) != 1 or min(sizes) < 3 or len(set(flat)) < len(flat):
            raise ValueError(
                "subsets must be lists of run folders, one list a training, each with the same 3 or more subsets in "
                f"one order and no folder twice, got lists of {[len(own) for own in folders]}"
            )
        digests = [[_trained_on(folder) for folder in own] for own in folders]
        for training, own in enumerate(digests[1:], start=1):
            for place, (first, other) in enumerate(zip(digests[0], own, strict=True)):
                if first != other:
                    raise ValueError(
                        f"{folders[training][place]} was trained on other images than {folders[0][place]}: place "
                        f"{place} of every list must be the same subset"
                    )
        return cls(folders, digests[0])

    def masks(self, members: Sequence[str]) -> Tensor:
        """Which images each subset holds, bool [M, N].

        Args:
            members: Content digests of the N training images of the whole.

        Raises:
            ValueError: If two images of the whole are equal, or a subset has an image that the whole has not.
        """
        if len(set(members)) < len(members):
            raise ValueError(
                f"{len(members) - len(set(members))} of the {len(members)} training images equal another pixel for "
                "pixel, so it is not known which subsets hold them: take them out (data.deduplicate exact)"
            )
        known = set(members)
        for folder, own in zip(self.folders[0], self.digests, strict=True):
            if own - known:
                raise ValueError(
                    f"{len(own - known)} of the {len(own)} images that {folder} was trained on are no training images "
                    "of the target: subsets are trained on part of what it was trained on"
                )
        return torch.tensor([[member in own for member in members] for own in self.digests])


class DatamodelingScores(AbstractExplanation):
    r"""The linear datamodeling score of attributions, against models that were trained on subsets of the images.

    .. math:: \mathrm{LDS} = \operatorname{mean}_x\, \rho_S\Big(\Big\{\sum_{i \in S_m} \tau(x, i)\Big\}_m,\
        \{-L(x; S_m)\}_m\Big)

    L is the loss of the query over timesteps evenly across training's, at noise that all models share, averaged over
    the trainings of a subset. Queries of two kinds, always told apart: ``model``, samples of the target, and
    ``heldout``, images it never saw. Records of every method and kind: ``attribution/<name>/lds``;
    ``attribution/<name>/lds_difference`` to the best of the others and to ``random``, paired on the same resamples of
    subsets and queries: an order is claimed (``definition.claimed``) only where this interval excludes 0;
    ``attribution/<name>/seconds``, ``/gradients`` and the like (seconds are of what was still to do: gradients that
    methods or kinds share are taken by the first of them). With two or more trainings also
    ``attribution/retrained/lds``, how well the losses of the first foresee those of the others, and
    ``attribution/retrained/lds_ceiling``, about what a perfect attribution could reach against their mean.
    Regularised methods without a ``lam`` of their own take the one that is best on ``num_calibration`` further queries
    of each kind, which are not reported.

    Args:
        methods: By class_path; names differ. ``lightning_mem.attribution.RandomScores`` is what all have to beat.
        subsets: Run folders of the models on subsets, a list for every training of them, in the same order; the study
            names its own.
        kinds: Of queries.
        num_queries: That are reported, of each kind, at least 2.
        num_calibration: Further queries that ``lam`` is chosen on, of each kind, at least 2.
        num_timesteps: Timesteps of the losses, at least 1.
        num_draws: Noise draws at each, at least 1.
        resamples: Of the intervals, at least 20.
        num_steps: Sampler steps of the queries.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        seed: Of queries, noise and resamples; null takes ``seed_everything``.
        subset_weights: Of the models on subsets: ``ema`` takes averaged weights where there are any.

    Raises:
        ValueError: If a number is out of range, two methods share a name, or the subsets do not fit.

    Undefined when:
        The models on subsets were trained by another recipe than the target.

    Source:
        Park et al., arXiv:2303.14186; for diffusion models Zheng et al., arXiv:2311.00500 (there 64 subsets, 3
        trainings, 1000 timesteps, and ``lam`` chosen on the reported queries).
    """

    name = "datamodeling"

    def __init__(
        self,
        methods: list[AbstractAttribution],
        subsets: list[list[str]] | None = None,
        kinds: list[Kind] | None = None,
        num_queries: int = 64,
        num_calibration: int = 32,
        num_timesteps: int = 20,
        num_draws: int = 2,
        resamples: int = 1000,
        num_steps: int = 25,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        seed: int | None = None,
        subset_weights: Weights = "ema",
    ) -> None:
        check_names(methods)
        for word, least, given in (
            ("num_queries", 2, num_queries), ("num_calibration", 2, num_calibration),
            ("num_timesteps", 1, num_timesteps), ("num_draws", 1, num_draws), ("resamples", 20, resamples),
        ):  # fmt: skip
            if given < least:
                raise ValueError(f"{word} must be at least {least}, got {given}")
        self.kinds: list[Kind] = ["model", "heldout"] if kinds is None else kinds
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must be model, heldout or both, got {kinds}")
        if any(method.name == RETRAINED for method in methods):
            raise ValueError(f"no method may be called {RETRAINED}: so are the models that were trained again")
        self.methods, self.folders = methods, subsets or []
        self.num_queries, self.num_calibration = num_queries, num_calibration
        self.num_timesteps, self.num_draws, self.resamples = num_timesteps, num_draws, resamples
        self.drawing: dict[str, Any] = {"num_steps": num_steps, "sampler": sampler, "eta": eta}
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.subset_weights = subset_weights
        self._models: SubsetModels | None = None
        self._identities: dict[str, str] = {}

    @property
    def models(self) -> SubsetModels:
        """The models on subsets, as their folders describe them; read once."""
        if self._models is None:
            self._models = SubsetModels.read(self.folders)
        return self._models

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target, methods, subsets and settings; see :class:`AbstractExplanation`."""
        even_timesteps(self.num_timesteps, target.process.num_timesteps)
        self._identities = {method.name: method.identity(target, path, home) for method in self.methods}
        sizes = self.num_queries, self.num_calibration, self.num_timesteps, self.num_draws, self.resamples
        models = [sorted(own) for own in self.models.digests], len(self.models.folders)
        return digest(target.digest, self._identities, models, self.kinds, sizes, self.drawing, self.seed)

    # --- running -------------------------------------------------------------------------------------------------

    def run(self, scene: Scene) -> list[Record]:
        """Queries, losses of all models, scores of all methods, and how they fit; see :class:`AbstractExplanation`."""
        both = self.num_queries + self.num_calibration
        asked: dict[Kind, Queries] = {}
        if "model" in self.kinds:
            asked["model"] = model_queries(scene.draw("queries", both, seed=self.seed, **self.drawing))
        reference = scene.reference()
        if "heldout" in self.kinds:
            asked["heldout"] = heldout_queries(reference, both)
        masks = self.models.masks(member_digests(reference))
        losses = self.losses(scene, asked)
        judged = [self._judge(scene, asked[kind], losses[kind], masks) for kind in self.kinds]
        records = [
            scene.record("attribution/", number, seed=self.seed, data_digest=reference.members_digest)
            for own in judged
            for number in own.numbers(self._about(masks))
        ]
        scene.first(lambda: write_datamodeling(scene.folder, judged))
        return records

    def _about(self, masks: Tensor) -> dict[str, Any]:
        return {
            "subsets": len(masks), "subset_size": int(masks[0].sum()), "num_members": masks.shape[1],
            "trainings": len(self.folders), "num_timesteps": self.num_timesteps, "num_draws": self.num_draws,
        }  # fmt: skip

    def losses(self, scene: Scene, asked: Mapping[Kind, Queries]) -> dict[Kind, Tensor]:
        """Losses of all queries under all models on subsets, float64 [T, M, Q] by kind; kept, and found again.

        Raises:
            ValueError: If a model is of another kind than the target, or a loss is not finite.
        """
        times = even_timesteps(self.num_timesteps, scene.target.process.num_timesteps)
        queries = {kind: own.digest for kind, own in asked.items()}
        found: dict[Kind, list[Tensor]] = {kind: [] for kind in asked}
        flat = [folder for own in self.models.folders for folder in own]
        hidden = None if scene.workers.rank == 0 else True
        for number, folder in enumerate(tqdm(flat, "models on subsets", leave=False, delay=2, disable=hidden)):
            model = load_target(folder, self.subset_weights, str(scene.workers.device))
            _check_kind(model, scene.target, folder)
            said = digest(model.digest, queries, times, self.num_draws, self.seed)
            file = scene.folder / "losses" / f"model{number:03d}.npz"
            own = _read_losses(file, said)
            scene.first(lambda: None)  # nobody writes before all have looked
            if own is None:
                own = {
                    kind: denoising_losses(
                        model, asked[kind].images, times, labels=asked[kind].labels, num_draws=self.num_draws,
                        seed=self.seed, name=kind, workers=scene.workers,
                    )
                    for kind in asked
                }  # fmt: skip
                _keep_losses(scene, file, said, own)
            for kind in asked:
                found[kind].append(own[kind])
        shape = len(self.models.folders), len(self.models.digests)
        return {kind: torch.stack(own).unflatten(0, shape) for kind, own in found.items()}

    def _judge(self, scene: Scene, asked: Queries, losses: Tensor, masks: Tensor) -> Judged:
        """All methods on the reported queries of one kind."""
        outputs = -losses[:, :, : self.num_queries]
        mean = outputs.mean(0)
        scores: dict[str, Scores] = {}
        lams: dict[str, float] = {}
        for method in tqdm(
            self.methods, f"methods on {asked.kind}", leave=False, disable=scene.workers.rank != 0 or None
        ):
            scores[method.name], lam = self._scores(method, scene, asked, -losses.mean(0), masks)
            if lam is not None:
                lams[method.name] = lam
        predictions = {name: subset_predictions(own.values[: self.num_queries], masks) for name, own in scores.items()}
        held = dict.fromkeys(predictions, mean)
        if len(outputs) > 1:
            predictions[RETRAINED], held[RETRAINED] = outputs[0], outputs[1:].mean(0)
        found = compare_datamodeling_scores(predictions, held, resamples=self.resamples, seed=self.seed)
        costs = {name: own.cost for name, own in scores.items()}
        return Judged(asked.kind, self.num_queries, found, predictions, held, costs, lams)

    def _scores(
        self, method: AbstractAttribution, scene: Scene, asked: Queries, outputs: Tensor, masks: Tensor
    ) -> tuple[Scores, float | None]:
        """Scores of all queries of one kind, and the lam that the calibration queries chose, where there is one."""
        identity = self._identities[method.name]
        if not isinstance(method, TRAK) or method.lam is not None:
            return scores_of(method, identity, scene, asked), None
        apart = torch.arange(self.num_queries, len(asked))
        by_lam = {}

        def compute() -> tuple[Tensor, Mapping[str, float]]:
            by_lam.update(method.scores_by_lam(scene, asked))
            fits = {
                lam: float(linear_datamodeling_score(own[apart], masks, outputs[:, apart]).nanmean())
                for lam, own in by_lam.items()
            }
            best = max(fits, key=lambda lam: fits[lam])
            return by_lam[best], {**method.cost(), "lam": best}

        chosen_by = digest(identity, masks, outputs[:, apart])
        found = kept_scores(method.name, chosen_by, compute, scene, asked)
        cost = dict(found.cost)
        lam = cost.pop("lam")
        return Scores(found.values, cost), lam

    def table(self, records: Sequence[Record]) -> Table:
        """One row a method and kind of queries."""
        return datamodeling_table(records)


def _trained_on(folder: str | Path) -> frozenset[str]:
    path = Path(folder) / "members.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no members.json: a model on a subset is the run folder of a model trained by `fit`"
        )
    return frozenset(json.loads(path.read_text())["members"]["digests"])


def _check_kind(model: Target, target: Target, folder: str) -> None:
    given, wanted = (
        (tuple(one.shape), one.num_classes, one.denoiser.prediction, one.process.num_timesteps)
        for one in (model, target)
    )
    if given != wanted:
        raise ValueError(
            f"{folder} is another kind of model (shape, classes, prediction, timesteps {given}) than the target "
            f"{wanted}: models on subsets are trained by its recipe"
        )


def _read_losses(file: Path, said: str) -> dict[Kind, Tensor] | None:
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        archive = np.load(opened, allow_pickle=False)
        if str(archive["identity"]) != said:
            return None
        return {kind: torch.from_numpy(archive[kind]) for kind in ("model", "heldout") if kind in archive.files}


def _keep_losses(scene: Scene, file: Path, said: str, losses: Mapping[Kind, Tensor]) -> None:
    def write() -> None:
        with atomic_write(file, "wb") as out:
            arrays = {str(kind): own.numpy() for kind, own in losses.items()}
            np.savez(out, allow_pickle=False, identity=np.array(said), **arrays)

    scene.first(write)
