"""Every attack against every protection of one target: copies, membership, utility and cost, from the same noise."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.loss_scores import all_verdicts, reconstruction_losses, verdict_numbers
from lightning_mem.attacks.membership_scores import told_images
from lightning_mem.attacks.protection_costs import Cost, measure_costs, read_costs, write_costs
from lightning_mem.attacks.protection_report import protections_table, write_report
from lightning_mem.attacks.protection_scores import PREFIX, UNGUIDED, UNPROTECTED, Arm, floors, score_arms, told
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, ScoreTerm, Target, guidance_settings
from lightning_mem.diffusion.additions import AbstractAddition, AllAccept, Judge
from lightning_mem.evaluation import Accepted, Measure, Scene, cache_folder
from lightning_mem.records import Record, digest

NAME = re.compile(r"[\w.+=-]+")
"""A name of a protection or attack: part of a key and of a file's name."""


class Protections(AbstractAttack):
    r"""Draws from one target under every attack and every protection, all from the same starting noise.

    An arm is an attack (``unguided`` or one of ``guidances``) under a protection (``none`` or one of ``protections``).
    Its records ``defense/<protection>/<what>`` name the attack in ``definition.attack``:

    * copies: ``ratio``, ``copied_images``, ``ams/...``, ``ums/...``, ``nearest_mean``, each with its control;
      ``near_copies`` (the same rule at 1/2); ``copy_reduction``, the ratio without protection over that with it;
    * utility: ``frechet/...``, ``precision/...``, ``recall/...``, ``density/...``, ``coverage/...``;
      ``frechet_ratio``, the distance to held-out images over that without protection. ``defense/floor/members`` and
      ``defense/floor/fresh`` are the distances of the training images, and of real images that nothing saw;
    * membership, of every protection made of score terms, unguided: the loss attack's ``z``, ``auc``, ``auc_folded``
      and ``tpr_at_<rate>``, of the attacker who was told t and of the one who calibrates (among ``timesteps``);
    * cost: ``evaluations``, ``classifier_evaluations``, ``classifier_gradients`` and ``seconds`` a sample;
      ``time_ratio`` to the same attack without protection; ``gate_rate``; ``accepted`` and ``tries`` of rejection.

    Writes samples, tables (every sample; the Markdown table) and pictures (the same addresses under every arm; copies
    against Fréchet distance) beside its records.

    Args:
        protections: By name, by class_path: ``lightning_mem.defenses.CPSampleProtection`` ...; null for none.
        guidances: Attacks by name, by class_path: ``lightning_mem.attacks.SurrogateGuidance`` ...; null for none.
        num_samples: Samples of an arm, at least 2.
        num_steps: Sampler steps.
        sampler: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``.
        eta: DDIM's share of fresh noise, 0 to 1.
        sample_seed: Of noise and of the loss attack; null takes ``seed_everything``.
        extractors: Feature spaces: ``pixels``, ``inception``, ``inception-64``, ``timm/<model>``, ``sscd``.
        extractor_weights: Local weight file per extractor name.
        threshold: Of the rule that says what a copy is, in (0, 1): nearest over second nearest training image.
        timesteps: Training timesteps of the loss attack, increasing; null for 100 and 200, empty for no loss attack.
        num_draws: Noise draws of an image that the loss attack averages.
        max_tries: Draws a rejected sample may take, at least 1.
        timing_repeats: Turns in which a block of 64 of every arm is timed; 0 for no times.
        training: Word for ``definition.training``: how the target was trained.
        setting: Word for ``definition.setting``, such as ``copies`` or ``membership``.
        pictures: Whether to draw pictures.
        cache_dir: Where features of training images are kept; see ``evaluate``.

    Raises:
        ValueError: If a number is out of range, a name is taken or cannot be part of a key, or an addition does not
            belong to the target.

    Source:
        The grid is ours: neither SIDE, arXiv:2410.02467, nor CPSample, arXiv:2409.07025, tries one against the other.
    """

    name = "protections"
    threat_model = (
        "The attacker draws samples of the served target, guides them where an arm says so, and may ask the protected "
        "denoiser for its noise prediction. The defender holds the training images. Whoever has the weights drops the "
        "protection and is the row `none`; whoever has its classifier reads one bit of every member from it."
    )

    def __init__(
        self,
        protections: dict[str, AbstractAddition] | None = None,
        guidances: dict[str, AbstractAddition] | None = None,
        num_samples: int = 1024,
        num_steps: int = 50,
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        sample_seed: int | None = None,
        extractors: list[str] | None = None,
        extractor_weights: dict[str, str] | None = None,
        threshold: float = 1 / 3,
        timesteps: list[int] | None = None,
        num_draws: int = 1,
        max_tries: int = 100,
        timing_repeats: int = 5,
        training: str = "plain",
        setting: str = "",
        pictures: bool = True,
        cache_dir: str | None = "auto",
    ) -> None:
        least = (("num_samples", num_samples, 2), ("num_draws", num_draws, 1), ("max_tries", max_tries, 1))
        for word, value, low in (*least, ("timing_repeats", timing_repeats, 0)):
            if value < low:
                raise ValueError(f"{word} must be at least {low}, got {value}")
        self.timesteps = [100, 200] if timesteps is None else list(timesteps)
        if self.timesteps != sorted(set(self.timesteps)) or any(t < 0 for t in self.timesteps):
            raise ValueError(f"timesteps must be training timesteps >= 0 in increasing order, got {self.timesteps}")
        self.protections, self.guidances = dict(protections or {}), dict(guidances or {})
        for word, given, taken in (
            ("protections", self.protections, (UNPROTECTED, "floor")),
            ("guidances", self.guidances, (UNGUIDED,)),
        ):
            wrong = [name for name in given if name in taken or not NAME.fullmatch(name)]
            if wrong:
                raise ValueError(
                    f"names of {word} must be made of letters, digits and _ . + = -, and not be {' or '.join(taken)}; "
                    f"got {wrong}"
                )
        self.num_samples, self.num_draws, self.max_tries = num_samples, num_draws, max_tries
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if sample_seed is None else sample_seed
        self.drawing: dict[str, Any] = {"seed": seed, "num_steps": num_steps, "sampler": sampler, "eta": eta}
        self.extractors = ["pixels"] if extractors is None else extractors
        self.extractor_weights = extractor_weights or {}
        self.threshold, self.timing_repeats, self.pictures, self.cache_dir = (
            threshold, timing_repeats, pictures, cache_dir,
        )  # fmt: skip
        self.words = {"training": training, "setting": setting}
        self._path = ""
        self._parts: dict[tuple[str, str], tuple[Sequence[ScoreTerm], Judge | None]] = {}

    # --- what it was given ---------------------------------------------------------------------------------------

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of target, guidances, protections and settings; see :class:`AbstractAttack`."""
        if self.timesteps and self.timesteps[-1] >= target.process.num_timesteps:
            raise ValueError(
                f"timesteps must lie in [0, {target.process.num_timesteps}), got {self.timesteps[-1]}: name others, "
                "or [] for no loss attack"
            )
        if self.timesteps and target.num_classes is not None:
            raise ValueError("the loss attack needs an unconditional target: timesteps [] leaves it out")
        self._path, self._parts = path, {}
        addresses = torch.arange(self.num_samples)
        # guidance and protection are read once, whatever the number of arms
        one = {name: (own.terms(target, path, addresses), own.judge(target, path)) for name, own in self._named()}
        for attack in (UNGUIDED, *self.guidances):
            for protection in (UNPROTECTED, *self.protections):
                names = [key for key in (f"guidances.{attack}", f"protections.{protection}") if key in one]
                terms = [term for key in names for term in one[key][0]]
                judges = [judge for key in names if (judge := one[key][1]) is not None]
                both = AllAccept(judges) if len(judges) > 1 else judges[0] if judges else None
                self._parts[attack, protection] = terms, both
        arms = {
            f"{protection}@{attack}": [guidance_settings(terms), None if judge is None else judge.settings]
            for (attack, protection), (terms, judge) in self._parts.items()
        }
        settings = {
            **self.drawing, **self.words, "num_samples": self.num_samples, "extractors": self.extractors,
            "threshold": self.threshold, "timesteps": self.timesteps, "num_draws": self.num_draws,
            "max_tries": self.max_tries, "timing_repeats": self.timing_repeats,
        }  # fmt: skip
        return digest(target.digest, arms, settings)

    def _named(self) -> list[tuple[str, AbstractAddition]]:
        kinds = (("guidances", self.guidances), ("protections", self.protections))
        return [(f"{kind}.{name}", own) for kind, given in kinds for name, own in given.items()]

    # --- the attack ----------------------------------------------------------------------------------------------

    def run(self, scene: Scene) -> list[Record]:
        """Draw every arm, then score; see :class:`AbstractAttack`."""
        drawn = {key: self._drawn(scene, *key) for key in self._parts}
        costs = self._costs(scene)
        arms = [
            Arm(*key, found, self._parts[key][1] is not None, costs[_name(*key)], self.words)
            for key, found in drawn.items()
        ]
        measure = Measure(
            scene.reference(), self.extractors, self.extractor_weights, self.threshold, scene.workers,
            ("ratio", "copied_images", "normalized_l2", "scores", "frechet", "prdc"),
            cache_dir=cache_folder(self.cache_dir),
        )  # fmt: skip
        scores = score_arms(
            arms, measure, step=scene.step, config_digest=scene.config_digest, run=scene.home.name,
            seed=self.drawing["seed"],
        )  # fmt: skip
        records = [record for score in scores for record in score.records]
        like = scores[0].record("ratio")
        records += floors(measure, like, self.words, self.num_samples)
        if self.timesteps:
            records += self._membership(scene, arms, like)
        scene.first(lambda: write_report(scores, records, measure, scene.folder, self.pictures))
        return records

    def _drawn(self, scene: Scene, attack: str, protection: str) -> Accepted:
        terms, judge = self._parts[attack, protection]
        name = _name(attack, protection)
        if judge is None:
            return Accepted.at_once(scene.draw(name, self.num_samples, guidance=terms, **self.drawing))
        return scene.draw_accepted(
            name, self.num_samples, judge, guidance=terms, max_tries=self.max_tries, **self.drawing
        )

    def _costs(self, scene: Scene) -> Mapping[str, Cost]:
        """What a draw of every arm costs; measured once for a folder of results, so that a second run agrees."""
        file, arms = scene.folder / "costs.json", {_name(*key): parts for key, parts in self._parts.items()}
        drawing = {key: value for key, value in self.drawing.items() if key != "seed"}
        settings = {**drawing, "sample_seed": self.drawing["seed"], "block": BLOCK}

        def write() -> None:
            if read_costs(file).keys() != arms.keys():
                write_costs(
                    file,
                    measure_costs(
                        scene.target, arms, settings, self.num_samples, self.timing_repeats, scene.workers.device
                    ),
                )

        scene.first(write)
        return read_costs(file)

    def _membership(self, scene: Scene, arms: Sequence[Arm], like: Record) -> list[Record]:
        """The loss attack on the plain denoiser and on every one that score terms protect."""
        members, heldout = told_images(scene.reference(), "the loss attack")
        rows = torch.arange(max(len(members), len(heldout)))
        asked: dict[str, Sequence[ScoreTerm]] = {UNPROTECTED: ()}
        for name, protection in self.protections.items():
            terms = protection.terms(scene.target, self._path, rows)
            if terms:
                asked[name] = terms
        options: dict[str, Any] = {
            "seed": self.drawing["seed"], "num_draws": self.num_draws, "workers": scene.workers,
        }  # fmt: skip
        losses = [
            reconstruction_losses(scene.target, images, self.timesteps, asked, name=name, **options)
            for name, images in (("members", members), ("heldout", heldout))
        ]
        found = []
        for arm in arms:
            if arm.attack != UNGUIDED or arm.protection not in asked:
                continue
            settings = {"num_draws": self.num_draws, **guidance_settings(asked[arm.protection])}
            settings.pop("guidance_clip", None)
            own, other = (part[arm.protection] for part in losses)
            for verdict in all_verdicts(
                arm.protection, own, other, self.timesteps, self.timesteps, self.timesteps, self.drawing["seed"]
            ):
                more = {"candidates": " ".join(map(str, self.timesteps))} if verdict.attacker == "calibrated" else {}
                found += [
                    told(
                        number, f"{PREFIX}{arm.protection}/", like,
                        arm.describe({**settings, **number.definition, **more}),
                    )
                    for number in verdict_numbers(verdict)
                ]  # fmt: skip
        return found

    def table(self, records: Sequence[Record]) -> Table:
        """One row an arm."""
        return protections_table(records)


def _name(attack: str, protection: str) -> str:
    """Of an arm, in files."""
    return f"{protection}@{attack}"
