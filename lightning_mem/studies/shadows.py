"""Who was a member, and who is given back: attacks by number of members, step and repeats, and LiRA on half splits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_mem.attacks.lira import least_shadows
from lightning_mem.data.plan import Row, merge
from lightning_mem.records import Record
from lightning_mem.studies.base import QUIET, AbstractStudy, Run, Settings
from lightning_mem.studies.membership_picture import draw_membership, membership_table
from lightning_mem.studies.membership_pool import REPEATED, pooled_attacks, pooled_ratios
from lightning_mem.studies.repeats_picture import draw_repeats, repeats_table

Kind = Literal["target", "attack", "pool", "shadow", "lira", "repeated", "extraction", "random_label", "protected"]

COSTS = ("evaluations", "seconds_per_image")
SEED_STEP = 1000
"""Between the seeds of two rounds of shadows: no shadow shares a split with a target."""


class MembershipStudy(AbstractStudy):
    """Who can be told for a member, who is given back, and what do shadow models, repeats and protection change?

    A chain per seed: for every size a target and the attacks on it; where ``repeated`` is given, a target some of whose
    members repeat, extraction from it, CPSample's classifier, and extraction under it; where ``shadows`` is given, a
    pool, a target trained on a random half of it, as many shadow models on other halves, and LiRA on the target, which
    is among none of them. All are pooled over seeds under the attacks' own names, ``definition.num_members`` being the
    target's, and ``definition.training`` the word ``repeated`` where members repeat.

    Args:
        config: Files of ``fit`` that train the targets.
        attack: Files of ``attack`` for the targets (``lightning_mem.attacks.Memberships``).
        num_members: Sizes of the targets, increasing.
        pool: Files of ``fit`` laid over ``config`` for the pool's target: a source of half splits
            (``lightning_mem.data.PoolSource``), and half of it as members and as held-out images.
        shadow: Files of ``fit`` laid over both for the shadows: what is watched less closely.
        lira: Files of ``attack`` for the pool's target (``lightning_mem.attacks.LiRA``, shadows left empty).
        shadows: Shadow models of a pool; 0 for no LiRA, which refuses an image that all or none were trained with: 16
            leave such an image in 3 of 100 pools of 1,024, 12 in 39. At least as many as rather leave none
            (:func:`lightning_mem.attacks.least_shadows`).
        repeated: Files of ``fit`` laid over ``config`` for a target with ``data.duplicates``; null for none.
        extraction: Files of ``attack`` for that target (``lightning_mem.attacks.Extraction``).
        random_label: Files of ``fit`` that train CPSample's classifier on it; null for no protected extraction.
        protected: Files of ``attack`` laid over ``extraction``, with its protection, whose ``random_label`` the study
            names.
        seeds: Each decides targets and attacks; at least 3 for intervals over seeds.
        lira_seeds: Seeds that have a pool; null for the first seed alone.
        overrides: Further settings of ``fit`` for every row.

    Raises:
        ValueError: If sizes or seeds repeat or are missing, shadows, repeats or protection are asked for without their
            files, or a file does not exist.

    Source:
        Carlini et al., arXiv:2301.13188, section 5.2 (16 shadow models on random halves).
    """

    def __init__(
        self,
        config: list[str],
        attack: list[str],
        num_members: list[int],
        pool: list[str] | None = None,
        shadow: list[str] | None = None,
        lira: list[str] | None = None,
        shadows: int = 0,
        repeated: list[str] | None = None,
        extraction: list[str] | None = None,
        random_label: list[str] | None = None,
        protected: list[str] | None = None,
        seeds: list[int] | None = None,
        lira_seeds: list[int] | None = None,
        overrides: Settings | None = None,
    ) -> None:
        super().__init__(config, overrides)
        self.seeds = [0, 1, 2] if seeds is None else seeds
        self.lira_seeds = self.seeds[:1] if lira_seeds is None else lira_seeds
        halves = [*config, *(pool or [])]
        self.recipes: dict[str, list[str]] = {
            "target": config,
            "attack": attack,
            "pool": halves,
            "shadow": [*halves, *(shadow or [])],
            "lira": lira or [],
            "repeated": [*config, *(repeated or [])],
            "extraction": extraction or [],
            "random_label": random_label or [],
            "protected": [*(extraction or []), *(protected or [])],
        }
        self.repeats = bool(repeated)
        missing = sorted({file for files in self.recipes.values() for file in files if not Path(file).is_file()})
        if missing or not attack:
            raise ValueError(f"attack must name at least one file, and all must exist; missing: {missing}")
        for what, given in (("num_members", num_members), ("seeds", self.seeds), ("lira_seeds", self.lira_seeds)):
            if (not given and what != "num_members") or given != sorted(set(given)):
                raise ValueError(f"{what} must increase and hold at least one, got {given}")
        if shadows and (not pool or not lira):
            raise ValueError(f"shadows needs files for pool and lira, got pool {pool} and lira {lira}")
        if shadows:
            self._check_shadows(shadows)
        if (repeated and not extraction) or bool(random_label) != bool(protected) or (random_label and not repeated):
            raise ValueError(
                "repeated needs files for extraction, and random_label and protected need each other and repeated, got "
                f"repeated {repeated}, extraction {extraction}, random_label {random_label}, protected {protected}"
            )
        if not (num_members or shadows or repeated):
            raise ValueError("num_members must hold at least one size, or shadows or repeated be given")
        self.num_members, self.shadows = num_members, shadows

    def _check_shadows(self, shadows: int) -> None:
        """Refuses fewer than LiRA can use: an image that all or none were trained with stops it after all trainings."""
        data = self._recipe("pool")["data"]
        images = int(data["num_members"]) + int(data.get("num_heldout", 512))
        about = self._recipe("lira").get("attack", {}).get("init_args", {})
        mode, variance = about.get("mode", "online"), about.get("variance", "global")
        least = least_shadows(images, mode, variance)
        if shadows < least:
            raise ValueError(
                f"shadows must be at least {least} for LiRA ({mode}, {variance} variance) on a pool of {images}, got "
                f"{shadows}: with fewer, some image likely is in too few or too many of their halves"
            )

    def files(self, row: Row) -> list[str]:
        """By kind of row."""
        return self.recipes[row.kind]

    def rows(self) -> list[Row]:
        """All sizes of the first seed and its repeats, then of the next; pools last."""
        rows = []
        for seed in self.seeds:
            for size in self.num_members:
                target = Row(f"target_{size}_seed{seed}", seed, size, overrides=self.overrides, kind="target")
                attack = Row(f"attack_{size}_seed{seed}", seed, verb="attack", needs=[target.name], kind="attack")
                rows += [target, attack]
            rows += self._repeated(seed) if self.repeats else []
        for seed in self.lira_seeds if self.shadows else ():
            pool = self._half(f"pool_seed{seed}", seed, "pool")
            shadows = [
                self._half(f"shadow{number:02d}_seed{seed}", SEED_STEP * (seed + 1) + number, "shadow")
                for number in range(self.shadows)
            ]
            needs = [pool.name, *(row.name for row in shadows)]
            rows += [pool, *shadows, Row(f"lira_seed{seed}", seed, verb="attack", needs=needs, kind="lira")]
        return rows

    def _half(self, name: str, seed: int, kind: Kind) -> Row:
        """A training on half of the pool, whose size its files say."""
        return Row(name, seed, self._size("pool"), overrides=self.overrides, kind=kind)

    def _repeated(self, seed: int) -> list[Row]:
        """A target with repeats, extraction from it, its classifier, and extraction under protection."""
        target = Row(f"repeated_seed{seed}", seed, self._size("repeated"), overrides=self.overrides, kind="repeated")
        found = [target, Row(f"extraction_seed{seed}", seed, verb="attack", needs=[target.name], kind="extraction")]
        if self.recipes["random_label"]:
            labels = Row(f"labels_seed{seed}", seed, needs=[target.name], kind="random_label")
            needs = [target.name, labels.name]
            found += [labels, Row(f"protected_seed{seed}", seed, verb="attack", needs=needs, kind="protected")]
        return found

    def _recipe(self, kind: Kind) -> dict[str, Any]:
        """The files of a kind of row as one."""
        found: dict[str, Any] = {}
        for file in self.recipes[kind]:
            found = merge(found, yaml.safe_load(Path(file).read_text()))
        return found

    def _size(self, kind: Kind) -> int:
        """``data.num_members`` of a kind's files."""
        return int(self._recipe(kind)["data"]["num_members"])

    def settings(self, row: Row, folder: str | Path, needed: Mapping[str, Path]) -> dict[str, Any]:
        """With the folders of targets and shadows in their places."""
        own = merge(QUIET, row.settings(folder))
        places = [str(needed[name]) for name in row.needs]
        if row.kind == "random_label":
            target, size = {"init_args": {"target": places[0]}}, {"num_members": self._size("repeated")}
            return merge(own, {"model": target, "data": size})
        if row.verb == "fit":
            return own
        parents: dict[str, Any] = {"trainer": {"default_root_dir": places[0]}}
        if row.kind == "lira":
            parents["attack"] = {"init_args": {"shadows": places[1:]}}
        if row.kind == "protected":
            given = self._recipe("protected")["attack"]["init_args"]["protection"]
            protection = merge(given, {"init_args": {"random_label": places[1]}})
            parents["attack"] = {"init_args": {"protection": protection}}
        return merge(own, parents)

    # --- pooling -------------------------------------------------------------------------------------------------

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """Pool seeds; writes ``membership.png``, ``repeats.png`` and ``membership.md`` and prints the tables."""
        records = []
        for size in self.num_members:
            own = [run for run in runs if run.row.name.startswith(f"target_{size}_")]
            records += pooled_ratios(own, size)
            records += pooled_attacks([run for run in runs if run.row.name.startswith(f"attack_{size}_")], size)
        pools = [run for run in runs if run.row.kind == "pool"]
        if pools:
            size = self._size("pool")
            records += pooled_ratios(pools, size)
            records += pooled_attacks([run for run in runs if run.row.kind == "lira"], size)
        if self.repeats:
            size = self._size("repeated")
            records += pooled_ratios([run for run in runs if run.row.kind == "repeated"], size, REPEATED)
            drawn = [run for run in runs if run.row.kind in ("extraction", "protected")]
            records += pooled_attacks(drawn, size, REPEATED)
        if any(record.name.startswith("attack/") for record in records):
            draw_membership(records, folder / "membership.png")
            draw_repeats(records, folder / "repeats.png")
            table = "\n".join(filter(None, (membership_table(records), repeats_table(records))))
            (folder / "membership.md").write_text(table)
            print(f"{table}\nopen membership.md, the pictures and results.jsonl in {folder}")
        return records
