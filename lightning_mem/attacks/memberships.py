"""Several membership attacks on the same images, at the last checkpoint and along training."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from lightning_mem.attacks.base import AbstractAttack
from lightning_mem.attacks.conditions import Captions, conditions_of
from lightning_mem.attacks.membership import AbstractMembership, shift, write_images
from lightning_mem.attacks.membership_scores import Sides, curve_numbers, told_images
from lightning_mem.diffusion import Target
from lightning_mem.evaluation import Scene
from lightning_mem.evaluation.checkpoints import find_checkpoints
from lightning_mem.modules import load_target
from lightning_mem.records import Record, digest


class Memberships(AbstractAttack):
    """Every membership attack of a list on the same images; each leaves the records it leaves alone.

    ``tables/membership.csv`` has a column for every attack and timestep (``pia_t200``), beside what the run's ledger
    says of the image: how often it was copied, and how closely. With ``checkpoints``, the records
    ``attack/<name>/auc_curve`` follow the plain denoiser along the training, each under its own step, at the attack's
    ``curve`` or, without one, at its ``timesteps``; all other records are of the attacked checkpoint alone.

    Args:
        attacks: By class_path; names differ.
        checkpoints: Files of the run folder, as a glob below it, such as ``checkpoints/step*.ckpt``; null for none.

    Raises:
        ValueError: If there is no attack, two share a name, or no file matches.
    """

    name = "membership"

    def __init__(self, attacks: list[AbstractMembership], checkpoints: str | None = None) -> None:
        names = [attack.name for attack in attacks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"attacks must be at least one and no two of one name, got {names}")
        self.attacks, self.checkpoints = attacks, checkpoints
        self.threat_model = "\n".join(attack.threat_model for attack in attacks)

    def prepare(self, target: Target, captions: Callable[[], Captions | None]) -> None:
        """Every attack's; see :class:`AbstractAttack`."""
        for attack in self.attacks:
            attack.prepare(target, captions)

    def identity(self, target: Target, path: str, home: Path) -> str:
        """Digest of the attacks' own; see :class:`AbstractAttack`."""
        return digest([attack.identity(target, path, home) for attack in self.attacks], self.checkpoints)

    def run(self, scene: Scene) -> list[Record]:
        """One attack after the other, then the checkpoints; see :class:`AbstractAttack`."""
        reference = scene.reference()
        images = told_images(reference, "a membership attack")
        p_value = shift(images, "a membership attack")
        records: list[Record] = []
        columns: dict[str, Sides] = {}
        times: dict[str, Sequence[int]] = {}
        for attack in self.attacks:
            attack.conditions = conditions_of(scene.target, reference, attack.condition)
            told = attack.tell(scene.target, images, scene.workers)
            numbers = [*attack.numbers(told), *attack.extra_numbers(told, p_value)]
            records += [attack.record(number, scene, reference.members_digest, told.seconds) for number in numbers]
            for arm, sides in told.scores.items():
                column = attack.name if arm == "none" else f"{attack.name}_{arm}"
                columns[column], times[column] = sides, told.times
        if self.checkpoints is not None:
            known = {record.identity for record in records}  # the attacked checkpoint may be one of them
            along = self._along(scene, images, reference.members_digest)
            records += [record for record in along if record.identity not in known]
        scene.first(lambda: write_images(scene, reference, columns, times))
        return records

    def _along(self, scene: Scene, images: Sides, data_digest: str) -> list[Record]:
        """``auc_curve`` of the plain denoiser at every checkpoint."""
        found: dict[str, Record] = {}
        for checkpoint in find_checkpoints(str(scene.home / str(self.checkpoints))):
            target = load_target(checkpoint.path, scene.target.weights, str(scene.workers.device))
            there = replace(scene, target=target, step=checkpoint.step)
            for attack in self.attacks:
                told = attack.at(attack.curve or attack.timesteps).tell_plain(target, images, scene.workers)
                for number in curve_numbers(told.tested("none"), told.times, told.times):
                    defined = attack.defined(number, told.settings["none"])
                    record = attack.record(defined, there, data_digest, told.seconds)
                    found[record.identity] = record
        return list(found.values())

    def table(self, records: Sequence[Record]) -> Table:
        """The attacks' tables, one below the other."""
        whole = Table.grid()
        for attack in self.attacks:
            whole.add_row(attack.table([record for record in records if record.name.startswith(attack.prefix)]))
        return whole
