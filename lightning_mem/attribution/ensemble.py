"""An encoded ensemble: the mean of its members as one denoiser, with any unit left out and nothing trained again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lightning_mem.attribution.codes import UnitCodes
from lightning_mem.data.plan import read_plan
from lightning_mem.data.split import read_indices
from lightning_mem.diffusion import Condition, Denoiser, Target
from lightning_mem.diffusion.sampling import network_of
from lightning_mem.modules import load_target
from lightning_mem.records import digest
from lightning_mem.types import Weights

OWN_OF_A_MEMBER = {"members", "num_workers", "seed"}
"""Settings of the data in which the members of one ensemble may differ, beside the seed of the run."""

OF_THE_RECIPE = ("accumulate_grad_batches", "gradient_clip_val", "max_epochs", "max_steps", "precision")
"""Settings of the Trainer in which they may not."""


class EnsembleDenoiser:
    r"""The weighted mean of what several denoisers predict.

    .. math:: \sum_k w_k\,f_k(x_t, t)

    summed in the order of the members; one of weight 0 is not asked, so leaving members out is exact, bit for bit.

    Args:
        denoisers: Of one prediction.
        weights: [m], on the CPU; they may be dual numbers of forward-mode differentiation.

    Raises:
        ValueError: If there is not one weight a denoiser, all are 0, or predictions differ.
    """

    def __init__(self, denoisers: Sequence[Denoiser], weights: Tensor) -> None:
        predictions = {denoiser.prediction for denoiser in denoisers}
        if len(predictions) != 1:
            raise ValueError(f"the members of an ensemble must predict the same, got {sorted(predictions)}")
        if weights.shape != (len(denoisers),) or not (weights != 0).any():
            raise ValueError(f"weights must be one a denoiser ({len(denoisers)}), not all 0, got {weights}")
        asked = (weights != 0).nonzero().flatten().tolist()
        self.parts = [(weights[k], denoisers[k]) for k in asked]
        self.prediction = denoisers[0].prediction
        networks = [network for _, part in self.parts if (network := network_of(part)) is not None]
        self.module = nn.ModuleList(networks) if networks else None

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """The mean output at training timestep t; its precision is that of the members."""
        total = torch.zeros((), dtype=x_t.dtype, device=x_t.device)
        for weight, denoiser in self.parts:
            output = denoiser(x_t, t, condition)
            total = total + weight.to(device=output.device, dtype=output.dtype) * output
        return total


@dataclass(frozen=True)
class Ensemble:
    """Members and the codes that say who saw what.

    Args:
        members: One a code place, in their order.
        codes: Units and codes.

    Raises:
        ValueError: If there is not one member a code place, or members differ in shape, process, prediction or number
            of classes (named).
    """

    members: tuple[Target, ...]
    codes: UnitCodes

    def __post_init__(self) -> None:
        if len(self.members) != self.codes.num_members:
            raise ValueError(
                f"the codes have {self.codes.num_members} places, but there are {len(self.members)} members"
            )
        kinds = [
            {
                "shape": tuple(member.shape),
                "process": member.process.digest,
                "prediction": member.denoiser.prediction,
                "num_classes": member.num_classes,
                "weights": member.weights,
            }
            for member in self.members
        ]
        for name, kind in zip(self.codes.members, kinds, strict=True):
            other = [key for key, value in kind.items() if value != kinds[0][key]]
            if other:
                raise ValueError(
                    f"{name} differs from {self.codes.members[0]} in {', '.join(other)}: the members of an ensemble "
                    "are trained by one recipe"
                )

    @classmethod
    def load(cls, path: str | Path, weights: Weights = "ema", device: str = "cpu") -> "Ensemble":
        """The ensemble that a study trained.

        Args:
            path: Its manifest of codes, or the folder that holds one.
            weights: Of the members: ``ema`` takes averaged weights where there are any.
            device: Where to put them.

        Raises:
            ValueError: If there is no manifest or there are several, members are missing or unfinished (named), were
                trained by different recipes (the settings are named), or on other images than their codes say.
        """
        manifest = manifest_of(path)
        codes = UnitCodes.load(manifest)
        plan = {entry.row.name: Path(entry.folder) for entry in read_plan(manifest.parent / "plan.jsonl")}
        folders = []
        for name in codes.members:
            own = manifest.parent / name
            folders.append(own if own.is_dir() else plan.get(name, own))
        missing = [name for name, at in zip(codes.members, folders, strict=True) if not (at / "summary.json").is_file()]
        if missing:
            raise ValueError(
                f"the ensemble of {manifest} lacks {len(missing)} of {len(folders)} members: {', '.join(missing)} are "
                "not trained to their end; start its study again"
            )
        first = _recipe(folders[0])
        for name, folder in zip(codes.members, folders, strict=True):
            other = _differing(first, _recipe(folder))
            if other:
                raise ValueError(
                    f"{name} was trained by another recipe than {codes.members[0]}; they differ in {', '.join(other)}"
                )
        for k, folder in enumerate(folders):
            seen = sorted(read_indices(folder / "members.json", "members").tolist())
            if seen != codes.seen_by(k):
                raise ValueError(
                    f"{folder} was trained on {len(seen)} images that are not those {manifest} names for "
                    f"{codes.members[k]} ({len(codes.seen_by(k))}): train it again, in a folder of its own"
                )
        return cls(tuple(load_target(folder, weights, device) for folder in folders), codes)

    def on(self, device: torch.device | str) -> "Ensemble":
        """Itself with all networks on a device, where its samples are drawn."""
        for member in self.members:
            network = network_of(member.denoiser)
            if network is not None:
                network.to(device)
        return Ensemble(tuple(replace(member, device=device) for member in self.members), self.codes)

    @property
    def digest(self) -> str:
        """Of all members, units and codes."""
        return digest([member.digest for member in self.members], self.codes.digest)

    def target(self, without: Sequence[int] = ()) -> Target:
        """The members that saw none of these units, each with the same weight, as the target of any verb.

        Args:
            without: Numbers of the units to leave out; empty for the whole ensemble.

        Raises:
            ValueError: If no member is left, or a unit does not exist.
        """
        active = self.codes.active(without).double()
        return self.weighted(active / active.sum())

    def weighted(self, weights: Tensor) -> Target:
        """The members with these weights, as a target.

        Args:
            weights: [m]; those of :meth:`target` are 1 over the number of active members, and 0.
        """
        first = self.members[0]
        asked = [(float(w), member.digest) for w, member in zip(weights, self.members, strict=True) if w != 0]
        return Target(
            denoiser=EnsembleDenoiser([member.denoiser for member in self.members], weights),
            process=first.process,
            shape=first.shape,
            num_classes=first.num_classes,
            weights=first.weights,
            digest=digest(asked),
            codec=first.codec,
            conditioner=first.conditioner,
            device=first.device,
        )


def manifest_of(path: str | Path) -> Path:
    """The manifest of codes in a folder, or the file itself.

    Raises:
        ValueError: If there is none, or the folder holds several (named).
    """
    path = Path(path)
    if path.is_file():
        return path
    found = sorted(path.glob("codes*.json"))
    if len(found) != 1:
        names = f"several ({', '.join(one.name for one in found)}): name one" if found else "none"
        raise ValueError(f"an ensemble is a folder with one manifest codes*.json, or that file; {path} holds {names}")
    return found[0]


def _recipe(folder: Path) -> dict[str, Any]:
    """What members of one ensemble have in common."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    data = {key: value for key, value in config.get("data", {}).items() if key not in OWN_OF_A_MEMBER}
    trainer = {key: config.get("trainer", {}).get(key) for key in OF_THE_RECIPE}
    return {"model": config.get("model"), "data": data, "trainer": trainer}


def _differing(one: Any, other: Any, where: str = "") -> list[str]:
    """Dotted keys at which two nested settings differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys([*one, *other])
        return [
            found for key in keys for found in _differing(one.get(key), other.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if one == other else [where]
