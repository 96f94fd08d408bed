"""How many different training images N samples extract: the concave law, fitted to counts of some of the samples."""

import torch
from torch import Tensor


def expected_unique(counts: Tensor, draws: int, at: Tensor) -> Tensor:
    r"""Expected number of different images that N independent samples hit, from the hits of n of them.

    .. math:: E[U(N)] = \sum_i 1 - (1 - p_i)^N

    For N up to n this is estimated without bias from the counts c_i (the mean over all subsets of N samples),

    .. math:: \hat U(N) = \sum_i 1 - \binom{n - c_i}{N} \Big/ \binom{n}{N}

    and beyond by giving the f_0 images that were not hit yet one probability each,

    .. math:: \hat U(n + m) = U(n) + \hat f_0 \left[1 - \left(1 - \frac{f_1}{n \hat f_0 + f_1}\right)^m\right], \qquad
        \hat f_0 = \frac{n - 1}{n}\,\frac{f_1^2}{2 f_2}

    with f_k the number of images that were hit k times (f_1 (f_1 - 1) / 2 in place of the last fraction where f_2 = 0).
    Putting c_i / n for p_i would leave out the images that were not hit yet.

    Args:
        counts: Integers [M] >= 0: how often each image was hit; images that were not hit may be left out.
        draws: n, the number of samples, at least the number of hits of any image.
        at: Integers [...] >= 0, the N that are asked for.

    Returns:
        float64, in the shape of ``at``; concave in N.

    Raises:
        ValueError: If an image was hit more often than samples were drawn, or a number is negative.

    Undefined when:
        N is far above 2 n (what lies there is not in the counts), or the samples are not independent.

    Source:
        The law: Carlini et al., arXiv:2301.13188, and SIDE, arXiv:2410.02467v7, figure 5; its estimate: Chao et al.,
        Rarefaction and extrapolation with Hill numbers, Ecological Monographs 84 (2014), table 1, q = 0.
    """
    counts = counts[counts != 0].double()
    if draws < 1 or (len(counts) and not (counts.min() > 0 and counts.max() <= draws)) or (at < 0).any():
        raise ValueError(f"counts must lie in 0 .. draws = {draws} with draws >= 1, and at must not be negative")
    n, wanted = float(draws), at.double()
    inside, beyond = wanted.clamp(max=n), (wanted - n).clamp(min=0)

    def log_choose(above: Tensor, below: Tensor) -> Tensor:
        return torch.lgamma(above + 1) - torch.lgamma(below + 1) - torch.lgamma((above - below).clamp(min=0) + 1)

    left = n - counts
    log_miss = log_choose(left, inside[..., None]) - log_choose(torch.tensor(n).double(), inside)[..., None]
    miss = torch.where(left >= inside[..., None], log_miss.exp(), 0.0)
    once, twice = float((counts == 1).sum()), float((counts == 2).sum())
    unseen = (n - 1) / n * (once**2 / (2 * twice) if twice else once * (once - 1) / 2)
    grown = torch.zeros_like(wanted)
    if unseen > 0:
        grown = unseen * (1 - (1 - once / (n * unseen + once)) ** beyond)
    return (1 - miss).sum(-1) + grown
