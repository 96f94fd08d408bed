"""Codes: which members of an ensemble see which training unit, and the manifest that says so."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mem.data.deduplicate import Rule, duplicate_groups
from lightning_mem.data.split import ImageSet
from lightning_mem.randomness import generator
from lightning_mem.records import atomic_write, digest

UnitKind = Literal["image", "duplicates", "class"]
"""What is left out as one: an image, a group of duplicates, or all images of a class."""

MOST_MEMBERS = 66
"""The largest m whose number of codes fits a 64-bit integer."""


def minimum_members(num_units: int) -> int:
    r"""The least m, at least 2, with :math:`\binom{m}{\lfloor m/2 \rfloor} \ge n`: as many codes as units.

    Args:
        num_units: n, at least 1.

    Raises:
        ValueError: If n is below 1, or so large that no m up to 66 has as many codes.

    Example:
        >>> minimum_members(64), minimum_members(10_000)
        (8, 16)
    """
    if num_units < 1:
        raise ValueError(f"num_units must be at least 1, got {num_units}")
    for m in range(2, MOST_MEMBERS + 1):
        if math.comb(m, m // 2) >= num_units:
            return m
    raise ValueError(f"{num_units} units need more than {MOST_MEMBERS} members: take groups of images as units")


def unrank_combination(rank: int, length: int, weight: int) -> list[int]:
    """The places of the ones in the code of this rank, in the order of the binary numbers that the codes are.

    Args:
        rank: In [0, C(length, weight)).
        length: Of the code.
        weight: Number of ones.

    Source:
        The combinatorial number system: rank = sum over j of C(place_j, j), places ascending, j from 1.
    """
    places = []
    for ones in range(weight, 0, -1):
        place = ones - 1
        while place + 1 < length and math.comb(place + 1, ones) <= rank:
            place += 1
        places.append(place)
        rank -= math.comb(place, ones)
    return places


def balanced_codes(num_units: int, num_members: int, seed: int) -> Tensor:
    r"""Distinct random codes of equal weight :math:`\lfloor m/2 \rfloor`: unit i is seen by the members k with a one.

    No code contains another, so when all members that saw unit i are left out, of every other unit at least one that
    saw it remains. Ranks are drawn without replacement (Floyd's method: one draw a unit, none rejected) and turned
    into combinations.

    Args:
        num_units: n, at least 1.
        num_members: m in [2, 66], with at least n codes.
        seed: Of the draw, at the address ``("codes", n, m)``.

    Returns:
        bool [n, m].

    Raises:
        ValueError: If a number is out of range, or m has fewer codes than there are units (it says the least m).

    Source:
        Dai and Gifford, arXiv:2306.02174 (the codes); the draw without rejection is ours.
    """
    least = minimum_members(num_units)
    if not 2 <= num_members <= MOST_MEMBERS:
        raise ValueError(f"num_members must lie in [2, {MOST_MEMBERS}], got {num_members}")
    weight = num_members // 2
    total = math.comb(num_members, weight)
    if total < num_units:
        raise ValueError(
            f"{num_members} members have {total} balanced codes, fewer than the {num_units} units: use at least "
            f"{least} members"
        )
    draw = generator(seed, "codes", num_units, num_members)
    ranks: list[int] = []
    taken: set[int] = set()
    for top in range(total - num_units, total):
        rank = int(torch.randint(top + 1, (1,), generator=draw)) if top else 0
        rank = top if rank in taken else rank
        taken.add(rank)
        ranks.append(rank)
    codes = torch.zeros(num_units, num_members, dtype=torch.bool)
    # a rank's place in the list tells of its size: the units are dealt out in an order of their own
    for unit, place in enumerate(torch.randperm(num_units, generator=draw).tolist()):
        codes[unit, unrank_combination(ranks[place], num_members, weight)] = True
    return codes


@dataclass(frozen=True)
class UnitCodes:
    """The units of a training set and their codes.

    Args:
        units: Source indices of each unit's images; every image stands in one unit.
        codes: bool [n, m]: ``codes[i, k]`` where member k was trained on unit i.
        kind: What a unit is.
        seed: Of the codes.
        members: Names of the members, which are those of their run folders; empty for ``member00``, ``member01`` ...

    Raises:
        ValueError: If there is not one code a unit, two units share a code or an image, a unit is empty, a member sees
            nothing, or members have not one name each.
    """

    units: tuple[tuple[int, ...], ...]
    codes: Tensor
    kind: UnitKind = "image"
    seed: int = 0
    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(UnitKind):
            raise ValueError(f"units must be one of {', '.join(get_args(UnitKind))}, got {self.kind!r}")
        if self.codes.dtype != torch.bool or self.codes.ndim != 2 or len(self.codes) != len(self.units):
            raise ValueError(
                f"codes must be bool [n, m], one a unit ({len(self.units)}), got {self.codes.dtype} "
                f"{tuple(self.codes.shape)}"
            )
        if not self.members:
            object.__setattr__(self, "members", tuple(f"member{k:02d}" for k in range(self.num_members)))
        if len(set(self.members)) != self.num_members:
            raise ValueError(f"members need one name each ({self.num_members}), got {list(self.members)}")
        if len(self.codes.unique(dim=0)) < len(self.codes):
            raise ValueError("two units share a code: leaving one out would leave out the other")
        empty = [number for number, unit in enumerate(self.units) if not unit]
        if empty:
            raise ValueError(f"the units {empty[:5]} hold no image")
        indices = torch.tensor([index for unit in self.units for index in unit])
        values, counts = indices.unique(return_counts=True)
        if len(values) < len(indices):
            raise ValueError(f"the images {values[counts > 1][:5].tolist()} stand in two units: each stands in one")
        idle = (~self.codes.any(0)).nonzero().flatten().tolist()
        if idle:
            raise ValueError(
                f"the members {idle} see no unit: use fewer members for {len(self.units)} units, or another seed"
            )

    @classmethod
    def drawn(
        cls,
        units: Sequence[Sequence[int]],
        num_members: int,
        seed: int = 0,
        kind: UnitKind = "image",
        members: Sequence[str] = (),
    ) -> "UnitCodes":
        """Codes for these units; see :func:`balanced_codes`."""
        own = tuple(tuple(int(index) for index in unit) for unit in units)
        return cls(own, balanced_codes(len(own), num_members, seed), kind, seed, tuple(members))

    @property
    def num_members(self) -> int:
        """m."""
        return self.codes.shape[1]

    @property
    def digest(self) -> str:
        """Of units and codes."""
        return digest([list(unit) for unit in self.units], self.codes)

    def seen_by(self, member: int) -> list[int]:
        """Source indices of the images that a member is trained on, ascending."""
        return sorted(index for unit in self.codes[:, member].nonzero().flatten() for index in self.units[int(unit)])

    def active(self, without: Sequence[int] = ()) -> Tensor:
        """The members that saw none of these units, bool [m].

        Raises:
            ValueError: If a unit does not exist, or no member is left.
        """
        wrong = [unit for unit in without if not 0 <= unit < len(self.units)]
        if wrong:
            raise ValueError(f"units must lie in [0, {len(self.units)}), got {wrong[:5]}")
        left = ~self.codes[list(without)].any(0)
        if not left.any():
            raise ValueError(f"every member saw one of the units {list(without)[:10]}: leave out fewer at once")
        return left

    def unit_of(self, indices: Tensor) -> Tensor:
        """The unit of each source index, int64 of the same shape.

        Raises:
            ValueError: If the units do not cover the indices (named).
        """
        known = {index: number for number, unit in enumerate(self.units) for index in unit}
        missing = [index for index in indices.flatten().tolist() if index not in known]
        if missing:
            raise ValueError(
                f"the units do not cover the data: {len(missing)} images stand in none of the {len(self.units)} units, "
                f"such as {missing[:5]}: draw the codes for these data again"
            )
        return torch.tensor([known[index] for index in indices.flatten().tolist()]).reshape(indices.shape)

    def save(self, path: str | Path) -> None:
        """Write the manifest, as JSON."""
        content = {
            "units": self.kind,
            "seed": self.seed,
            "members": list(self.members),
            "digest": self.digest,
            "codes": ["".join("01"[int(bit)] for bit in code) for code in self.codes],
            "indices": [list(unit) for unit in self.units],
        }
        with atomic_write(path) as file:
            json.dump(content, file)

    @classmethod
    def load(cls, path: str | Path) -> "UnitCodes":
        """Read a manifest.

        Raises:
            ValueError: If there is none, or it is not what :meth:`save` wrote.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no {path}: the folder of an ensemble holds the codes of its units")
        content = json.loads(path.read_text())
        try:
            codes = torch.tensor([[bit == "1" for bit in code] for code in content["codes"]])
            units = tuple(tuple(unit) for unit in content["indices"])
            found = cls(units, codes, content["units"], content["seed"], tuple(content["members"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no manifest of codes ({error!r})") from error
        if found.digest != content.get("digest"):
            raise ValueError(f"{path} was changed: its digest is {found.digest}, it says {content.get('digest')}")
        return found


def units_of(
    part: ImageSet, kind: UnitKind = "image", labels: Tensor | None = None, rule: Rule = "exact", mirror: bool = False
) -> list[list[int]]:
    """The units of a training set, as source indices, ascending.

    Args:
        part: The training images.
        kind: ``image``; ``duplicates``: images that show the same are one unit; ``class``: all of a label are.
        labels: int64 [N], for ``class``.
        rule: What a duplicate is; see :data:`lightning_mem.data.deduplicate.Rule`.
        mirror: Mirror images are duplicates too.

    Raises:
        ValueError: If the kind is unknown, or classes are asked for and there are no labels.
    """
    if kind not in get_args(UnitKind):
        raise ValueError(f"units must be one of {', '.join(get_args(UnitKind))}, got {kind!r}")
    if kind == "class":
        if labels is None or labels.shape != part.indices.shape:
            raise ValueError("units: class needs a label for every image, and the source has none: use image")
        return [part.indices[labels == label].sort().values.tolist() for label in labels.unique()]
    groups = duplicate_groups(part, rule, mirror) if kind == "duplicates" else []
    found = {group.kept: sorted((group.kept, *group.removed)) for group in groups}
    gone = {index for group in groups for index in group.removed}
    return [found.get(index, [index]) for index in part.indices.sort().values.tolist() if index not in gone]
