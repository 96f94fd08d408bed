"""Similarities against numpy, in both orientations, and on two processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from linear_denoiser import images, scene_of, target_of
from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances

from lightning_mem.attribution import FeatureSimilarity, PixelSimilarity, Queries
from lightning_mem.evaluation import Reference, Scene, Workers

TARGET = target_of(torch.eye(16), (1, 4, 4))
MEMBERS, ASKED = images(70, 1, side=4), Queries(images(3, 2, side=4), "given", torch.arange(3))


def test_pixel_similarities_are_those_of_scikit_learn(tmp_path: Path) -> None:
    scene = scene_of(TARGET, MEMBERS, tmp_path)
    own, asked = (pixels.double().flatten(1).numpy() for pixels in (MEMBERS, ASKED.images))
    far = -euclidean_distances(asked / 255, own / 255) / 4
    np.testing.assert_allclose(PixelSimilarity("l2").scores(scene, ASKED).numpy(), far, rtol=1e-9)
    alike = cosine_similarity(asked / 127.5 - 1, own / 127.5 - 1)
    np.testing.assert_allclose(PixelSimilarity("cosine").scores(scene, ASKED).numpy(), alike, atol=1e-6)
    same = FeatureSimilarity("pixels").scores(scene, ASKED).numpy()
    np.testing.assert_allclose(same, cosine_similarity(asked, own), atol=1e-6)


def test_the_nearer_orientation_counts_where_training_flips(tmp_path: Path) -> None:
    rows = torch.arange(70)
    both = Reference(torch.cat([MEMBERS, MEMBERS.flip(-1)]), MEMBERS[:0], torch.cat([rows, rows]), rows, mirror=True)
    scene = Scene(TARGET, tmp_path, tmp_path, lambda *a, **k: None, lambda: both)  # type: ignore[arg-type,return-value]
    asked = Queries(MEMBERS[[5, 9]].flip(-1), "given", torch.arange(2))
    found = PixelSimilarity().scores(scene, asked)
    assert found.shape == (2, 70)
    assert found.argmax(1).tolist() == [5, 9]
    assert found.max(1).values.tolist() == [0.0, 0.0]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    alone = PixelSimilarity().scores(scene_of(TARGET, MEMBERS, tmp_path), ASKED)
    parts = []

    def remember(rows: torch.Tensor) -> torch.Tensor:
        parts.append(rows)
        return torch.stack([parts[0], rows])

    for rank in (0, 1):
        workers = Workers(rank, 2, gather=remember)
        found = PixelSimilarity().scores(scene_of(TARGET, MEMBERS, tmp_path, workers=workers), ASKED)
    assert torch.equal(found, alone)


def test_unknown_measures_and_queries_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measure must be l2 or cosine, got 'l1'"):
        PixelSimilarity("l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="extractor must be one of"):
        FeatureSimilarity("clip").identity(TARGET, "", tmp_path)
    small = Queries(images(1, 0), "given", torch.arange(1))
    for method in (PixelSimilarity(), FeatureSimilarity("pixels")):
        with pytest.raises(ValueError, match=r"queries are \(1, 2, 2\)"):
            method.scores(scene_of(TARGET, MEMBERS, tmp_path), small)
