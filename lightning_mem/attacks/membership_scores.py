"""What membership attacks read from scores: who is told apart, fitted thresholds, curves, and a table of all images."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_mem.attacks.loss_scores import Verdict, halves
from lightning_mem.data.split import image_digest
from lightning_mem.evaluation import Number, Reference
from lightning_mem.metrics import roc, wilson_interval

Sides = tuple[Tensor, Tensor]
"""Of the members and of the held-out images."""

AT_ONCE = 10**6
"""Images that a bootstrap draws at once."""


def told_images(reference: Reference, attack: str) -> Sides:
    """Members and held-out images that are told apart, uint8; each image once where mirror images count too.

    Args:
        reference: Of the run.
        attack: In words, for messages.

    Raises:
        ValueError: If there are fewer than 4 of either, or a held-out image equals a member pixel for pixel: it would
            rightly be called a member, and count as an error.
    """
    members, heldout = reference.members[: len(reference.indices)], reference.heldout
    if reference.mirror:  # the banks hold the mirror images behind the images
        heldout = heldout[: len(heldout) // 2]
    if min(len(members), len(heldout)) < 4:
        raise ValueError(
            f"{attack} needs at least 4 members and 4 held-out images, got {len(members)} and {len(heldout)}: raise "
            "data.num_heldout"
        )
    seen = {image_digest(image) for image in reference.members.numpy()}
    both = [row for row, image in enumerate(heldout.numpy()) if image_digest(image) in seen]
    if both:
        raise ValueError(
            f"{len(both)} of {len(heldout)} held-out images equal a member pixel for pixel (rows {both[:5]} of them): "
            "an image is one or the other; take them out of one side"
        )
    return members, heldout


def source_indices(home: Path, reference: Reference, count: int) -> tuple[list[int], list[int]]:
    """Places in the source of members and of the first ``count`` held-out images, these from ``members.json``.

    Without that file a held-out image is known by its row.
    """
    path, held = home / "members.json", list(range(count))
    if path.is_file():
        held = json.loads(path.read_text())["heldout"]["indices"][:count]
    return reference.indices.tolist(), held


def fitted_accuracy(verdict: Verdict, calibration: Sides) -> Number:
    r"""Balanced accuracy of a threshold that was fitted on other images.

    .. math:: \tfrac12\,(\mathrm{TPR} + 1 - \mathrm{FPR})

    Args:
        verdict: On the images that are tested.
        calibration: Scores of the others, larger = member, float64 [m] and [n]; their best threshold is taken, the
            largest of several.
    """
    known, curve = roc(*calibration), verdict.curve
    best = int((known.tpr + 1 - known.fpr).argmax())
    threshold = float(known.thresholds[best])
    place = int((curve.thresholds >= threshold).sum()) - 1
    hits, correct = int(curve.true_positives[place]), curve.num_heldout - int(curve.false_positives[place])
    ends = mean_of_shares((hits, curve.num_members), (correct, curve.num_heldout))
    n = curve.num_members + curve.num_heldout
    definition = {**verdict.definition, "threshold": "fitted on the other images", "interval": "wilson, combined"}
    return Number("balanced_accuracy", curve.balanced_accuracy_at(threshold), n, definition, ends)


def mean_of_shares(one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float]:
    """95 % interval of the mean of two independent shares (hits, n), from Wilson's of each.

    Source:
        Newcombe, Statistics in Medicine 17 (1998) 873, method 10 (squares of the half widths add up).
    """
    parts = [(hits / n, *wilson_interval(hits, n)) for hits, n in (one, other)]
    mean = sum(share for share, _, _ in parts) / 2
    below = math.hypot(*(share - low for share, low, _ in parts)) / 2
    above = math.hypot(*(high - share for share, _, high in parts)) / 2
    return max(0.0, mean - below), min(1.0, mean + above)


def calibration_scores(scores: Sides, place: int, sign: int, seed: int) -> Sides:
    """Scores of the images that the calibrated attacker chose on, at its timestep and with its sign.

    Args:
        scores: float64 [m, T] and [n, T], larger = member.
        place: Column of its timestep.
        sign: Of its verdict.
        seed: Of the split.
    """
    rows = (halves(len(side), seed, name)[0] for side, name in zip(scores, ("members", "heldout"), strict=True))
    own, other = (sign * side[part, place] for side, part in zip(scores, rows, strict=True))
    return own, other


def curve_numbers(scores: Sides, times: Sequence[int], curve: Sequence[int]) -> list[Number]:
    """``auc_curve`` at every timestep asked for, larger score = member."""
    found = []
    for t in curve:
        told = roc(*(side[:, times.index(t)] for side in scores))
        definition = {
            "attacker": "fixed", "t": t, "sign": 1, "num_members": told.num_members, "num_heldout": told.num_heldout,
            "interval": "delong",
        }  # fmt: skip
        n = told.num_members + told.num_heldout
        found.append(Number("auc_curve", told.auc, n, definition, told.auc_interval()))
    return found


def paired_gains(
    first: Sides, second: Sides, rates: Sequence[float], draw: torch.Generator, resamples: int = 1000
) -> list[Number]:
    """By how much one score tells better than another on the same images: ``auc_gain`` and ``tpr_gain_at_<rate>``.

    Args:
        first: Scores float64 [m] and [n], larger = member.
        second: Of the other attack, same images in the same order.
        rates: False positive rates, in [0, 1].
        draw: Of the bootstrap, which draws m members and n held-out images again, both scores of an image together.
        resamples: How many, at least 20.

    Returns:
        Numbers in [-1, 1], above 0 where ``first`` tells better, with their 95 % intervals.

    Undefined when:
        A rate times the number of held-out images is near 1 or below: the threshold is then the largest held-out score
        or so, which a bootstrap varies too little; or both scores tell all images apart: no draw differs.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), sections 8.3 (two samples) and 13.3
        (percentiles).
    """
    m, n = len(first[0]), len(first[1])
    at_once = max(1, AT_ONCE // (m + n))
    seen, *drawn = (
        torch.stack([_told(side, own, other, rates) for side in (first, second)]).double()
        for own, other in (
            (torch.arange(m)[None], torch.arange(n)[None]),
            *(
                (torch.randint(m, (count, m), generator=draw), torch.randint(n, (count, n), generator=draw))
                for count in (min(at_once, resamples - start) for start in range(0, resamples, at_once))
            ),
        )
    )
    values = (seen[0] - seen[1])[0]
    ends = torch.cat([one - other for one, other in drawn]).quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
    about = {"num_members": m, "num_heldout": n, "interval": "paired bootstrap over images 95%"}
    names = ["auc_gain", *(f"tpr_gain_at_{rate}" for rate in rates)]
    return [
        Number(name, value, n if place else m + n, about, (low, high), "difference")
        for place, (name, value, (low, high)) in enumerate(zip(names, values.tolist(), ends.T.tolist(), strict=True))
    ]


def _told(scores: Sides, own: Tensor, other: Tensor, rates: Sequence[float]) -> Tensor:
    """AUC and true positive rates of drawn rows [R, m] and [R, n], ties as in :class:`lightning_mem.metrics.Roc`."""
    members, heldout = scores[0][own], scores[1][other].sort(1).values
    n = heldout.shape[1]
    below, up_to = (torch.searchsorted(heldout, members, right=right) for right in (False, True))
    found = [(below + up_to).double().mean(1) / (2 * n)]
    for rate in rates:
        allowed = math.floor(rate * n * (1 + 1e-12))
        if allowed >= n:
            found.append(torch.ones(len(members), dtype=torch.float64))
        else:  # above the first held-out score that may not be called a member's
            found.append((members > heldout[:, n - 1 - allowed, None]).double().mean(1))
    return torch.stack(found, 1)


def unresolved(rates: Sequence[float], heldout: int) -> str:
    """Which false positive rates so few held-out images cannot resolve; empty where they resolve all."""
    below = [rate for rate in rates if rate * heldout * (1 + 1e-12) < 1]
    if not below:
        return ""
    words = " and ".join(map(str, below))
    return (
        f"{heldout} held-out images resolve false positive rates from {1 / heldout:.2g} on: at {words} stands the "
        "share of members above all of them"
    )


def image_rows(
    scores: Mapping[str, Sides],
    times: Mapping[str, Sequence[int]],
    indices: tuple[Sequence[int], Sequence[int]],
    ledger: Sequence[Mapping[str, str]] = (),
) -> list[dict[str, str | int]]:
    """One row an image: its place in the source, how often it was copied and how closely, and its scores.

    Args:
        scores: float64 [m, T] and [n, T] by column, larger = member; NaN where an image was not told apart.
        times: The T timesteps of each.
        indices: Of members and held-out images.
        ledger: Rows of the target's step and weights: who was copied.
    """
    copied = {int(row["index"]): row for row in ledger}
    found: list[dict[str, str | int]] = []
    for side, word in enumerate(("members", "heldout")):
        for row, index in enumerate(indices[side]):
            copy: Mapping[str, str] = copied.get(index, {}) if word == "members" else {}
            ledgered = {"copies": copy.get("copies", "0"), "nearest": copy.get("nearest", "")}
            own = {
                f"{column}_t{t}": "" if both[side][row].isnan().any() else f"{float(both[side][row, place]):.9g}"
                for column, both in scores.items()
                for place, t in enumerate(times[column])
            }
            found.append({"set": word, "index": index, **ledgered, **own})
    return found
