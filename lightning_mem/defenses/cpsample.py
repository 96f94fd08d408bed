"""CPSample: steer samples away from where a classifier, overfit on random labels of the members, is certain."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mem.defenses.certificates import Certificates, Watch, unpadded
from lightning_mem.defenses.confidence import Form, certainty_slope, check_tol, confidence
from lightning_mem.diffusion import Codec, DiffusionProcess
from lightning_mem.diffusion.guidance import Classifier, identity_of, process_of
from lightning_mem.diffusion.sampling import network_of


class CPSample:
    r"""A score term that acts where the classifier is more certain than 1 - tol, and lowers its certainty.

    .. math:: \hat s(x_t, t) = s_\theta(x_t, t) - 1[q > 1 - \text{tol}]\; s\, d(x_t, t), \qquad
        \hat\epsilon = \epsilon_\theta + 1[q > 1 - \text{tol}]\; s \sqrt{1 - \bar\alpha_t}\; d

    with q and d as in :mod:`lightning_mem.defenses.confidence`. Both forms of d point the same way; ``attract`` is
    q / (1 - q) times as long, about 1/tol at the gate, so a scale means something for one form and one classifier only.
    ``repel`` vanishes where the classifier is surest: it hardly moves a finished copy.

    The classifier's forward pass runs on every row of a step, its backward pass through gated rows only, and not at all
    where there are none; both in the shape of the whole call, so that rounding does not depend on a row's company.
    Where ``scale`` is 0, outside the interval, or where no row is gated, nothing is added, bit for bit. After a draw
    :meth:`certificates` says for every sample how often the gate opened.

    Args:
        classifier: Overfit on fixed random bits of what is to be protected, for the target's noising process; logits
            [B, 2], or [B, 2 R] where its ``num_labelings`` is R: then it must be certain of all of them.
        tol: Tolerance in (0, 0.5]; smaller acts later and on fewer rows. 0.5 acts always.
        scale: s, the factor of the score; finite and at least 0, 0 for none.
        form: ``attract`` (towards the other label) or ``repel`` (away from the guessed one).
        interval: Training timesteps [low, high) with protection, 0 <= low < high <= T; null for those the classifier
            was trained on, all where it does not say it.
        process: The target's noising process; null for the classifier's own.

    Raises:
        ValueError: If a number is out of range, the classifier has not two classes, or belongs to another process; when
            called, if it works on images of another size.

    Source:
        CPSample, arXiv:2409.07025 (abstract); gate and forms as derived from it, since its body names no sign or form.
    """

    name = "cpsample"

    def __init__(
        self,
        classifier: Classifier,
        tol: float = 0.5,
        scale: float = 1.0,
        form: Form = "attract",
        *,
        interval: tuple[int, int] | None = None,
        process: DiffusionProcess | None = None,
    ) -> None:
        self.gate = check_tol(tol)
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale must be finite and at least 0 (a negative one would draw copies), got {scale}")
        if form not in ("attract", "repel"):
            raise ValueError(f"form must be attract or repel, got {form!r}")
        labelings = getattr(classifier, "num_labelings", 1)
        if classifier.num_classes != 2 * labelings:
            raise ValueError(
                f"CPSample needs a classifier of {labelings} binary labeling(s), got one of {classifier.num_classes} "
                "classes: train one with RandomLabelModule"
            )
        process = process_of(classifier, process)
        low, high = process.checked_interval(getattr(classifier, "interval", None) if interval is None else interval)
        self.classifier, self.tol, self.scale, self.form = classifier, float(tol), float(scale), form
        self.process, self.interval, self.watch = process, (low, high), Watch()
        self.evaluations = self.gradients = 0

    @property
    def module(self) -> torch.nn.Module | None:
        """The classifier's network, so that whoever draws can move it; None for a closed form."""
        return network_of(self.classifier)

    @property
    def settings(self) -> dict[str, Any]:
        """What identifies the protection, flat, for the settings of a SampleSet.

        Raises:
            ValueError: If the classifier has no ``digest``.
        """
        return {
            "protection": self.name,
            "protection_classifier": identity_of(self.classifier),
            "protection_tol": self.tol,
            "protection_scale": self.scale,
            "protection_form": self.form,
            "protection_low": self.interval[0],
            "protection_high": self.interval[1],
        }

    def __call__(self, x_t: Tensor, t: Tensor, addresses: Tensor) -> Tensor | None:
        """-s d on the gated rows, 0 on the others; None where no row is gated."""
        shape = getattr(self.classifier, "shape", None)
        if shape is not None and tuple(x_t.shape[1:]) != tuple(shape):
            raise ValueError(
                f"the classifier works on (channels, height, width) {tuple(shape)}, but the denoiser on "
                f"{tuple(x_t.shape[1:])}: train a random-label classifier for this target"
            )
        steps = t.cpu()
        inside = (steps >= self.interval[0]) & (steps < self.interval[1])
        if self.scale == 0 or not inside.any():
            return None
        within = inside.to(x_t.device)

        def is_gated(logits: Tensor) -> Tensor:
            return (logits.abs().amin(1) > self.gate) & within

        slope, logits = certainty_slope(self.classifier, x_t, t, self.form, is_gated)
        gated = is_gated(logits)
        self._count(steps, addresses, confidence(logits), gated)
        if not gated.any():
            return None
        return torch.where(gated.reshape(-1, *[1] * (x_t.ndim - 1)), -self.scale * slope, 0)

    def _count(self, t: Tensor, addresses: Tensor, q: Tensor, gated: Tensor) -> None:
        """Evaluations, and what each sample went through; rows that pad a block by repeating an address count once."""
        own, gated = addresses.cpu(), gated.cpu()
        first = unpadded(own)
        self.evaluations += int(first.sum())
        self.gradients += int((first & gated).sum())
        self.watch.see(t[first], own[first], q.cpu()[first], gated[first])

    def gate_rate(self, addresses: Tensor) -> Tensor:
        """Share of the steps inside the interval at which the gate was open, float64 [N]; 0 where none was asked."""
        return self.watch.gate_rate(addresses)

    def certificates(
        self,
        addresses: Sequence[int] | Tensor,
        images: Tensor | None = None,
        bank: Tensor | None = None,
        *,
        groups: Tensor | None = None,
        codec: Codec | None = None,
    ) -> Certificates:
        """What can be said for each sample that this term protected, in this process.

        Args:
            addresses: Of the samples.
            images: uint8 [N, C, H, W], the finished samples in the same order, for ``final_confidence``.
            bank: uint8 [M, C, H, W], the members, for ``nearest``; needs images.
            groups: int64 [M], duplicates and mirror images in one group.
            codec: Between pixels and the classifier's space; null for pixels.

        Raises:
            ValueError: If an address was not drawn under this term.
        """
        return self.watch.certificates(
            torch.as_tensor(addresses), self.classifier, images, bank, groups=groups, codec=codec
        )
