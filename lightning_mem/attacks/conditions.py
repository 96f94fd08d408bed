"""What a conditional model is asked about an image under: its label, its caption, or the empty prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mem.attacks.prompts import condition_of
from lightning_mem.diffusion import Target
from lightning_mem.diffusion.target import Condition
from lightning_mem.evaluation import Reference

Rule = Literal["caption", "empty"]
"""``caption``: each image under its own; ``empty``: all under the empty prompt."""

Captions = tuple[Sequence[str], Sequence[str]]
"""Of the members and of the held-out images."""

Asked = Callable[[Tensor], Condition]
"""The condition of rows int64 [B] of one side."""


@dataclass(frozen=True)
class Conditions:
    """What the images of both sides are asked under.

    Args:
        kind: ``none``: the model takes no condition; ``label``, ``caption``, or ``empty``.
        sides: Labels int64 [N], or captions, of ``members`` and ``heldout``; empty for ``none`` and ``empty``.
    """

    kind: Literal["none", "label", "caption", "empty"] = "none"
    sides: Mapping[str, Tensor | Sequence[str]] = field(default_factory=dict)

    @property
    def definition(self) -> dict[str, str]:
        """``condition``, for records; nothing where the model takes none."""
        return {} if self.kind == "none" else {"condition": self.kind}

    def part(self, side: str, rows: Tensor) -> "Conditions":
        """With these rows of one side alone, int64 [n]."""
        given = self.sides.get(side)
        if given is None:
            return self
        own = given[rows] if isinstance(given, Tensor) else [given[row] for row in rows.tolist()]
        return Conditions(self.kind, {side: own})

    def of(self, target: Target, side: str) -> Asked | None:
        """The conditions of one side's rows; null asks without."""
        return _OfRows(target, self.sides[side]) if side in self.sides else None


class _OfRows:
    """Conditions of rows, made when they are asked for: embeddings of all captions would not fit into memory."""

    def __init__(self, target: Target, given: Tensor | Sequence[str]) -> None:
        self.target, self.given = target, given
        self._rows: Tensor | None = None
        self._made: Condition = None

    def __call__(self, rows: Tensor) -> Condition:
        if isinstance(self.given, Tensor):
            return self.given[rows.cpu()]
        if self._rows is None or not torch.equal(self._rows, rows):  # a block is asked about many times
            self._rows, self._made = rows, condition_of(self.target, [self.given[int(row)] for row in rows])
        return self._made


def on_device(condition: Condition, device: torch.device | str) -> Condition:
    """The same condition on a device."""
    if condition is None or isinstance(condition, Tensor):
        return None if condition is None else condition.to(device)
    return {name: value.to(device) for name, value in condition.items()}


def check_rule(target: Target, rule: Rule | None) -> None:
    """Refuse a rule that a target does not know, and a target that cannot be asked about images.

    Raises:
        ValueError: It says what the target is, or which piece it lacks.
    """
    if rule is not None and rule not in get_args(Rule):
        raise ValueError(f"condition must be caption, empty or null, got {rule!r}")
    if target.conditioner is not None:
        return
    if hasattr(target.denoiser, "empty"):
        raise ValueError(
            "the target is a text-to-image model without tokenizer and text encoder: images are asked about under "
            "their captions or the empty prompt, and both need them; put the pipeline's own parts back"
        )
    if rule is not None:
        kind = "unconditional" if target.num_classes is None else f"conditioned on {target.num_classes} classes"
        raise ValueError(f"condition {rule} is for text-to-image models, and the target is {kind}: leave it null")


def conditions_of(target: Target, reference: Reference, rule: Rule | None = None) -> Conditions:
    """What a target is asked about a reference's images under.

    Args:
        target: The model.
        reference: Images, with labels or captions where there are any.
        rule: For a text-to-image model; null: ``caption`` where there are captions, else ``empty``.

    Raises:
        ValueError: If a class-conditional model meets images without labels, or with labels that are none of its own;
            or captions were asked for and there are none.
    """
    check_rule(target, rule)
    if target.num_classes is not None:
        return Conditions("label", _labels(target.num_classes, reference))
    if target.conditioner is None:
        return Conditions()
    captions = None if rule == "empty" else check_captions(reference.captions(), rule)
    if captions is None:
        return Conditions("empty")
    return Conditions("caption", dict(zip(("members", "heldout"), captions, strict=True)))


def check_captions(captions: Captions | None, rule: Rule | None) -> Captions | None:
    """The captions of the data, if there are any.

    Raises:
        ValueError: If the rule asks for captions and there are none.
    """
    if captions is None and rule == "caption":
        raise ValueError(
            "condition caption needs captions, and the source of the data has none: take a ListedSource of two .csv "
            "files with the columns file and caption, or set condition to empty"
        )
    return captions


def _labels(num_classes: int, reference: Reference) -> dict[str, Tensor]:
    if reference.labels is None:
        raise ValueError(
            f"the target is conditioned on {num_classes} classes, and each image is asked about under its own label, "
            "but the data have none: set data.labels to true (subfolders of a folder, labels of an .npz, the column "
            f"label of a .csv) and data.num_classes to {num_classes}"
        )
    found = dict(zip(("members", "heldout"), reference.labels, strict=True))
    for side, labels in found.items():
        if len(labels) and (int(labels.max()) >= num_classes or int(labels.min()) < 0):
            raise ValueError(
                f"labels of the target lie in [0, {num_classes}), but those of the {side} images go from "
                f"{int(labels.min())} to {int(labels.max())}"
            )
    return found
