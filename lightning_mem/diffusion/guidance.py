"""Classifier guidance as a score term: lambda(t) grad log p(c | x_t), each sample with a class of its own."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_mem.diffusion.process import DiffusionProcess
from lightning_mem.diffusion.sampling import ScoreTerm, evaluation_mode, network_of
from lightning_mem.records import digest

ScaleSchedule = Literal["constant", "linear", "sqrt_one_minus_alpha_bar", "sqrt_alpha_bar"]
"""How lambda runs over the training timesteps t; the largest value of each is ``scale``."""

# Of alpha_bar [T]; divided by their maximum.
_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda alpha_bar: torch.arange(len(alpha_bar), dtype=alpha_bar.dtype),
    "sqrt_one_minus_alpha_bar": lambda alpha_bar: (1 - alpha_bar).sqrt(),
    "sqrt_alpha_bar": torch.sqrt,
}


GUIDED_CLIP = "x0 and eps"
"""What a sampler that clips x0 clips in guided steps; part of what a guided sample is."""


class Classifier(Protocol):
    """A callable ``(x_t [B, C, H, W], t int64 [B]) -> logits [B, num_classes]`` in the denoiser's space.

    ``t`` are *training* timesteps; logits may carry any constant per row, and are differentiable in x_t. The network
    behind it, where there is one, is its attribute ``module`` or itself. ``process`` is the noising process it was
    made for, ``digest`` its identity.
    """

    num_classes: int

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits at training timestep t."""


def identity_of(classifier: Classifier) -> str:
    """The digest of a classifier, for the settings of what it was used on.

    Raises:
        ValueError: If it has none.
    """
    identity = getattr(classifier, "digest", None)
    if not identity:
        raise ValueError("the classifier has no digest, so its samples could not be told apart: give it one")
    return str(identity)


def process_of(classifier: Classifier, process: DiffusionProcess | None = None) -> DiffusionProcess:
    """The target's noising process, checked to be the classifier's; null takes the classifier's own.

    Raises:
        ValueError: If neither is known, or they differ (by digest).
    """
    own: DiffusionProcess | None = getattr(classifier, "process", None)
    process = process or own
    if process is None:
        raise ValueError("the classifier does not say its noising process: pass process=, that of the target")
    if own is not None and not torch.equal(own.alpha_bar, process.alpha_bar):
        raise ValueError(
            f"the classifier belongs to another noising process ({len(own.alpha_bar)} timesteps, digest "
            f"{digest(own.alpha_bar)}) than the target ({len(process.alpha_bar)}, {digest(process.alpha_bar)}): "
            "train a classifier for this target"
        )
    return process


@contextmanager
def frozen(classifier: Classifier) -> Iterator[None]:
    """The classifier in evaluation mode, its parameters out of the graph; back as it was afterwards."""
    module = network_of(classifier)
    trainable = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    with evaluation_mode(classifier):
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


def classifier_gradient(classifier: Classifier, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    r"""The gradient :math:`\nabla_{x_t} \log p(c \mid x_t)`, also inside ``no_grad`` and ``inference_mode``.

    Computed in at least float32 whatever precision runs around it, with the classifier frozen and in evaluation mode.

    Args:
        classifier: See :class:`Classifier`.
        x_t: [B, C, H, W].
        t: int64 [B], training timesteps.
        labels: int64 [B], the class c of each row.

    Raises:
        ValueError: If the logits are not [B, num_classes], or do not depend on x_t in a way autograd knows.
    """
    # inference mode is left, not only gradients switched on; its tensors cannot enter a graph, their copies can
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x_t.device.type, enabled=False):
        x = x_t.detach().clone().to(torch.promote_types(x_t.dtype, torch.float32)).requires_grad_()
        with frozen(classifier):
            logits = classifier(x, t.clone())
            if logits.shape != (len(x), classifier.num_classes):
                raise ValueError(
                    f"the classifier must return logits [{len(x)}, {classifier.num_classes}], got {list(logits.shape)}"
                )
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
            own = log_p.gather(1, labels.clone()[:, None]).sum()
            gradient = torch.autograd.grad(own, x, allow_unused=True)[0] if own.requires_grad else None
    if gradient is None:
        raise ValueError("the classifier's logits carry no gradient to x_t: remove no_grad or detach from its call")
    return gradient


