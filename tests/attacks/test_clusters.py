"""Clusters of hand-built features, and their numbers against numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mem.attacks import Clusters, cluster, cohesion, isolation, keep_clusters

CENTERS = torch.tensor([[0.0, 9.0], [9.0, 0.0], [9.0, 9.0], [-9.0, -9.0]])


def blobs(sizes: list[int], spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Features around known centres, and the centre of each."""
    truth = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return CENTERS[truth] + spread * torch.randn(len(truth), 2, generator=torch.Generator().manual_seed(0)), truth


def test_clusters_are_the_known_groups() -> None:
    features, truth = blobs([20, 30, 7, 3])
    assignment, centroids = cluster(features, 4)
    pairs = set(zip(assignment.tolist(), truth.tolist(), strict=True))
    assert len(pairs) == 4  # one to one
    means = torch.stack([features[assignment == k].double().mean(0) for k in range(4)])
    torch.testing.assert_close(centroids, means)
    assert torch.equal(cluster(features, 4)[0], assignment)


@pytest.mark.parametrize("count", [1, 12])
def test_more_clusters_than_images_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"num_clusters must lie in \[2, 11\] \(the generated images\), got {count}"):
        cluster(torch.randn(11, 3), count)


def test_repeated_images_leave_clusters_empty_and_those_are_never_kept() -> None:
    features = CENTERS[:2].repeat_interleave(4, 0)
    assignment, centroids = cluster(features, 3)
    sizes = torch.bincount(assignment, minlength=3)
    tight, apart = cohesion(features, assignment, centroids), isolation(features, assignment, centroids)
    assert sorted(sizes.tolist()) == [0, 4, 4]
    assert torch.isfinite(tight).all()
    assert apart[sizes > 0].tolist() == [1, 1]
    assert torch.equal(keep_clusters(tight, apart, sizes, min_size=1), (sizes > 0).nonzero().flatten())


@pytest.mark.parametrize("centered", [False, True])
def test_cohesion_is_the_mean_cosine_of_numpy(centered: bool) -> None:
    rng = np.random.default_rng(0)
    features, assignment = rng.normal(1.0, 1.0, (40, 5)), rng.integers(0, 3, 40)
    centroids = np.stack([features[assignment == k].mean(0) for k in range(3)])
    shift = features.mean(0) if centered else 0.0
    z, mu = features - shift, centroids - shift
    expected = [
        np.mean([a @ mu[k] / np.linalg.norm(a) / np.linalg.norm(mu[k]) for a in z[assignment == k]]) for k in range(3)
    ]
    found = cohesion(*(torch.from_numpy(part) for part in (features, assignment, centroids)), centered)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_isolation_is_the_share_of_numpy_and_tells_a_ball_from_a_cut() -> None:
    rng = np.random.default_rng(0)
    # half a continuum, evenly spread over a long line and cut into clusters, and a dense ball far away
    line = np.stack([np.linspace(0, 100, 400), np.zeros(400)], 1)
    ball = [50.0, 500.0] + 0.1 * rng.normal(size=(50, 2))
    features = torch.from_numpy(np.concatenate([line, ball]))
    assignment = torch.cat([torch.arange(400) // 40, torch.full((50,), 10)])
    centroids = torch.stack([features[assignment == k].mean(0) for k in range(11)])
    expected = []
    for k in range(11):
        own = np.linalg.norm(features[assignment == k] - centroids[k], axis=1)
        radius, every = np.sqrt((own**2).mean()), np.linalg.norm(features - centroids[k], axis=1)
        expected.append((every <= 1.5 * radius).sum() / (every <= 3 * radius).sum())
    found = isolation(features, assignment, centroids)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert found[10] > 0.8
    # on a line of even density half of the outer interval is inner
    assert found[2:8].max() < 0.6


def kept(**options: float) -> list[int]:
    numbers = {"cohesion": [0.9, 0.4, 0.8, 0.7, 0.95], "isolation": [0.1, 0.9, 0.5, 0.7, 0.3], "sizes": [5, 9, 9, 9, 1]}
    tensors = {name: torch.tensor(values) for name, values in numbers.items()}
    return keep_clusters(**tensors, **options).tolist()


def test_tau_size_and_rank_decide_which_clusters_stay() -> None:
    assert kept() == [0, 2, 3]
    assert kept(tau=None, min_size=1) == [0, 1, 2, 3, 4]
    assert kept(tau=0.8) == [0, 2]
    assert kept(tau=0.8, min_size=1) == [0, 2, 4]
    assert kept(keep=2) == [0, 2]
    assert kept(keep=2, rank="isolation") == [2, 3]
    assert kept(keep=2, rank="isolation", tau=None) == [1, 3]
    assert kept(keep=9) == [0, 2, 3]


def test_fewer_than_two_clusters_are_refused_with_counts() -> None:
    with pytest.raises(ValueError, match=r"1 of 5 clusters stay.* 2 have a cohesion of at least tau = 0.9 "):
        kept(tau=0.9)
    with pytest.raises(ValueError, match=r"0 of 5 .*tau = 0.99 \(the largest is 0.950\), 4 have at least min_size = 2"):
        kept(tau=0.99)
    for options, message in (({"tau": 1.1}, "tau must"), ({"min_size": 0}, "min_size"), ({"keep": 1}, "keep must")):
        with pytest.raises(ValueError, match=message):
            kept(**options)


def test_every_image_carries_the_label_of_the_nearest_kept_centroid() -> None:
    features, truth = blobs([20, 30, 7, 3])
    found = Clusters(CENTERS.double(), torch.tensor([0, 3]))
    labels = found.labels(features, "relabel").numpy()
    far = np.linalg.norm(features.numpy()[:, None] - CENTERS[[0, 3]].numpy(), axis=2)
    np.testing.assert_array_equal(labels, far.argmin(1))
    assert set(labels) == {0, 1}
    background = found.labels(features, "background")
    assert background.tolist() == [{0: 0, 3: 1}.get(int(k), 2) for k in truth]
    assert found.targets(features).tolist() == [{0: 0, 3: 1}.get(int(k), -1) for k in truth]


def test_clusters_come_back_from_the_disk(tmp_path) -> None:
    found = Clusters(CENTERS.double(), torch.tensor([1, 2]))
    found.save(tmp_path / "clusters.npz")
    again = Clusters.load(tmp_path / "clusters.npz")
    assert torch.equal(again.centroids, found.centroids)
    assert torch.equal(again.kept, found.kept)
