"""SecMI's network: a classifier of the map of what one step there and back misses."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mem.attacks.conditions import Rule
from lightning_mem.attacks.membership_scores import Sides
from lightning_mem.attacks.query import Query, ask_images
from lightning_mem.attacks.secmi import SecMI
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.evaluation import Workers
from lightning_mem.metrics import roc
from lightning_mem.networks import ClassifierConfig
from lightning_mem.networks.classifier import TimeClassifier, build_classifier
from lightning_mem.randomness import derive_seed, generator

SELECTION = 0.25
"""Share of the images learned from that choose the epoch and are not trained on."""


class SecMINetwork(SecMI):
    r"""Tells members from held-out images by a classifier of SecMI's difference map, learned from some of the images.

    .. math:: s(x) = f\big(\lvert \psi(\phi(\tilde x_t, t), t + k) - \tilde x_t \rvert\big)

    A share of the images of either side, whose membership the attacker knows, is learned from; a quarter of them only
    chooses the epoch, by AUC and then by loss. All others are told apart, and no number rests on an image that was
    learned from. Maps are divided by their root mean square over the images trained on. Records:
    :class:`AbstractMembership`.

    Args:
        share: Of each side that is learned from, in (0, 1).
        epochs: Passes, at least 1.
        learning_rate: Of SGD with momentum 0.9, positive.
        batch_size: At least 2.
        network: The classifier; null: ``resnet18``. A group norm would divide out how
            large an image's error is.
        stride: See :class:`SecMI`; so are all others.
        protection: See there.
        setting: See there.
        timesteps: See there; one classifier each.
        candidates: See there.
        curve: See there.
        noise_seed: Of splits, initial weights and batches; null takes ``seed_everything``.
        condition: See there.
        block: See there.

    Raises:
        ValueError: If a number is out of range, or a side has fewer than 20 images.

    Source:
        Duan et al., arXiv:2302.01316, section 4.3 (SecMI_NNs): ResNet-18, a fifth of the images, 15 epochs. Their
        release picks the epoch on the images it is told on; here those are apart.
    """

    name = "secmi_network"
    title = "SecMI, network"
    threat_model = (
        "SecMI's network may ask the served denoiser for its noise prediction on images of its choice, and knows the "
        "membership of a share of them, from which it learns. The calibrated attacker knows half of the others too."
    )

    def __init__(
        self,
        share: float = 0.2,
        epochs: int = 15,
        learning_rate: float = 1e-3,
        batch_size: int = 128,
        network: ClassifierConfig | None = None,
        stride: int = 10,
        protection: AbstractAddition | None = None,
        setting: str = "",
        timesteps: list[int] | None = None,
        candidates: list[int] | None = None,
        curve: list[int] | None = None,
        noise_seed: int | None = None,
        condition: Rule | None = None,
        block: int = BLOCK,
    ) -> None:
        super().__init__(stride, protection, setting, timesteps, candidates, curve, noise_seed, condition, block)
        if not 0 < share < 1 or not learning_rate > 0:
            raise ValueError(f"share must lie in (0, 1), learning_rate be positive, got {share} and {learning_rate}")
        if epochs < 1 or batch_size < 2:
            raise ValueError(f"epochs must be at least 1 and batch_size at least 2, got {epochs} and {batch_size}")
        self.share, self.epochs, self.learning_rate, self.batch_size = share, epochs, learning_rate, batch_size
        self.network = network or ClassifierConfig("resnet18")

    @property
    def about(self) -> dict[str, Any]:
        """How it learned."""
        how = {"share": self.share, "epochs": self.epochs, "learning_rate": self.learning_rate}
        return {**super().about, **how, "batch_size": self.batch_size, "network": str(self.network.to_dict())}

    def scores(
        self, target: Target, images: Sides, arms: Mapping[str, Sequence[ScoreTerm]], workers: Workers
    ) -> dict[str, Sides]:
        """NaN where an image was learned from; see :class:`AbstractMembership`."""
        if min(map(len, images)) < 20:
            raise ValueError(
                f"SecMI's network needs at least 20 images of either side, got {len(images[0])} members and "
                f"{len(images[1])} held-out images: raise data.num_heldout, or take SecMI without it"
            )

        def maps(query: Query, x0: Tensor, rows: Tensor) -> Tensor:
            return self.differences(query, x0, rows).abs().float()

        sides = [
            ask_images(
                target,
                side,
                arms,
                maps,
                workers,
                f"{self.title} on {name}",
                self.conditions.of(target, name),
                self.block,
            )
            for side, name in zip(images, ("members", "heldout"), strict=True)
        ]
        return {arm: self._learned(arm, (sides[0][arm], sides[1][arm])) for arm in arms}

    def _learned(self, arm: str, maps: Sides) -> Sides:
        """Scores [m, T] and [n, T] of maps [m, T, C, H, W] and [n, T, C, H, W]."""
        rows = [self.learned_rows(len(side), name) for side, name in zip(maps, ("members", "heldout"), strict=True)]
        found = [torch.full(side.shape[:2], torch.nan, dtype=torch.float64) for side in maps]
        for place, t in enumerate(self.times):
            train, choose = (
                [side[own, place] for side, own in zip(maps, parts, strict=True)] for parts in zip(*rows, strict=True)
            )
            scale = torch.cat(train).square().mean().sqrt().clamp(min=1e-12)
            network = self._fit([side / scale for side in train], [side / scale for side in choose], arm, t)
            for side, both, scores in zip(maps, rows, found, strict=True):
                tested = torch.ones(len(side), dtype=torch.bool)
                tested[torch.cat(both)] = False
                scores[tested, place] = _logits(network, side[tested, place] / scale)
        return found[0], found[1]

    def learned_rows(self, count: int, name: str) -> tuple[Tensor, Tensor]:
        """Rows that are trained on, and rows that choose the epoch: an addressed draw."""
        learned = max(4, round(self.share * count))
        order = torch.randperm(count, generator=generator(self.seed, "secmi network", name))[:learned]
        apart = max(2, round(SELECTION * learned))
        return order[apart:].sort().values, order[:apart].sort().values

    def _fit(self, train: Sequence[Tensor], choose: Sequence[Tensor], arm: str, t: int) -> TimeClassifier:
        """The classifier of the epoch that tells the choosing images best."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "secmi network", arm, t))
            network = build_classifier(self.network, train[0].shape[-1], train[0].shape[1], 2, time_dependent=False)
        optimizer = torch.optim.SGD(network.parameters(), self.learning_rate, momentum=0.9, weight_decay=5e-4)
        inputs = torch.cat(list(train))
        labels = torch.cat([torch.ones(len(train[0])), torch.zeros(len(train[1]))]).long()
        draw = generator(self.seed, "secmi network batches", arm, t)
        best, kept = (-1.0, 0.0), network
        with torch.enable_grad():
            for _ in range(self.epochs):
                network.train()
                for rows in torch.randperm(len(inputs), generator=draw).split(self.batch_size):
                    optimizer.zero_grad()
                    logits = network(inputs[rows], torch.zeros(len(rows), dtype=torch.int64))
                    nn.functional.cross_entropy(logits, labels[rows]).backward()
                    optimizer.step()
                own, other = (_logits(network, side) for side in choose)
                loss = nn.functional.softplus(-own).mean() + nn.functional.softplus(other).mean()
                found = roc(own, other).auc, -float(loss)
                if found > best:
                    best, kept = found, copy.deepcopy(network)
        return kept


@torch.no_grad()
def _logits(network: TimeClassifier, maps: Tensor) -> Tensor:
    """Log odds of being a member, float64 [N], in evaluation mode."""
    network.eval()
    found = [network(part, torch.zeros(len(part), dtype=torch.int64)) for part in maps.split(256)]
    logits = torch.cat(found).double()
    return logits[:, 1] - logits[:, 0]
