"""Protections of any draw, by class_path: each reads what it needs and checks that it belongs to what is drawn from."""

from collections.abc import Sequence

from torch import Tensor

from lightning_mem.defenses.amg import AMG, Search
from lightning_mem.defenses.confidence import Form, check_tol
from lightning_mem.defenses.cpsample import CPSample
from lightning_mem.diffusion import ScoreTerm, Target
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.diffusion.guidance import process_of
from lightning_mem.evaluation import run_data
from lightning_mem.evaluation.inputs import read_stack
from lightning_mem.modules.random_label import LoadedRandomLabel, load_random_label, target_members
from lightning_mem.types import Weights


def load_protector(given: str, weights: Weights, target: Target, path: str) -> LoadedRandomLabel:
    """A trained random-label classifier that protects the members of this target.

    Args:
        given: Its run folder or checkpoint.
        weights: ``ema`` or ``raw``.
        target: What it is to protect.
        path: Where that came from; a diffusers folder does not say its members, which then are not compared.

    Raises:
        ValueError: If it was trained for another image size, schedule or set of members (by digest).
    """
    found = load_random_label(given, weights)
    if tuple(found.shape) != tuple(target.shape):
        raise ValueError(
            f"{given} works on (channels, height, width) {tuple(found.shape)}, but {path} on {tuple(target.shape)}: "
            "train a random-label classifier for this target (model.init_args.target)"
        )
    process_of(found, target.process)
    members = target_members(path)
    if members and found.members_digest != members:
        raise ValueError(
            f"{given} protects the member set {found.members_digest}, but {path} was trained on {members}: train a "
            "random-label classifier on this target's members, or take the other one"
        )
    return found


def training_images(bank: str | None, mirror: bool | None, path: str) -> tuple[Tensor, bool]:
    """The images a sample may be a copy of, uint8 [N, C, H, W], and whether their mirror images count too.

    Args:
        bank: A folder, or ``.npz`` or ``.npy`` with uint8 [N, H, W, C]; null for the target's own members.
        mirror: Null asks the target's run whether it trained with flips; false for a bank that was named.
        path: Where the target came from: a run folder or a checkpoint in one.

    Raises:
        ValueError: If the members are asked for, but there is no run folder, or its images have changed (by digest).
    """
    if bank is not None:
        return read_stack(bank), bool(mirror)
    try:
        data = run_data(path)
    except ValueError as error:
        raise ValueError(f"{error}; or name the training images with bank") from error
    return data.members.images, data.flip if mirror is None else mirror


class CPSampleProtection(AbstractAddition):
    """Samples under CPSample: away from where a classifier that knows the members by heart is certain.

    Args:
        random_label: Run folder or checkpoint of a RandomLabelModule trained on the target's members.
        tol: Tolerance in (0, 0.5]: acts where the confidence exceeds 1 - tol; 0.5 acts always.
        scale: s, the factor of the score; 0 for none. Its meaning depends on form and classifier: calibrate it.
        form: ``attract`` (towards the other label) or ``repel`` (away from the guessed one).
        interval: Training timesteps [low, high) with protection; null for those the classifier was trained on.
        random_label_weights: ``ema`` takes averaged weights where there are any.

    Raises:
        ValueError: If a number is out of range, or the classifier is of another image size, schedule or member set.

    Source:
        CPSample, arXiv:2409.07025.
    """

    def __init__(
        self,
        random_label: str,
        tol: float = 0.5,
        scale: float = 1.0,
        form: Form = "attract",
        interval: tuple[int, int] | None = None,
        random_label_weights: Weights = "ema",
    ) -> None:
        check_tol(tol)
        self.random_label, self.random_label_weights = random_label, random_label_weights
        self.tol, self.scale, self.form, self.interval = tol, scale, form, interval

    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        """The one term; see :class:`AbstractAddition`."""
        classifier = load_protector(self.random_label, self.random_label_weights, target, path)
        return [CPSample(classifier, self.tol, self.scale, self.form, interval=self.interval, process=target.process)]


class AMGProtection(AbstractAddition):
    """Samples under AMG-style guidance: away from the nearest training image where it is nearer than a trigger.

    Args:
        bank: The training images: a folder, or ``.npz`` or ``.npy`` with uint8 [N, H, W, C]; null for the target's own
            members, read from its run folder.
        scale: Factor of the dissimilarity term; 0 for none.
        trigger: Adaptive distance below which a sample is steered away, in (0, 2).
        search: ``x0`` or ``noised``.
        mirror: Whether mirror images count as training images too; null: where the target's run trained with flips.
        seed: Of the noise of the noised search.

    Raises:
        ValueError: If a number is out of range, the images have another size than the target's, or the target's own
            members are asked for and cannot be read or have changed (by digest).

    Source:
        AMG, arXiv:2404.00922.
    """

    def __init__(
        self,
        bank: str | None = None,
        scale: float = 1.0,
        trigger: float = 1.5,
        search: Search = "x0",
        mirror: bool | None = None,
        seed: int = 0,
    ) -> None:
        self.bank, self.scale, self.trigger = bank, scale, trigger
        self.search, self.mirror, self.seed = search, mirror, seed

    def terms(self, target: Target, path: str, addresses: Tensor) -> Sequence[ScoreTerm]:
        """The one term; see :class:`AbstractAddition`."""
        images, mirror = training_images(self.bank, self.mirror, path)
        return [
            AMG(target, images, self.scale, trigger=self.trigger, search=self.search, mirror=mirror, seed=self.seed)
        ]
