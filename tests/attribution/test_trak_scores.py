"""TRAK and its kin against ridge regression, closed forms of a linear denoiser, and retrained models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from linear_denoiser import PROCESS, gradients_by_hand, images, noised, scene_of, target_of
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from torch import Tensor

from lightning_mem.attribution import DTRAK, TRAK, GradientOptions, Queries, ReTrac, TracIn
from lightning_mem.attribution import gradients as gradients_module
from lightning_mem.attribution.features import GradientFeatures
from lightning_mem.attribution.regularisation import GRID, RidgeScores
from lightning_mem.attribution.store import FeatureStore
from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser
from lightning_mem.evaluation import Reference, Scene, Workers
from lightning_mem.randomness import generator

WEIGHTS = torch.randn(4, 4, generator=generator(1, "weights"), dtype=torch.float64) / 3
WHOLE = GradientOptions(num_timesteps=3, dimensions=None, images_at_once=4)


def queries_of(pixels: Tensor, labels: Tensor | None = None) -> Queries:
    return Queries(pixels, "given", torch.arange(len(pixels)), labels)


def stored(rows: np.ndarray, folder: Path) -> FeatureStore:
    store = FeatureStore(folder, {}, *rows.shape, block=4)
    store.fill(lambda places: torch.from_numpy(rows)[places], Workers(), lambda work: work())
    return store


# --- ridge regression ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(30, 5), (6, 9)], ids=["width", "kernel"])
def test_scores_are_rows_of_the_hat_matrix_and_foresee_what_leaving_one_out_does(
    count: int, width: int, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    design = draw.normal(size=(count, width)).astype(np.float32)
    asked = draw.normal(size=(3, width)).astype(np.float32)
    wanted = draw.normal(size=count)
    ridge = RidgeScores(stored(design, tmp_path / "members"))
    amount = 0.7
    lam = amount / (np.square(design.astype(float)).sum() / count)  # in units of the mean squared norm
    found = ridge.scores(stored(asked, tmp_path / "queries"), lam).numpy()
    hat = asked @ np.linalg.inv(design.T.astype(float) @ design + amount * np.eye(width)) @ design.T
    np.testing.assert_allclose(found, hat, atol=1e-5)

    own = np.diag(ridge.scores(ridge.members, lam).numpy())

    def trained(rows: list[int]) -> np.ndarray:
        return Ridge(alpha=amount, fit_intercept=False).fit(design[rows].astype(float), wanted[rows]).coef_

    whole = trained(list(range(count)))
    for left_out in range(count):
        change = asked @ (whole - trained([row for row in range(count) if row != left_out]))
        residual = wanted[left_out] - design[left_out] @ whole
        np.testing.assert_allclose(found[:, left_out] * residual / (1 - own[left_out]), change, atol=1e-5)


def test_little_regularisation_interpolates_and_much_leaves_the_plain_products(tmp_path: Path) -> None:
    design = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    ridge = RidgeScores(stored(design, tmp_path))
    little, much = ridge.scores_by_lam(ridge.members, [1e-9, 1e9])
    np.testing.assert_allclose(little.numpy(), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(much.numpy() * 1e9 * ridge.scale, design @ design.T.astype(float), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("count", "width"), [(12, 5), (4, 9)], ids=["width", "kernel"])
def test_the_prediction_error_is_that_of_generalised_cross_validation(count: int, width: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    design, asked = (draw.normal(size=(rows, width)).astype(np.float32).astype(float) for rows in (count, 3))
    ridge = RidgeScores(stored(design, tmp_path / "members"))
    found = ridge.prediction_errors(stored(asked, tmp_path / "queries"), [0.01, 1.0])
    for error, lam in zip(found.tolist(), (0.01, 1.0), strict=True):
        shift = lam * np.square(design).sum() / count
        hat = design.T @ np.linalg.inv(design @ design.T + shift * np.eye(count)) @ design
        left = np.square(asked - asked @ hat).sum() / np.square(asked).sum()
        assert error == pytest.approx(left / (1 - np.trace(hat) / width) ** 2, rel=1e-9)


def test_the_chosen_lam_nearly_foresees_best_what_new_directions_hold(tmp_path: Path) -> None:
    """Queries are sums of training features and noise: the truth is known in as many directions again."""
    draw = np.random.default_rng(3)
    design = draw.normal(size=(40, 128))
    asked = draw.normal(size=(20, 40)) @ design / 8 + draw.normal(size=(20, 128))
    ridge = RidgeScores(stored(design[:, :64].astype(np.float32), tmp_path / "members"))
    queries = stored(asked[:, :64].astype(np.float32), tmp_path / "queries")
    weights = ridge.scores_by_lam(queries, GRID).numpy()
    errors = dict(zip(GRID, np.square(asked[:, 64:] - weights @ design[:, 64:]).sum((1, 2)), strict=True))
    chosen = ridge.choose(queries)
    assert errors[chosen] < 1.05 * min(errors.values())
    assert errors[chosen] < 0.9 * min(errors[GRID[0]], errors[GRID[-1]])


# --- end to end, on a linear denoiser ------------------------------------------------------------------------------


def test_each_method_has_its_closed_form_on_a_linear_denoiser(tmp_path: Path) -> None:
    members, asked = images(10, 1), images(3, 2)
    scene = scene_of(target_of(WEIGHTS), members, tmp_path)
    times = [16, 50, 83]

    def expected(loss: bool, unit: bool, lam: float | None) -> np.ndarray:
        rows, own = (gradients_by_hand(WEIGHTS, pixels, times, loss, unit) for pixels in (members, asked))
        kernel = rows @ rows.T
        if lam is None:
            return own @ rows.T
        return own @ rows.T @ np.linalg.inv(kernel + lam * np.trace(kernel) / 10 * np.eye(10))

    for method, truth in (
        (TRAK(0.1, WHOLE), expected(True, False, 0.1)),
        (DTRAK(0.1, WHOLE), expected(False, False, 0.1)),
        (TracIn("target", WHOLE), expected(True, False, None)),
        (ReTrac("target", WHOLE), expected(True, True, None)),
    ):
        found = method.scores(scene, queries_of(asked))
        assert found.shape == (3, 10)
        np.testing.assert_allclose(found.numpy(), truth, rtol=1e-5, atol=1e-5 * abs(truth).max(), err_msg=method.name)
        assert method.cost()["gradients"] == 13 * 3
        assert method.cost()["bytes"] > 13 * 16 * 4


def _trained(x_t: np.ndarray, eps: np.ndarray, decay: float) -> np.ndarray:
    """The matrix that minimises the mean squared error over images, timesteps and draws, plus decay."""
    shown, wanted = (side.reshape(-1, side.shape[-1]) for side in (x_t, eps))
    return np.linalg.solve(shown.T @ shown + decay * np.eye(shown.shape[1]), shown.T @ wanted).T


def test_an_image_that_lowers_a_querys_loss_when_trained_on_has_a_positive_score(tmp_path: Path) -> None:
    """Every image is left out in turn and the denoiser trained again, exactly."""
    members, asked = images(12, 3), images(40, 4)
    times = [25, 75]
    x_t, eps = noised(members, times)
    asked_x_t, asked_eps = noised(asked, times)

    def loss(weights: np.ndarray) -> np.ndarray:
        return np.square(asked_x_t @ weights.T - asked_eps).mean((1, 2, 3))

    whole = _trained(x_t, eps, 0.1)
    without = [_trained(*(np.delete(side, row, 0) for side in (x_t, eps)), 0.1) for row in range(12)]
    helps = np.stack([loss(own) - loss(whole) for own in without], 1)
    scene = scene_of(target_of(torch.from_numpy(whole)), members, tmp_path)
    options = GradientOptions(num_timesteps=2, dimensions=None)
    for method in (TRAK(0.1, options), TracIn("target", options), ReTrac("target", options)):
        found = method.scores(scene, queries_of(asked)).numpy()
        agreement = np.mean([spearmanr(own, truth).statistic for own, truth in zip(found, helps, strict=True)])
        assert agreement > 0.4, method.name


def test_a_duplicate_gets_the_same_score_and_an_image_is_nearest_to_itself(tmp_path: Path) -> None:
    members = images(8, 5)
    members[6] = members[1]
    scene = scene_of(target_of(WEIGHTS), members, tmp_path)
    for method in (TRAK(0.1), DTRAK(0.1), TracIn("target"), ReTrac("target")):
        found = method.scores(scene, queries_of(members[:4]))
        torch.testing.assert_close(found[:, 6], found[:, 1], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(found[:, 1], found[:, 2])
    own = ReTrac("target", GradientOptions(num_timesteps=1, dimensions=None)).scores(scene, queries_of(members[:4]))
    assert own.argmax(1).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(own.max(1).values, torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_gradient_a_hundred_times_as_long_moves_tracin_and_not_retrac(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, asked = images(6, 6), queries_of(images(3, 7))
    target, loud = target_of(WEIGHTS), members[2].float() / 127.5 - 1

    def scaled(out: Tensor, x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, process: DiffusionProcess) -> Tensor:
        factor = torch.where((x0[0] - loud).abs().max() < 1e-6, 100.0, 1.0)
        return factor * gradients_module.loss_output(out, x_t, x0, eps, t, process)

    def both(folder: Path) -> tuple[Tensor, Tensor]:
        scene = scene_of(target, members, folder)
        tracin, retrac = (method("target", WHOLE).scores(scene, asked) for method in (TracIn, ReTrac))
        return tracin, retrac

    tracin, retrac = both(tmp_path / "plain")
    monkeypatch.setitem(gradients_module.OUTPUTS, "loss", scaled)  # type: ignore[arg-type]
    loud_tracin, loud_retrac = both(tmp_path / "scaled")
    torch.testing.assert_close(loud_retrac, retrac, rtol=1e-6, atol=1e-6)
    factors = torch.ones(6, dtype=torch.float64)
    factors[2] = 100
    torch.testing.assert_close(loud_tracin, tracin * factors, rtol=1e-5, atol=1e-5)


# --- projection, processes, orientations, labels --------------------------------------------------------------------


def test_projected_scores_come_near_those_of_whole_gradients(tmp_path: Path) -> None:
    target = target_of(torch.randn(64, 64, generator=generator(2, "w")) / 8, (1, 8, 8))
    members, asked = images(10, 8, side=8), queries_of(images(5, 9, side=8))
    scene = scene_of(target, members, tmp_path)
    exact, near, far = (
        TracIn("target", GradientOptions(num_timesteps=2, dimensions=size)).scores(scene, asked)
        for size in (None, 1024, 32)
    )
    errors = [float((found - exact).norm() / exact.norm()) for found in (near, far)]
    assert errors[0] < 0.15
    assert errors[1] > 2 * errors[0]


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    """The second process works until results are gathered, then the first; no block is computed by both."""
    members, asked = images(9, 10), queries_of(images(5, 11))
    options = GradientOptions(2, dimensions=8, images_at_once=2)
    target = target_of(WEIGHTS)
    alone = TRAK(0.1, options).scores(scene_of(target, members, tmp_path / "one"), asked)

    class Gathered(Exception):
        pass

    def leave(rows: Tensor) -> Tensor:
        raise Gathered

    second = scene_of(target, members, tmp_path / "two", workers=Workers(1, 2, leave))
    features = GradientFeatures(second, target, options)
    for fill in (features.of_members, lambda: features.of_queries(asked)):
        with pytest.raises(Gathered):
            fill()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "two").rglob("*.npy")}
    # an odd number of blocks: the second process does the first one too
    assert sorted(file.name for file in before) == sorted(f"0000000{n}.npy" for n in (0, 1, 3, 0, 1))
    workers = Workers(0, 2, lambda rows: torch.stack([rows, rows]))
    first = scene_of(target, members, tmp_path / "two", workers=workers)
    assert torch.equal(TRAK(0.1, options).scores(first, asked), alone)
    assert before == {file: file.stat().st_mtime_ns for file in before}
    one, two = (sorted((tmp_path / name).rglob("*.npy")) for name in ("one", "two"))
    assert len(one) == 8
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_a_store_is_shared_by_runs_of_one_model_only(tmp_path: Path) -> None:
    members, asked = images(5, 10), queries_of(images(2, 11))
    options = GradientOptions(2, dimensions=8, store=str(tmp_path / "shared"))
    first = TRAK(0.1, options).scores(scene_of(target_of(WEIGHTS), members, tmp_path / "a"), asked)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "shared").rglob("*.npy")}
    assert torch.equal(TRAK(0.1, options).scores(scene_of(target_of(WEIGHTS), members, tmp_path / "b"), asked), first)
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "shared").rglob("*.npy")}
    assert len(times) == 2
    for target, pixels, what in (
        (target_of(WEIGHTS, digest="another"), members, r"target 'linear' \(here 'another'\)"),
        (target_of(WEIGHTS), images(5, 12), "images '"),
    ):
        with pytest.raises(ValueError, match=f"other features: {what}"):
            TRAK(0.1, options).scores(scene_of(target, pixels, tmp_path / "c"), asked)


def test_where_training_flips_both_orientations_are_one_image(tmp_path: Path) -> None:
    members, asked = images(5, 12), images(2, 13)
    rows = torch.arange(5)
    both = Reference(torch.cat([members, members.flip(-1)]), members[:0], torch.cat([rows, rows]), rows, mirror=True)
    target = target_of(WEIGHTS)
    scene = Scene(target, tmp_path, tmp_path / "flips", lambda *a, **k: None, lambda: both)  # type: ignore[arg-type,return-value]
    found = TracIn("target", WHOLE).scores(scene, queries_of(asked)).numpy()
    plain, turned = (gradients_by_hand(WEIGHTS, p, [16, 50, 83], True, False) for p in (members, members.flip(-1)))
    own = gradients_by_hand(WEIGHTS, asked, [16, 50, 83], True, False)
    np.testing.assert_allclose(found, own @ (plain + turned).T / 2, rtol=1e-4, atol=1e-5)


def test_class_conditional_targets_need_labels_on_both_sides(tmp_path: Path) -> None:
    target = target_of(torch.stack([WEIGHTS, -WEIGHTS]))
    members = images(4, 14)
    rows, labels = torch.arange(4), torch.tensor([0, 1, 1, 0])
    known = Reference(members, members[:0], rows, rows, labels=(labels, labels[:0]))
    scene = Scene(target, tmp_path, tmp_path / "labels", lambda *a, **k: None, lambda: known)  # type: ignore[arg-type,return-value]
    found = TracIn("target", WHOLE).scores(scene, queries_of(images(2, 15), torch.tensor([1, 0])))
    # gradients of different classes lie in different matrices
    assert (found != 0).tolist() == [[False, True, True, False], [True, False, False, True]]
    with pytest.raises(ValueError, match=r"conditioned on 2 classes.*labels of the queries"):
        TracIn("target", WHOLE).scores(scene, queries_of(images(2, 15)))


# --- lam and what is refused ------------------------------------------------------------------------------------


def test_lam_is_chosen_on_heldout_images_and_scores_by_lam_are_those_of_each(tmp_path: Path) -> None:
    members, heldout, asked = images(10, 16), images(6, 17), queries_of(images(3, 18))
    scene = scene_of(target_of(WEIGHTS), members, tmp_path, heldout)
    method = TRAK(gradients=WHOLE)
    found = method.scores(scene, asked)
    by_lam = method.scores_by_lam(scene, asked)
    assert method.chosen in GRID
    assert torch.equal(by_lam[method.chosen], found)
    assert torch.equal(TRAK(method.chosen, WHOLE).scores(scene, asked), found)
    # other queries choose no other lam
    again = TRAK(gradients=WHOLE)
    again.scores(scene, queries_of(images(3, 19)))
    assert again.chosen == method.chosen
    for folder, rest in (("none", heldout[:0]), ("asked", asked.images)):
        with pytest.raises(ValueError, match="held-out images that are no queries, and there are none: give lam"):
            TRAK(gradients=WHOLE).scores(scene_of(target_of(WEIGHTS), members, tmp_path / folder, rest), asked)
    # queries among the held-out images are not looked at: the others alone choose
    some = [TRAK(gradients=WHOLE) for _ in range(2)]
    for folder, rest, one in (("mixed", torch.cat([asked.images, heldout]), some[0]), ("apart", heldout, some[1])):
        one.scores(scene_of(target_of(WEIGHTS), members, tmp_path / folder, rest), asked)
    kept = [sorted(path.name for path in (tmp_path / name).rglob("heldout-*")) for name in ("mixed", "apart")]
    assert kept[0] == kept[1] != []
    assert some[0].chosen == some[1].chosen


def test_identity_follows_what_decides_scores_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    target = target_of(WEIGHTS)
    methods = (
        TRAK(), TRAK(0.1), DTRAK(), TracIn("target"), ReTrac("target"), TRAK(gradients=GradientOptions(seed=1)),
        TRAK(gradients=GradientOptions(shared_noise=False)),
    )  # fmt: skip
    found = [method.identity(target, "", tmp_path) for method in methods]
    assert len(set(found)) == len(methods)
    assert TRAK(gradients=GradientOptions(store="x")).identity(target, "", tmp_path) == found[0]
    closed = EmpiricalDenoiser(images(3, 0), PROCESS).target()
    for method in methods:
        with pytest.raises(ValueError, match="need a target with a network"):
            method.identity(closed, "", tmp_path)
    with pytest.raises(ValueError, match=r"num_timesteps must lie in \[1, 100\]"):
        TRAK(gradients=GradientOptions(101)).identity(target, "", tmp_path)
    with pytest.raises(ValueError, match="lam must be positive, got 0"):
        TRAK(0.0)
    with pytest.raises(ValueError, match="dimensions must be at least 1, and a power of two"):
        GradientOptions(dimensions=1000)
    with pytest.raises(ValueError, match="checkpoints must be all or target, got 'last'"):
        TracIn("last")  # type: ignore[arg-type]
    scene = scene_of(target, images(4, 1), tmp_path)
    with pytest.raises(ValueError, match=r"queries are \(1, 3, 3\)"):
        TRAK(0.1).scores(scene, queries_of(images(2, 0, side=3)))
