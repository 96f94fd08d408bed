"""What counterfactuals tell in numbers: who is found first, how far samples move, and how much the ensemble copies."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_mem.attribution.counterfactual import (
    Landscape,
    Score,
    at_convention,
    false_attribution_rate,
    geometric_mean,
)
from lightning_mem.attribution.ensemble import Ensemble
from lightning_mem.evaluation import Number, Workers, draw_samples
from lightning_mem.evaluation.numbers import WILSON, absent, share
from lightning_mem.metrics import (
    bootstrap_interval,
    duplicate_groups,
    memorized,
    nearest_neighbors,
    wilson_interval,
)

FIVE = 5
"""Places that ``source_first_five`` looks at."""


def source_numbers(found: Landscape, about: Mapping[str, Any]) -> list[Number]:
    """How often the nearest unit is put first, or among the first five, and its median rank, by either score.

    Args:
        found: Of all samples that are told about; none is left out.
        about: What the definitions say besides.
    """
    numbers, units = [], found.displacement.shape[1]
    for score in get_args(Score):
        ranks = found.source_rank(score)
        said = {**about, "score": score, "queries": "ensemble", "source": "nearest unit"}
        for what, places in (("source_first", 1), ("source_first_five", FIVE)):
            hits = int((ranks <= places).sum())
            numbers.append(share(what, hits, len(ranks), {**said, "chance": min(1.0, places / units)}))
        middle = float(ranks.double().quantile(0.5))
        numbers.append(Number("source_rank", middle, len(ranks), {**said, "median": True}, None, "rank"))
    return numbers


def radius_numbers(found: Landscape, about: Mapping[str, Any]) -> list[Number]:
    """The counterfactual radius, natively and at 256 x 256 x 3, the samples without one, and false attributions.

    Args:
        found: Of all samples.
        about: What the definitions say besides.
    """
    n, shape = len(found), found.factual.shape[1:]
    radii = found.radius
    mean, zeros = geometric_mean(radii)
    numbers = [share("radius_zero", zeros, n, dict(about))]
    method = {"mean": "geometric, over radii above 0", "distance": "l2", "interval": "bootstrap 95%"}
    for name, scale in (("radius", 1.0), ("radius_256", at_convention(1.0, shape))):
        said = {**about, **method, "pixels": "[0, 1]", "image": "native" if name == "radius" else "256 x 256 x 3"}
        positive = radii[radii > 0]
        if mean is None or len(positive) < 2:
            numbers.append(absent(name, "fewer than two samples have a radius above 0", said, "l2"))
            continue
        low, high = bootstrap_interval(lambda rows: rows.log().mean().exp(), positive)
        numbers.append(Number(name, scale * mean, len(positive), said, (scale * low, scale * high), "l2"))
    own, others = found.false_attribution()
    kept, control = int(own.sum()), float(others.mean())
    said = {**about, "attributed_to": "nearest unit", "control": "every other unit left out"}
    numbers.append(share("still_nearest", kept, n, said))
    numbers.append(Number("still_nearest_control", control, n, said))
    if control == 0:
        numbers.append(absent("false_attribution_rate", "no attribution stands without another unit", said))
        return numbers
    ends = wilson_interval(kept, n)
    said = {**said, "interval": f"{WILSON} of the share, over the control"}
    rate = false_attribution_rate(kept / n, control)
    numbers.append(Number("false_attribution_rate", rate, n, said, (ends[0] / control, ends[1] / control), "ratio"))
    return numbers


def agreement_numbers(exact: Landscape, first_order: Landscape, about: Mapping[str, Any]) -> list[Number]:
    """How well first-order influence foresees leaving out: rank correlation over units, and whether both agree on top.

    Args:
        exact: By leaving out.
        first_order: Of the same samples.
        about: What the definitions say besides.
    """
    from scipy.stats import rankdata  # half a second to import; needed nowhere else

    numbers = []
    for score in get_args(Score):
        ranks = [torch.from_numpy(rankdata(one.scores(score).numpy(), axis=1)) for one in (exact, first_order)]
        a, b = (rank - rank.mean(1, keepdim=True) for rank in ranks)
        length = (a.square().sum(1) * b.square().sum(1)).sqrt()
        defined = length > 0
        said = {**about, "score": score, "queries": "ensemble"}
        top = exact.scores(score).argmax(1) == first_order.scores(score).argmax(1)
        numbers.append(share("first_order_top", int(top.sum()), len(top), said))
        if int(defined.sum()) < 2:
            numbers.append(absent("first_order_correlation", "scores are constant over units", said, "correlation"))
            continue
        found = ((a * b).sum(1)[defined] / length[defined]).clone()
        ends = bootstrap_interval(lambda rows: rows.mean(), found)
        said = {**said, "correlation": "spearman over units, mean over samples", "interval": "bootstrap 95%"}
        numbers.append(Number("first_order_correlation", float(found.mean()), len(found), said, ends, "correlation"))
    return numbers


def copy_numbers(
    ensemble: Ensemble,
    images: Tensor,
    unit_of: Tensor,
    num_samples: int,
    about: Mapping[str, Any],
    *,
    threshold: float = 1 / 3,
    workers: Workers | None = None,
    **drawing: Any,
) -> list[Number]:
    """The memorization ratio of the whole ensemble, and of its members, against all images and against their own.

    Args:
        ensemble: Unconditional, or conditional.
        images: uint8 [N, C, H, W].
        unit_of: int64 [N], the unit of each.
        num_samples: Of the ensemble, and of each member; from the same noise.
        about: What the definitions say besides.
        threshold: Of the 1/3 rule.
        workers: How blocks are dealt out.
        drawing: As for :func:`lightning_mem.evaluation.draw_samples`.
    """

    def copies(drawn: Tensor, bank: Tensor) -> int:
        distances, _ = nearest_neighbors(drawn, bank, 2, groups=duplicate_groups(bank))
        return int(memorized(distances, threshold).sum())

    said = {**about, "threshold": threshold}
    whole = draw_samples(ensemble.target(), num_samples, workers=workers, **drawing).images
    numbers = [share("memorization_ratio", copies(whole, images), num_samples, {**said, "of": "ensemble"})]
    own, every, total = 0, 0, num_samples * len(ensemble.members)
    for k, member in enumerate(ensemble.members):
        drawn = draw_samples(member, num_samples, workers=workers, **drawing).images
        own += copies(drawn, images[ensemble.codes.codes[unit_of, k]])
        every += copies(drawn, images)
    numbers.append(share("memorization_ratio", every, total, {**said, "of": "members", "bank": "all images"}))
    numbers.append(share("memorization_ratio", own, total, {**said, "of": "members", "bank": "images it saw"}))
    return numbers
