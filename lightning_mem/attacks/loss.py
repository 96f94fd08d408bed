"""The loss attack: members are reconstructed better than held-out images, by a plain and by a protected denoiser."""

import csv
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lightning_mem.attacks.base import AbstractAttack, Scene
from lightning_mem.attacks.loss_scores import (
    RATES,
    Verdict,
    all_verdicts,
    loss_images,
    reconstruction_losses,
    verdict_numbers,
)
from lightning_mem.attacks.report import short
from lightning_mem.diffusion import ScoreTerm, Target, guidance_settings
from lightning_mem.diffusion.additions import AbstractAddition
from lightning_mem.evaluation.table import LOOK
from lightning_mem.records import Record, atomic_write, digest

PREFIX = "attack/loss/"
Losses = Mapping[str, Tensor]
"""Float64 [N, timesteps] by arm."""


class LossAttack(AbstractAttack):
    r"""Tells members from held-out images by the reconstruction loss at a fixed timestep.

    The plain denoiser (``definition.protection`` none) and, where one is given, the protected one answer the same
    images at the same noise. At every t of ``timesteps``, named before looking, an attacker takes a lower loss for a
    member: ``attack/loss/z``, ``attack/loss/auc``, ``attack/loss/auc_folded`` (max(a, 1 - a)),
    ``attack/loss/tpr_at_0.01`` and ``attack/loss/tpr_at_0.001``. A second attacker picks t, among ``candidates``, and
    the sign on half of the images and is told on the other half (``definition.attacker`` calibrated). Two-sided: a z
    far below 0 leaks as much as one far above. Every image's losses are in ``tables/losses.csv``.

    Args:
        protection: What the denoiser is protected by, by class_path: ``lightning_mem.defenses.CPSampleProtection`` ...;
            null attacks the plain denoiser only.
        setting: Word for ``definition.setting``, such as ``copies`` or ``membership``.
        timesteps: Training timesteps of the fixed attacker, increasing.
        candidates: Timesteps that the calibrated attacker picks from; null for ``timesteps``.
        num_draws: Noise draws of an image that are averaged.
        noise_seed: Of noise and split; null takes ``seed_everything``.

    Raises:
        ValueError: If a number is out of range, or the protection does not belong to the target.

    Undefined when:
        Members and held-out images differ in more than membership, or one side has copies of the other.

    Source:
        Carlini et al., arXiv:2301.13188, section 5.2; Matsumoto et al., arXiv:2302.03262; protected denoiser and z:
        CPSample, arXiv:2409.07025.
    """

    name = "loss"
    threat_model = (
        "The loss attack may ask the served denoiser, protected where it is, for its noise prediction on images of its "
        "choice. Whoever has the weights drops the protection and is the row `none`; whoever has the protection's "
        "classifier reads one bit of every member from it. The calibrated attacker knows the membership of half the "
        "images."
    )

    def __init__(
        self,
        protection: AbstractAddition | None = None,
        setting: str = "",
        timesteps: list[int] | None = None,
        candidates: list[int] | None = None,
        num_draws: int = 1,
        noise_seed: int | None = None,
    ) -> None:
        self.timesteps = [100, 200] if timesteps is None else list(timesteps)
        self.candidates = self.timesteps if candidates is None else list(candidates)
        for word, given in (("timesteps", self.timesteps), ("candidates", self.candidates)):
            if not given or given != sorted(set(given)) or given[0] < 0:
                raise ValueError(f"{word} must be training timesteps >= 0 in increasing order, got {given}")
        if num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {num_draws}")
        self.protection, self.setting, self.num_draws = protection, setting, num_draws
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if noise_seed is None else noise_seed
        self._path = ""

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target, protection and settings; see :class:`AbstractAttack`."""
        last = max(self.timesteps[-1], self.candidates[-1])
        if last >= target.process.num_timesteps:
            raise ValueError(f"timesteps must lie in [0, {target.process.num_timesteps}), got {last}")
        self._path = path
        protection = self._settings(self._terms(target, 1))
        return digest(
            target.digest, protection, self.setting, self.timesteps, self.candidates, self.num_draws, self.seed
        )

    def _terms(self, target: Target, count: int) -> Sequence[ScoreTerm]:
        return () if self.protection is None else self.protection.terms(target, self._path, torch.arange(count))

    @staticmethod
    def _settings(terms: Sequence[ScoreTerm]) -> dict[str, Any]:
        """What an arm's protection is, with its name under ``protection``."""
        found = {key: value for key, value in guidance_settings(terms).items() if key != "guidance_clip"}
        return {"protection": found.get("guidance", "none"), **found}

    def run(self, scene: Scene) -> list[Record]:
        """Ask both arms for the losses of all images, then tell them apart; see :class:`AbstractAttack`."""
        start = time.perf_counter()
        reference = scene.reference()
        members, heldout = loss_images(reference)
        terms = self._terms(scene.target, max(len(members), len(heldout)))
        arms: dict[str, Sequence[ScoreTerm]] = {"none": ()}
        settings: dict[str, dict[str, Any]] = {"none": {"protection": "none"}}
        if terms:
            own = self._settings(terms)
            arms[str(own["protection"])], settings[str(own["protection"])] = terms, own
        times = sorted({*self.timesteps, *self.candidates})
        asked: dict[str, Any] = {"seed": self.seed, "num_draws": self.num_draws, "workers": scene.workers}
        own_losses = reconstruction_losses(scene.target, members, times, arms, name="members", **asked)
        other_losses = reconstruction_losses(scene.target, heldout, times, arms, name="heldout", **asked)
        records = []
        for arm in arms:
            told = (own_losses[arm], other_losses[arm], times)
            for verdict in all_verdicts(arm, *told, self.timesteps, self.candidates, self.seed):
                records += self._records(verdict, settings[arm], scene, reference.members_digest)
        seconds = time.perf_counter() - start
        scene.first(lambda: self._write(scene.folder, {"members": own_losses, "heldout": other_losses}, times))
        return [replace(record, seconds=seconds) for record in records]

    def _records(self, verdict: Verdict, settings: Mapping[str, Any], scene: Scene, data_digest: str) -> list[Record]:
        definition = {**settings, "setting": self.setting, **verdict.definition, "num_draws": self.num_draws}
        if verdict.attacker == "calibrated":
            definition["candidates"] = " ".join(map(str, self.candidates))
        return [
            Record(
                PREFIX + number.name, number.value, number.n, scene.step, *(number.interval or (None, None)),
                scene.target.weights, self.seed, number.unit, definition={**definition, **number.definition},
                data_digest=data_digest, config_digest=scene.config_digest, run=scene.home.name,
            )
            for number in verdict_numbers(verdict)
        ]  # fmt: skip

    @staticmethod
    def _write(folder: Path, losses: Mapping[str, Losses], times: Sequence[int]) -> None:
        """One row an image, arm and timestep."""
        with atomic_write(folder / "tables" / "losses.csv") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["protection", "set", "row", "t", "loss"])
            for word, found in losses.items():
                for arm, values in found.items():
                    for row, own in enumerate(values.tolist()):
                        writer.writerows([arm, word, row, t, f"{loss:.9g}"] for t, loss in zip(times, own, strict=True))

    def table(self, records: Sequence[Record]) -> Table:
        """One row an arm and attacker."""
        caption = (
            "z: standard errors by which members' mean loss is below that of held-out images; 2 or more either way is "
            "a leak; calibrated: t and sign (-: a high loss means member) picked on the other half of the images; "
            "intervals of all are in the records"
        )
        table = Table(title="Loss attack", title_justify="left", title_style="bold", caption=caption, **LOOK)
        table.caption_justify = "left"
        for heading in ("protection", "attacker", "t", "n", "z", "auc", "tpr at\n0.01", "tpr at\n0.001"):
            table.add_column(
                heading, justify="left" if heading in ("protection", "attacker") else "right", no_wrap=True
            )
        groups: dict[tuple[Any, ...], dict[str, Record]] = {}
        for record in records:
            about = record.definition
            key = about["protection"], about["attacker"], about["t"], about["sign"]
            groups.setdefault(key, {})[record.name.removeprefix(PREFIX)] = record
        for (protection, attacker, t, sign), own in groups.items():
            about = own["z"].definition
            table.add_row(
                protection, attacker, f"{t}{'-' if sign < 0 else ''}", f"{about['num_members']}+{about['num_heldout']}",
                f"{own['z'].value:.1f}", short(own["auc"]), *(f"{own[f'tpr_at_{rate}'].value:.2f}" for rate in RATES),
            )  # fmt: skip
        return table