class ClassifierGuidance:
    r"""Draws every sample towards a class of its own.

    .. math:: s_\theta(x_t, t) + \lambda(t)\,\nabla_{x_t} \log p(c \mid x_t), \qquad
        \lambda(t) = \lambda\,\frac{w(t)}{\max_t w(t)}

    with w = 1 (``constant``), t (``linear``: falls with the noise), :math:`\sqrt{1-\bar\alpha_t}`
    (``sqrt_one_minus_alpha_bar``: falls with the noise) or :math:`\sqrt{\bar\alpha_t}` (``sqrt_alpha_bar``: grows as
    the noise falls). Lambda = 1 is Bayes' rule: an exact score and an exact classifier give the conditional law.

    Where lambda(t) is 0 (``scale`` 0, outside the interval) nothing is added and the classifier is not called.

    Args:
        classifier: See :class:`Classifier`; on the device of what it guides.
        labels: int64 [N] in [0, num_classes); row i is the class of the sample at ``addresses[i]``.
        scale: Lambda, the factor of the score; any finite number, 0 for none.
        addresses: int64 [N], each once; null for 0 .. N-1.
        interval: Training timesteps [low, high) with guidance, 0 <= low < high <= T; null for all.
        schedule: How lambda runs over t.
        process: The target's noising process; null for the classifier's own.

    Raises:
        ValueError: If a number is out of range, the process is unknown or not the classifier's, an address occurs
            twice, or (when called) an address has no label.

    Source:
        Dhariwal and Nichol, arXiv:2105.05233, algorithm 2; lambda on the score: SIDE, arXiv:2410.02467v7, algorithm 1;
        interval: Kynkäänniemi et al., arXiv:2404.07724; schedules: Wang et al., arXiv:2404.13040.
    """

    def __init__(
        self,
        classifier: Classifier,
        labels: Tensor,
        scale: float = 1.0,
        *,
        addresses: Tensor | None = None,
        interval: tuple[int, int] | None = None,
        schedule: ScaleSchedule = "constant",
        process: DiffusionProcess | None = None,
    ) -> None:
        process = process_of(classifier, process)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        if schedule not in _WEIGHTS:
            raise ValueError(f"schedule must be one of {sorted(_WEIGHTS)}, got {schedule!r}")
        low, high = process.checked_interval(interval)
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers [N], got {labels.dtype} {tuple(labels.shape)}")
        if len(labels) and not (labels.min() >= 0 and labels.max() < classifier.num_classes):
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"labels must lie in [0, {classifier.num_classes}), got {found}")
        addresses = torch.arange(len(labels)) if addresses is None else addresses.cpu().to(torch.int64)
        if addresses.shape != labels.shape:
            raise ValueError(f"addresses must have one entry per label ({len(labels)}), got {tuple(addresses.shape)}")
        self.addresses, order = addresses.sort()
        if (self.addresses[1:] == self.addresses[:-1]).any():
            raise ValueError("an address occurs twice: each sample has one label")
        self.labels = labels.cpu().to(torch.int64)[order]
        self.classifier, self.scale, self.interval, self.schedule = classifier, float(scale), (low, high), schedule
        weight = _WEIGHTS[schedule](process.alpha_bar)
        self.scales = scale * weight / weight.max()
        self.scales[:low] = 0
        self.scales[high:] = 0
        self.evaluations = 0

    @property
    def module(self) -> torch.nn.Module | None:
        """The classifier's network, so that whoever draws can move it; None for a closed form."""
        return network_of(self.classifier)

    @property
    def settings(self) -> dict[str, Any]:
        """What identifies the guidance, flat, for the settings of a SampleSet.

        Raises:
            ValueError: If the classifier has no ``digest``.
        """
        return {
            "guidance": "classifier",
            "guidance_classifier": identity_of(self.classifier),
            "guidance_scale": self.scale,
            "guidance_schedule": self.schedule,
            "guidance_low": self.interval[0],
            "guidance_high": self.interval[1],
            "guidance_labels": digest(self.addresses, self.labels),
        }

    def labels_of(self, addresses: Tensor) -> Tensor:
        """The classes of the samples at these addresses, int64 [B] on the CPU."""
        wanted = addresses.cpu()
        place = torch.searchsorted(self.addresses, wanted).clamp(max=max(len(self.addresses) - 1, 0))
        known = self.addresses[place] == wanted if len(self.addresses) else torch.zeros_like(wanted, dtype=torch.bool)
        if not known.all():
            span = f"{int(self.addresses[0])} to {int(self.addresses[-1])}" if len(self.addresses) else "none"
            raise ValueError(
                f"the guidance has no label for the addresses {wanted[~known].unique().tolist()[:10]}; it has "
                f"{len(self.addresses)} addresses ({span}): pass one label and address per sample"
            )
        return self.labels[place]

    def evaluations_per_sample(self, timesteps: Tensor) -> int:
        """How often the classifier is called for one sample that visits these training timesteps."""
        return int(self.scales[timesteps.cpu().long()].count_nonzero())

    def __call__(self, x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor | None:
        """lambda(t) grad log p(c | x_t); None where lambda is 0 in every row.

        Adds to ``evaluations`` the rows on which the classifier ran, without those that pad a block by repeating an
        address.
        """
        scales = self.scales[t.cpu()]
        rows = scales.nonzero().flatten()
        if len(rows) == 0:
            return None
        labels, own = self.labels_of(addresses)[rows], rows.to(x_t.device)
        gradient = classifier_gradient(self.classifier, x_t[own], t[own], labels.to(x_t.device))
        self.evaluations += len(addresses.cpu()[rows].unique())
        term = torch.zeros_like(x_t, dtype=gradient.dtype)
        term[own] = scales[rows].to(gradient).reshape(-1, *[1] * (x_t.ndim - 1)) * gradient
        return term


def gate_rates(guidance: Sequence[ScoreTerm], addresses: Tensor) -> Tensor | None:
    """How often protections acted on samples that this process drew last, the largest over the terms; float64 [N].

    None where no term tells: one that does has ``gate_rate``, the share of its steps, as :class:`CPSample`.
    """
    found = [tell(addresses) for term in guidance if (tell := getattr(term, "gate_rate", None)) is not None]
    return torch.stack(found).amax(0) if found else None


def guidance_settings(guidance: Sequence[ScoreTerm]) -> dict[str, Any]:
    """The ``settings`` of all score terms in one flat mapping; a key that came before gets the term's number.

    Raises:
        ValueError: If a term does not say its settings: its samples could not be told from unguided ones.
    """
    merged: dict[str, Any] = {}
    for number, term in enumerate(guidance, start=1):
        settings = getattr(term, "settings", None)
        if settings is None:
            raise ValueError(f"the score term {term!r} needs a mapping `settings` that says what was added")
        merged["guidance_clip"] = GUIDED_CLIP
        merged |= {f"{key}_{number}" if key in merged else key: value for key, value in settings.items()}
    return merged
