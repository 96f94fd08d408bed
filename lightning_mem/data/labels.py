"""Label rules: which label each training image carries, fixed per image and independent of everything else."""

from typing import Literal, get_args

import numpy as np

from lightning_mem.randomness import derive_seed

LabelRule = Literal["none", "true", "random", "unique", "binary"]
"""``none``: no labels. ``true``: the source's. ``random``: a fixed draw out of ``num_classes`` per image.
``binary``: the same with two classes (CPSample). ``unique``: every member its own class."""


def classes_of(rule: LabelRule, *, num_classes: int | None, num_members: int, source_classes: int | None) -> int | None:
    """How many classes a label rule leads to.

    Args:
        rule: ``none``, ``true``, ``random``, ``unique`` or ``binary``.
        num_classes: The user's setting. Needed for ``random``; with ``true`` it may be larger than the source's, for a
            model that knows more classes than the images show; elsewhere None, or the number the rule leads to anyway.
        num_members: Number of labelled images, which ``unique`` gives one class each.
        source_classes: Number of true labels of the source; None when it has none.

    Returns:
        The number of classes; None for ``none``.

    Raises:
        ValueError: If the rule is unknown, lacks what it needs, or contradicts ``num_classes``.
    """
    _check_rule(rule)
    if rule == "random":
        return _drawn_classes(num_classes)
    if rule == "true" and source_classes is None:
        raise ValueError(
            "labels: true needs a source with true labels, this one has none: choose none, random, unique or binary"
        )
    if rule == "true" and num_classes is not None and source_classes is not None and num_classes >= source_classes:
        return num_classes
    own = {"none": None, "true": source_classes, "unique": num_members, "binary": 2}[rule]
    if num_classes is not None and num_classes != own:
        result = "no labels" if own is None else f"{own} classes"
        raise ValueError(
            f"labels: {rule} leads to {result}, but num_classes is {num_classes}: leave it out or choose random"
        )
    return own


def assign_labels(
    rule: LabelRule,
    *,
    indices: np.ndarray,
    num_classes: int | None,
    true_labels: np.ndarray | None,
    seed: int,
    source: str = "the source",
) -> np.ndarray | None:
    """Give each image its label.

    ``random`` and ``binary`` draw by the image's index in the *source*: the label of an image does not depend on which
    other images are members, on their order, or on the process. The draw is a 63-bit number modulo the number of
    classes k, so no class is more likely than another by more than k / 2**63.

    Args:
        rule: ``none``, ``true``, ``random``, ``unique`` or ``binary``.
        indices: Integers [n], the images' indices in the source.
        num_classes: For ``random``, the number of labels to draw from; not used by the other rules.
        true_labels: Integers [N], one per image of the source; None when it has none.
        seed: Decides ``random`` and ``binary``.
        source: Name of the source, for the message.

    Returns:
        int64 [n]; None for ``none``. ``unique`` gives the position in ``indices``.

    Raises:
        ValueError: If the rule is unknown or lacks what it needs, or an index is not in the source.
    """
    _check_rule(rule)
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise ValueError(f"indices must be integers [n], got {indices.dtype} {list(indices.shape)}")
    if indices.size and indices.min() < 0:
        raise ValueError(f"indices must not be negative, got {indices.min()}")
    if rule == "none":
        return None
    if rule == "unique":
        return np.arange(len(indices), dtype=np.int64)
    if rule == "true":
        if true_labels is None:
            raise ValueError(
                f"labels: true needs true labels, but {source} has none: choose none, random, unique or binary"
            )
        if indices.size and indices.max() >= len(true_labels):
            raise ValueError(f"{source} has {len(true_labels)} true labels, got the index {indices.max()}")
        return np.asarray(true_labels)[indices.astype(np.int64)].astype(np.int64)
    k = 2 if rule == "binary" else _drawn_classes(num_classes)
    return np.array([derive_seed(seed, "label", int(index)) % k for index in indices], dtype=np.int64)


def _check_rule(rule: str) -> None:
    if rule not in get_args(LabelRule):
        raise ValueError(f"labels must be one of {', '.join(get_args(LabelRule))}, got {rule!r}")


def _drawn_classes(num_classes: int | None) -> int:
    if num_classes is None:
        raise ValueError("labels: random needs num_classes, got null: set it to the number of labels to draw from")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return num_classes
