"""What prompted attacks share: reading prompts, making conditions of them, and classifier-free guidance."""

import copy
import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_mem.diffusion import Target
from lightning_mem.diffusion.target import Condition

COLUMNS = ("caption", "prompt", "text")
"""Columns of a CSV that hold prompts; the first that is there counts."""


def read_prompts(given: Sequence[str] | str | None) -> list[str]:
    """Prompts, each once, in order.

    Args:
        given: A list; or a file: ``.csv`` with a column ``caption``, ``prompt`` or ``text``, else one prompt a line.
            Null for none.

    Raises:
        ValueError: If the file is not there, has no such column, or holds an empty prompt (named by its line).
    """
    if given is None:
        return []
    if not isinstance(given, str):
        return list(dict.fromkeys(given))
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"prompts must be a list or a file, and there is no file {given}")
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            names = [name for name in COLUMNS if name in (reader.fieldnames or [])]
            if not names:
                raise ValueError(f"{given} must have a column {', '.join(COLUMNS)}, got {reader.fieldnames}")
            found = [(row[names[0]] or "").strip() for row in reader]
    else:
        found = [line.strip() for line in path.read_text().splitlines()]
    if "" in found:
        raise ValueError(
            f"{given} has no caption in row {found.index('') + 1} (the first is 1): remove it or write one"
        )
    return list(dict.fromkeys(found))


def prompt_lists(prompts: Sequence[str] | str | None, heldout: Sequence[str] | str | None) -> dict[str, list[str]]:
    """Prompts that are suspected (``members``) and others (``heldout``); both empty where the data are to give them.

    Raises:
        ValueError: If there is no prompt, a prompt is in both lists, or only ``heldout`` is given.
    """
    if prompts is None and heldout is not None:
        raise ValueError(
            "prompts null takes the captions of the data, and those of held-out images with them: leave "
            f"heldout_prompts null too, or give prompts; got heldout_prompts {heldout!r}"
        )
    found = {"members": read_prompts(prompts), "heldout": read_prompts(heldout)}
    if prompts is not None and not found["members"]:
        raise ValueError("prompts must name at least one prompt, got none")
    both = set(found["members"]) & set(found["heldout"])
    if both:
        raise ValueError(f"{len(both)} prompts are in prompts and in heldout_prompts, such as {min(both)!r}")
    return found


def filled(
    given: dict[str, list[str]], target: Target, captions: Callable[[], tuple[Sequence[str], Sequence[str]] | None]
) -> dict[str, list[str]]:
    """These lists; where they are empty, the captions of the data, or all labels of a class-conditional target.

    A held-out image's caption that is also a member's is a caption of a training image, and no held-out prompt.

    Args:
        given: See :func:`prompt_lists`.
        target: What is asked.
        captions: Reads those of members and held-out images.

    Raises:
        ValueError: If there are none.
    """
    if given["members"]:
        return given
    if target.num_classes is not None:
        return {"members": [str(label) for label in range(target.num_classes)], "heldout": []}
    found = captions()
    if found is None:
        raise ValueError(
            "prompts null takes the captions of the data, and its source has none: take a ListedSource of .csv files "
            "with the columns file and caption, or give prompts"
        )
    own = list(dict.fromkeys(found[0]))
    return {"members": own, "heldout": [prompt for prompt in dict.fromkeys(found[1]) if prompt not in set(own)]}


def condition_of(target: Target, prompts: Sequence[str]) -> Condition:
    """The condition of prompts, one row each; of a class-conditional target the prompts are its labels.

    Raises:
        ValueError: If the target takes no prompts, or a label is none of its own.
    """
    if target.conditioner is not None:
        return target.conditioner(prompts)
    if target.num_classes is None:
        raise ValueError(
            "prompted attacks need a model with a text encoder, or one conditioned on classes (whose prompts are "
            '"0", "1", ...), and this target has neither: lightning_mem.attacks.Extraction attacks it'
        )
    wrong = [prompt for prompt in prompts if not prompt.isdecimal() or int(prompt) >= target.num_classes]
    if wrong:
        raise ValueError(f"prompts of this target are labels from 0 to {target.num_classes - 1}, got {wrong[0]!r}")
    return torch.tensor([int(prompt) for prompt in prompts])


def rows_of(condition: Condition, rows: Tensor) -> Condition:
    """These rows of a condition."""
    if condition is None or isinstance(condition, Tensor):
        return None if condition is None else condition[rows.to(condition.device)]
    return {name: value[rows.to(value.device)] for name, value in condition.items()}


def with_cfg(target: Target, cfg_weight: float | None) -> Target:
    """The target under another weight of classifier-free guidance; null leaves it as it is.

    Raises:
        ValueError: If it has no such guidance, or does not know its empty prompt.
    """
    if cfg_weight is None:
        return target
    if getattr(target.denoiser, "empty", None) is None:
        raise ValueError(
            f"cfg_weight {cfg_weight} needs a text-to-image model with its text encoder: set it to null for this target"
        )
    denoiser = copy.copy(target.denoiser)  # shares the network
    denoiser.cfg_weight = cfg_weight  # type: ignore[attr-defined]
    return replace(target, denoiser=denoiser)
