"""SIDE against a known truth: half of the target's mass sits on 32 members, and its score has a closed form."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import dense_class_log_probability, planted_mixture
from torch import Tensor
from victim import scene_of

from lightning_mem.attacks import SIDE, PseudoLabels, pseudo_labels
from lightning_mem.diffusion import ClassifierGuidance, DiffusionProcess, EmpiricalClassifier, Target
from lightning_mem.evaluation import draw_samples
from lightning_mem.metrics import memorization_ratio, nearest_neighbors, wilson_interval
from lightning_mem.types import SampleSet, to_float, to_uint8

N_G = 192
DRAW = {"seed": 3, "num_steps": 20}


def wide_images(count: int, seed: int) -> Tensor:
    """Images of the wide Gaussian: no copies of anything."""
    draw = torch.Generator().manual_seed(seed)
    return to_uint8(0.4 * torch.randn(count, 1, 8, 8, generator=draw))


MEMBERS, HELDOUT = wide_images(32, 0), wide_images(64, 1)


@dataclass
class Planted:
    """The target, and what SIDE makes of samples of it."""

    target: Target
    labels: PseudoLabels
    labelled: SampleSet
    wanted: Tensor

    def classifier(self) -> EmpiricalClassifier:
        """The surrogate in closed form, of generated images only."""
        return EmpiricalClassifier(self.labelled.images, self.labelled.labels, self.target.process)


class Shifted:
    """A classifier that looks up another timestep than the one it is asked at."""

    def __init__(self, classifier: EmpiricalClassifier, shift: int) -> None:
        self.classifier, self.shift = classifier, shift
        self.num_classes, self.process, self.digest = classifier.num_classes, classifier.process, "shifted"

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.classifier(x_t, (t + self.shift).clamp(0, 999))


@pytest.fixture(scope="module", params=["relabel", "background"])
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    target = planted_mixture(MEMBERS, DiffusionProcess())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pseudo_labels, "load_target", lambda *args: target)  # an oracle has no file
        labels = PseudoLabels(
            "planted", 1024, 64, 0.5, min_size=8, dropped=request.param, extractor="pixels", centered=True, n_init=2,
            seed=0, num_steps=20, cache_dir=str(tmp_path_factory.mktemp("planted")), device="cpu",
        )  # fmt: skip
        labels.prepare()
        wanted = torch.randint(0, labels.num_targets, (N_G,), generator=torch.Generator().manual_seed(0))
        yield Planted(target, labels, SampleSet.load(labels.file), wanted)


def copied(images: Tensor) -> Tensor:
    """Whether each is a copy: nearer to one member than a third of the way to the next."""
    distances, _ = nearest_neighbors(images, MEMBERS, 2)
    return distances[:, 0] < distances[:, 1] / 3


def share(images: Tensor) -> tuple[float, float, float]:
    """Hits with their 95 % interval."""
    low, high = wilson_interval(int(copied(images).sum()), len(images))
    return memorization_ratio(nearest_neighbors(images, MEMBERS, 2)[0]), low, high


def guided(planted: Planted, scale: float = 1.0, shift: int = 0, interval: tuple[int, int] | None = None) -> Tensor:
    guidance = ClassifierGuidance(Shifted(planted.classifier(), shift), planted.wanted, scale, interval=interval)
    return draw_samples(planted.target, N_G, guidance=[guidance], **DRAW).images


def test_half_of_the_plain_samples_are_copies_and_no_held_out_image_is(planted: Planted) -> None:
    drawn = planted.labelled.images
    assert 0.4 < share(drawn)[0] < 0.6
    assert len(nearest_neighbors(drawn, MEMBERS, 1)[1][copied(drawn)].unique()) == 32
    assert not copied(HELDOUT).any()


def test_nearly_all_kept_clusters_belong_to_members(planted: Planted) -> None:
    clusters = planted.labels.clusters()
    centroids = to_uint8(2 * clusters.centroids[clusters.kept].reshape(-1, 1, 8, 8) - 1)
    assert 25 <= len(centroids) <= 40
    assert copied(centroids).double().mean() >= 0.9
    # the filter did it: of all 64 clusters fewer are
    every = to_uint8(2 * clusters.centroids.reshape(-1, 1, 8, 8) - 1)
    assert copied(every).double().mean() < 0.7


def test_guidance_raises_the_hits_and_the_wrong_sign_lowers_them(planted: Planted) -> None:
    plain = share(draw_samples(planted.target, N_G, **DRAW).images)
    for interval in (None, (400, 1000)):
        found = share(guided(planted, interval=interval))
        assert found[1] > 0.5
        assert found[1] > plain[2]
    assert share(guided(planted, -1.0))[2] < plain[1]
    asked = guided(planted)
    own = planted.labels.clusters().targets(to_float(asked).flatten(1) / 2 + 0.5)  # pixels are features in [0, 1]
    assert (own[copied(asked)] == planted.wanted[copied(asked)]).double().mean() > 0.95


def test_a_shifted_time_index_shows(planted: Planted) -> None:
    right = share(guided(planted))
    assert share(guided(planted, shift=100))[2] < right[1]
    # an index that is too small makes the classifier too sure: the cross-entropy on its own noised images shows it
    draw, images = torch.Generator().manual_seed(0), to_float(planted.labelled.images[:128]).double()
    labels, classifier = planted.labelled.labels[:128], planted.classifier()
    t = torch.full((128,), 800)
    x_t = planted.target.process.add_noise(images, torch.randn(images.shape, generator=draw, dtype=torch.float64), t)

    def loss(shift: int) -> float:
        return torch.nn.functional.cross_entropy(Shifted(classifier, shift)(x_t, t), labels).item()

    dense = dense_class_log_probability(
        to_float(planted.labelled.images).double().numpy(), planted.labelled.labels.numpy(), x_t.numpy(),
        np.full(128, planted.target.process.alpha_bar[800].item()),
    )  # fmt: skip
    assert loss(0) == pytest.approx(-dense[np.arange(128), labels.numpy()].mean(), abs=1e-9)
    assert loss(0) < min(loss(-50), loss(50)) - 0.01


def test_scale_zero_changes_no_bit(planted: Planted) -> None:
    plain = draw_samples(planted.target, N_G, **DRAW).images
    assert torch.equal(guided(planted, 0.0), plain)
    assert not torch.equal(guided(planted, 0.01), plain)


def test_the_attack_finds_what_was_planted(planted: Planted, tmp_path: Path) -> None:
    attack = SIDE(
        closed_form=True, labels_file=str(planted.labels.file), guidance_scale=1.0, num_samples=N_G, num_steps=20,
        sample_seed=3, cost_ratio=0.5, pictures=False, cache_dir=None,
    )  # fmt: skip
    scene = scene_of(planted.target, MEMBERS, HELDOUT, tmp_path)
    attack.identity(scene.target, "planted", scene.home)
    found = {(r.definition["surrogate"], r.name): r for r in attack.run(scene)}
    hits = {arm: found[arm, "attack/side/hits"] for arm in ("none", "closed_form", "selection")}
    assert hits["none"].value == share(draw_samples(planted.target, N_G, **DRAW).images)[0]
    assert hits["closed_form"].low > max(0.5, hits["none"].high)
    assert found["closed_form", "attack/side/hits_heldout"].value == 0.0
    assert hits["selection"].value > 0.9  # kept clusters are copies: to select is even better than to guide
