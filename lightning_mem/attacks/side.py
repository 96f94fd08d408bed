"""SIDE: guide an unconditional target towards clusters of its own samples, and count the training images that come."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.table import Table
from torch import Tensor

from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.clusters import Clusters
from lightning_mem.attacks.guided import draw_targets, load_surrogate
from lightning_mem.attacks.pseudo_labels import PseudoLabels, clusters_file
from lightning_mem.attacks.side_report import arms_table, write_report
from lightning_mem.attacks.side_scores import Arm, score_arms
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import (
    ClassifierGuidance,
    EmpiricalClassifier,
    Sampler,
    ScaleSchedule,
    Target,
    classifier_gradient,
)
from lightning_mem.diffusion.guidance import Classifier
from lightning_mem.diffusion.sampling import network_of
from lightning_mem.evaluation import Measure, Scene, cache_folder
from lightning_mem.metrics import build_extractor
from lightning_mem.randomness import generator
from lightning_mem.records import Record, atomic_write, digest
from lightning_mem.types import SampleSet, Weights

Weighting = Literal["uniform", "cohesion", "size", "isolation"]
"""How the target clusters of samples are drawn: equally often, or in proportion to a number of the cluster."""


def take_in_turn(classes: Tensor, wanted: Tensor) -> Tensor:
    """Serve wanted classes from a pool: places of the first unused sample of each, int64; what is used up is left out.

    Args:
        classes: int64 [pool], -1 for samples that nobody wants.
        wanted: int64 [N].
    """
    queues = {int(k): iter((classes == k).nonzero().flatten().tolist()) for k in wanted.unique()}
    found = [next(queues[int(k)], None) for k in wanted]
    return torch.tensor([place for place in found if place is not None], dtype=torch.int64)


def cost_of(target: Target, classifier: Classifier, device: torch.device, repeats: int = 5) -> float:
    """Time of one gradient of a classifier over that of one call of the target's network, on blocks of 64."""
    for network in (network_of(target.denoiser), network_of(classifier)):
        if network is not None:
            network.to(device)
    draw = generator(0, "cost")
    x_t = torch.randn((BLOCK, *target.shape), generator=draw).to(device)
    t = torch.full((BLOCK,), target.process.num_timesteps // 2, device=device)
    labels = torch.zeros(BLOCK, dtype=torch.int64, device=device)
    condition = None if target.num_classes is None else labels

    def seconds(work: Callable[[], Tensor]) -> float:
        work()
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            float(work().sum())  # waits for the device
            found.append(time.perf_counter() - start)
        return min(found)

    with torch.no_grad():
        network_time = seconds(lambda: target.denoiser(x_t, t, condition))
    return float(f"{seconds(lambda: classifier_gradient(classifier, x_t, t, labels)) / network_time:.2g}")


class SIDE(AbstractAttack):
    r"""Extracts training images with a surrogate condition.

    .. math:: s_\theta(x_t, t) + \lambda(t)\,\nabla_{x_t} \log p_\phi^t(c \mid x_t), \qquad c \sim \{1, \dots, K'\}

    where the classes are clusters of the target's own samples (:class:`PseudoLabels`) and the classifier was trained on
    these (:class:`SurrogateModule`), or is their closed-form posterior. All arms start from the same noise:

    * ``none``: unguided;
    * ``trained``, ``time_independent``, ``closed_form``: guided, each sample towards its drawn cluster;
    * ``selection``: the unguided samples that fall into a kept cluster by the pseudo-labels' own rule;
    * ``selection_equal_cost``: more unguided samples, as many as the network evaluations of the first guided arm pay
      for (a classifier call counts at its measured cost), of which each drawn cluster takes the next that it picks.

    Writes samples, tables (every sample, every cluster) and pictures beside its records ``attack/side/...``, whose
    ``definition.surrogate`` names the arm.

    Args:
        surrogate: Run folder or checkpoint of a SurrogateModule trained for this target; null for no such arm.
        time_independent: The same with ``time_dependent: false``, the baseline; null for no such arm.
        closed_form: Whether to guide by the posterior of the labelled images themselves.
        pseudo_labels: The labelled images: settings of PseudoLabels (without target), drawn if they are not there. null
            takes those the surrogate was trained on, from ``pseudo_labels`` in the target's run folder.
        labels_file: The file of the labelled images, where it is elsewhere.
        guidance_scale: Lambda; 0 for none.
        schedule: How lambda runs over the timesteps.
        interval: Training timesteps [low, high) with guidance; null for all.
        targets: How clusters are drawn: ``uniform``, or in proportion to ``cohesion``, ``size`` or ``isolation``.
        selection: Whether to measure the two arms of selection.
        num_samples: N_G, samples of an arm.
        num_steps: Sampler steps.
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
        eta: DDIM's share of fresh noise, 0 to 1.
        sample_seed: Of noise and drawn clusters; null takes ``seed_everything``.
        surrogate_weights: Of surrogates: ``ema`` takes averaged weights where there are any.
        extractors: Feature spaces of AMS and UMS: ``pixels``, ``sscd``.
        extractor_weights: Local weight file per extractor name; also of the pseudo-labels' extractor.
        threshold: Of the rule that says what a hit is, in (0, 1): nearest over second nearest training image.
        cost_ratio: Cost of a classifier call in network evaluations; null measures it, once for a folder of results.
        pictures: Whether to draw pictures.
        cache_dir: Where features of training images are kept; see ``evaluate``.

    Raises:
        ValueError: If a number is out of range, nothing says what the clusters are, or a surrogate or labels belong to
            another target (by digest).

    Source:
        SIDE, arXiv:2410.02467v7, algorithm 1; time-independent guidance: Carlini et al., arXiv:2301.13188. The closed
        form and the arms of selection are ours.
    """

    name = "side"
    threat_model = (
        "SIDE sees samples of the target and adds a term to its score while it samples; it sees no training image, no "
        "label and no gradient of the target. Training images are read after the last sample, to score."
    )

    def __init__(
        self,
        surrogate: str | None = None,
        time_independent: str | None = None,
        closed_form: bool = False,
        pseudo_labels: PseudoLabels | None = None,
        labels_file: str | None = None,
        guidance_scale: float = 10.0,
        schedule: ScaleSchedule = "constant",
        interval: tuple[int, int] | None = None,
        targets: Weighting = "uniform",
        selection: bool = True,
        num_samples: int = 1024,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        sample_seed: int | None = None,
        surrogate_weights: Weights = "ema",
        extractors: list[str] | None = None,
        extractor_weights: dict[str, str] | None = None,
        threshold: float = 1 / 3,
        cost_ratio: float | None = None,
        pictures: bool = True,
        cache_dir: str | None = "auto",
    ) -> None:
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}")
        if cost_ratio is not None and not cost_ratio >= 0:
            raise ValueError(f"cost_ratio must be at least 0, got {cost_ratio}")
        if pseudo_labels is not None and labels_file is not None:
            raise ValueError("give pseudo_labels or labels_file, not both: they name two sets of labelled images")
        if all(given is None for given in (surrogate, time_independent, pseudo_labels, labels_file)):
            raise ValueError(
                "SIDE needs clusters of generated images: name a trained surrogate, or give the settings of "
                "pseudo_labels (with closed_form true nothing has to be trained)"
            )
        self.surrogates = {"trained": surrogate, "time_independent": time_independent}
        self.closed_form, self.selection, self.targets = closed_form, selection, targets
        self.pseudo_labels, self.labels_file = pseudo_labels, labels_file
        self.guidance: dict[str, Any] = {"scale": guidance_scale, "schedule": schedule, "interval": interval}
        self.num_samples, self.surrogate_weights = num_samples, surrogate_weights
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if sample_seed is None else sample_seed
        self.drawing: dict[str, Any] = {"seed": seed, "num_steps": num_steps, "sampler": sampler, "eta": eta}
        self.extractors = ["pixels"] if extractors is None else extractors
        self.extractor_weights = extractor_weights or {}
        self.threshold, self.cost_ratio, self.pictures, self.cache_dir = threshold, cost_ratio, pictures, cache_dir
        self._loaded: dict[str, Any] = {}

    # --- what it was given ---------------------------------------------------------------------------------------

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target, surrogates, labelled images and settings; see :class:`AbstractAttack`."""
        self._loaded = {}
        for arm, given in self.surrogates.items():
            if given is None:
                continue
            found = load_surrogate(given, self.surrogate_weights, target, path)
            if found.time_dependent != (arm == "trained"):
                word = "time-dependent" if found.time_dependent else "time-independent"
                raise ValueError(f"{given} is a {word} classifier: give it as {self._option(found.time_dependent)}")
            self._loaded[arm] = found
        if self.pseudo_labels is not None:
            self.pseudo_labels.take_target(path, target.weights)
        self._file = self._labels(home)
        settings = {
            **self.guidance, **self.drawing, "targets": self.targets, "selection": self.selection,
            "num_samples": self.num_samples, "extractors": self.extractors, "threshold": self.threshold,
            "closed_form": self.closed_form, "cost_ratio": self.cost_ratio,
        }  # fmt: skip
        networks = {arm: classifier.digest for arm, classifier in self._loaded.items()}
        return digest(target.digest, networks, self._file.name, settings)

    @staticmethod
    def _option(time_dependent: bool) -> str:
        return "surrogate" if time_dependent else "time_independent"

    def _labels(self, home: Path) -> Path:
        """The file of labelled images; it may still have to be made."""
        if self.labels_file is not None:
            return Path(self.labels_file)
        if self.pseudo_labels is not None:
            return self.pseudo_labels.file
        wanted = next(iter(self._loaded.values())).pseudo_labels.get("images_digest")
        for manifest in sorted((home / "pseudo_labels").glob("labels-*.json")):
            if json.loads(manifest.read_text())["digest"] == wanted:
                return manifest.with_suffix(".npz")
        raise ValueError(
            f"the surrogate was trained on the labelled images {wanted}, which are not in {home / 'pseudo_labels'}: "
            "say where they are with labels_file, or give the settings of pseudo_labels that made them"
        )

    def _labelled(self, scene: Scene) -> SampleSet:
        """The labelled images, made now where they are not there.

        Raises:
            ValueError: If they belong to another target, or are not those a surrogate was trained on.
        """
        if self.pseudo_labels is not None:
            scene.first(self.pseudo_labels.prepare)
        found = SampleSet.load(self._file)
        about = found.settings
        if about.get("target") != scene.target.digest or "num_targets" not in about or found.labels is None:
            raise ValueError(
                f"{self._file} holds no pseudo-labels of the target {scene.target.digest} (it names "
                f"{about.get('target')}): PseudoLabels with this target makes them"
            )
        for arm, classifier in self._loaded.items():
            own = classifier.pseudo_labels.get("images_digest")
            if own != found.digest or classifier.num_classes != about["num_classes"]:
                raise ValueError(
                    f"{self.surrogates[arm]} was trained on the labelled images {own} ({classifier.num_classes} "
                    f"classes), but {self._file} holds {found.digest} ({about['num_classes']}): use one set for both"
                )
        return found

    # --- the attack ----------------------------------------------------------------------------------------------

    def run(self, scene: Scene) -> list[Record]:
        """Draw every arm, then score; see :class:`AbstractAttack`."""
        n, seed = self.num_samples, self.drawing["seed"]
        unguided = scene.draw("unguided", n, **self.drawing)
        labelled = self._labelled(scene)
        about = labelled.settings
        clusters = Clusters.load(clusters_file(self._file))
        ones = [1.0] * about["num_targets"]
        names = {"cohesion": "cluster_cohesion", "isolation": "cluster_isolation", "size": "cluster_sizes"}
        weights = torch.tensor(about[names[self.targets]] if self.targets != "uniform" else ones, dtype=torch.float64)
        wanted = draw_targets(weights.clamp(min=0), unguided.addresses, seed)
        steps = scene.target.process.scheduler(self.drawing["sampler"], self.drawing["num_steps"]).timesteps
        arms = [Arm("none", unguided, evaluations=float(n * len(steps)), paired=True)]
        classifiers: dict[str, Classifier] = dict(self._loaded)
        if self.closed_form:
            labels = cast(Tensor, labelled.labels)
            classifiers["closed_form"] = EmpiricalClassifier(
                labelled.images, labels, scene.target.process, about["num_classes"]
            )
        costs = self._costs(scene, classifiers)
        common = self._definition(about, labelled.digest)
        for arm, classifier in classifiers.items():
            guidance = ClassifierGuidance(classifier, wanted, process=scene.target.process, **self.guidance)
            samples = scene.draw(arm, n, guidance=[guidance], **self.drawing)
            spent = len(steps) + costs[arm] * guidance.evaluations_per_sample(steps)
            own = {**common, "cost_ratio": costs[arm]}
            arms.append(Arm(arm, samples, n * spent, paired=True, targets=wanted, definition=own))
        if self.selection:
            paid = arms[1].evaluations if len(arms) > 1 else arms[0].evaluations
            arms += self._selected(scene, unguided, about, clusters, wanted, paid, len(steps), common)
        measure = Measure(
            scene.reference(), self.extractors, self.extractor_weights, self.threshold, scene.workers,
            ("ratio", "copied_images", "scores"), cache_dir=cache_folder(self.cache_dir),
        )  # fmt: skip
        scores = score_arms(
            arms, measure, step=scene.step, config_digest=scene.config_digest, run=scene.home.name, seed=seed
        )
        scene.first(lambda: write_report(scores, measure, about, scene.folder, self.pictures))
        return [record for score in scores for record in score.records]

    def _costs(self, scene: Scene, classifiers: dict[str, Classifier]) -> dict[str, float]:
        """Cost of a call of each classifier in network evaluations; measured once, so that a second run agrees."""
        if self.cost_ratio is not None:
            return dict.fromkeys(classifiers, self.cost_ratio)
        file = scene.folder / "costs.json"

        def write() -> None:
            known = json.loads(file.read_text()) if file.is_file() else {}
            new = {
                arm: cost_of(scene.target, c, scene.workers.device)
                for arm, c in classifiers.items()
                if arm not in known
            }
            with atomic_write(file) as opened:
                json.dump(known | new, opened)

        if classifiers:
            scene.first(write)
        return json.loads(file.read_text()) if classifiers else {}

    def _selected(
        self, scene: Scene, unguided: SampleSet, about: dict[str, Any], clusters: Clusters, wanted: Tensor, paid: float,
        steps: int, common: dict[str, Any],
    ) -> list[Arm]:  # fmt: skip
        """Unguided samples that the kept clusters pick: of the same draws, and of as many as the guided arm cost."""
        pool, count = unguided, round(paid / steps)
        if count > len(unguided):
            more = scene.draw("unguided_more", count - len(unguided), first=len(unguided), **self.drawing)
            images, addresses = (
                torch.cat([getattr(part, name) for part in (unguided, more)]) for name in ("images", "addresses")
            )
            given = [part.labels for part in (unguided, more) if part.labels is not None]
            pool = SampleSet(
                images, addresses, torch.cat(given) if given else None, unguided.weights, unguided.settings
            )
        name = about["extractor"]
        extractor = build_extractor(name, self.extractor_weights.get(name), scene.workers.device)
        if extractor.digest != about["extractor_digest"]:
            raise ValueError(
                f"the pseudo-labels were made with {name} {about['extractor_digest']}, but extractor_weights gives "
                f"{extractor.digest}: name the same file"
            )
        features = scene.workers.in_blocks(
            len(pool), lambda rows: extractor(pool.images[rows]), label=f"{name} of samples"
        )
        classes = clusters.targets(features)
        first = (classes[: len(unguided)] >= 0).nonzero().flatten()
        fair = take_in_turn(classes, wanted)
        found = []
        for arm, places, size in (("selection", first, len(unguided)), ("selection_equal_cost", fair, len(pool))):
            found.append(
                Arm(
                    arm, _rows(pool, places), float(size * steps), targets=classes[places], places=places,
                    pool=_rows(pool, torch.arange(size)), definition={**common, "drawn": size},
                )
            )  # fmt: skip
        return found

    def _definition(self, about: dict[str, Any], labels_digest: str) -> dict[str, Any]:
        """What every guided or selected number depends on besides its samples' settings."""
        keys = ("num_clusters", "num_targets", "num_classes", "tau", "keep", "rank", "min_size", "centered", "dropped")
        return {
            "labels_digest": labels_digest, "labels_images": about["num_images"],
            "labels_evaluations": about["num_images"] * int(about.get("num_steps", 0)),  # paid once, in no cost
            "labels_extractor": about["extractor"], "targets": self.targets, **{key: about[key] for key in keys},
        }  # fmt: skip

    def table(self, records: Sequence[Record]) -> Table:
        """One row an arm."""
        return arms_table(records)


def _rows(samples: SampleSet, places: Tensor) -> SampleSet:
    labels = None if samples.labels is None else samples.labels[places]
    return SampleSet(samples.images[places], samples.addresses[places], labels, samples.weights, samples.settings)
