"""SIDE against a known truth: half of the target's mass sits on 32 members, and its score has a closed form."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from oracles import planted_mixture
from torch import Tensor
from victim import scene_of

from lightning_mem.attacks import SIDE, PseudoLabels, pseudo_labels
from lightning_mem.attacks.clusters import Dropped
from lightning_mem.diffusion import Classifier, ClassifierGuidance, DiffusionProcess, EmpiricalClassifier, Target
from lightning_mem.evaluation import draw_samples
from lightning_mem.metrics import nearest_neighbors, wilson_interval
from lightning_mem.types import SampleSet, to_float, to_uint8

N_G = 128
DRAW = {"seed": 3, "num_steps": 20}


def wide_images(count: int, seed: int) -> Tensor:
    """Images of the wide Gaussian: no copies of anything."""
    draw = torch.Generator().manual_seed(seed)
    return to_uint8(0.4 * torch.randn(count, 1, 8, 8, generator=draw))


MEMBERS, HELDOUT = wide_images(32, 0), wide_images(64, 1)


class Shifted:
    """A classifier that looks up another timestep than the one it is asked at."""

    digest = "shifted"

    def __init__(self, classifier: EmpiricalClassifier, shift: int) -> None:
        self.classifier, self.shift = classifier, shift
        self.num_classes, self.process = classifier.num_classes, classifier.process

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.classifier(x_t, (t + self.shift).clamp(0, 999))


@dataclass
class Planted:
    """The target, and what SIDE makes of samples of it."""

    target: Target
    labels: PseudoLabels
    labelled: SampleSet
    plain: Tensor
    wanted: Tensor

    def classifier(self, dropped: Dropped = "relabel") -> EmpiricalClassifier:
        """The surrogate in closed form, of generated images only."""
        features = self.labelled.images.flatten(1) / 255
        labels = self.labels.clusters().labels(features, dropped)
        return EmpiricalClassifier(self.labelled.images, labels, self.target.process)

    def guided(self, classifier: Classifier, scale: float = 1.0, interval: tuple[int, int] | None = None) -> Tensor:
        """Samples from the noise of the plain ones, each drawn towards its cluster."""
        guidance = ClassifierGuidance(classifier, self.wanted, scale, interval=interval)
        return draw_samples(self.target, N_G, guidance=[guidance], **DRAW).images


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    target = planted_mixture(MEMBERS, DiffusionProcess())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pseudo_labels, "load_target", lambda *args: target)  # an oracle has no file
        labels = PseudoLabels(
            "planted", 1024, 64, 0.5, min_size=8, extractor="pixels", centered=True, n_init=2, seed=0, num_steps=20,
            cache_dir=str(tmp_path_factory.mktemp("planted")), device="cpu",
        )  # fmt: skip
        labels.prepare()
        wanted = torch.randint(0, labels.num_targets, (N_G,), generator=torch.Generator().manual_seed(0))
        plain = draw_samples(target, N_G, **DRAW).images
        yield Planted(target, labels, SampleSet.load(labels.file), plain, wanted)


def copied(images: Tensor) -> Tensor:
    """Whether each is a copy: nearer to one member than a third of the way to the next."""
    distances, _ = nearest_neighbors(images, MEMBERS, 2)
    return distances[:, 0] < distances[:, 1] / 3


def interval_of(images: Tensor) -> tuple[float, float]:
    """The 95 % interval of the share of copies."""
    return wilson_interval(int(copied(images).sum()), len(images))


def test_half_of_the_plain_samples_are_copies_and_no_held_out_image_is(planted: Planted) -> None:
    drawn = planted.labelled.images
    assert 0.4 < copied(drawn).double().mean() < 0.6
    assert len(nearest_neighbors(drawn, MEMBERS, 1)[1][copied(drawn)].unique()) == 32
    assert not copied(HELDOUT).any()


def test_nearly_all_kept_clusters_belong_to_members(planted: Planted) -> None:
    clusters = planted.labels.clusters()
    centroids = (clusters.centroids.reshape(-1, 1, 8, 8) * 255).round().to(torch.uint8)
    assert 25 <= len(clusters.kept) <= 40
    assert copied(centroids[clusters.kept]).double().mean() >= 0.9
    assert copied(centroids).double().mean() < 0.7  # the filter did it


@pytest.mark.parametrize(("dropped", "interval"), [("relabel", None), ("relabel", (400, 1000)), ("background", None)])
def test_guidance_raises_the_hits(planted: Planted, dropped: Dropped, interval: tuple[int, int] | None) -> None:
    found = planted.guided(planted.classifier(dropped), interval=interval)
    assert interval_of(found)[0] > max(0.5, interval_of(planted.plain)[1])
    hits = copied(found)
    own = planted.labels.clusters().targets(found.flatten(1) / 255)
    assert (own[hits] == planted.wanted[hits]).double().mean() > 0.9


def test_the_wrong_sign_lowers_the_hits(planted: Planted) -> None:
    assert interval_of(planted.guided(planted.classifier(), -1.0))[1] < interval_of(planted.plain)[0]


def test_a_shifted_time_index_shows(planted: Planted) -> None:
    classifier = planted.classifier()
    # too late: the classifier believes in more noise than there is, and says too little
    late = planted.guided(Shifted(classifier, 100))
    assert interval_of(late)[1] < interval_of(planted.guided(classifier))[0]
    # too early: it is too sure, which raises hits; its cross-entropy on noised images of its own shows that too
    draw, images = torch.Generator().manual_seed(9), to_float(planted.labelled.images[:256])
    t = torch.full((256,), 700)
    x_t = planted.target.process.add_noise(images, torch.randn(images.shape, generator=draw), t)

    def loss(shift: int) -> float:
        logits = Shifted(classifier, shift)(x_t, t)
        return torch.nn.functional.cross_entropy(logits, planted.labelled.labels[:256]).item()

    assert loss(0) < min(loss(-100), loss(100)) - 0.01


def test_scale_zero_changes_no_bit(planted: Planted) -> None:
    assert torch.equal(planted.guided(planted.classifier(), 0.0), planted.plain)
    assert not torch.equal(planted.guided(planted.classifier(), 0.01), planted.plain)


def test_the_attack_finds_what_was_planted(planted: Planted, tmp_path: Path) -> None:
    attack = SIDE(
        closed_form=True, labels_file=str(planted.labels.file), guidance_scale=1.0, num_samples=N_G, num_steps=20,
        sample_seed=3, cost_ratio=0.5, pictures=False, cache_dir=None,
    )  # fmt: skip
    scene = scene_of(planted.target, MEMBERS, HELDOUT, tmp_path)
    attack.identity(scene.target, "planted", scene.home)
    found = {(r.definition["surrogate"], r.name): r for r in attack.run(scene)}
    hits = {arm: found[arm, "attack/side/hits"] for arm in ("none", "closed_form", "selection")}
    assert hits["none"].value == copied(planted.plain).double().mean().item()
    assert hits["closed_form"].low > max(0.5, hits["none"].high)
    assert found["closed_form", "attack/side/hits_heldout"].value == 0.0
    assert hits["selection"].value > 0.9  # the kept clusters are copies: to select is better still
