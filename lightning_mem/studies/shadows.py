"""Who was a member: attacks by number of members and by training step, and LiRA with shadow models on half splits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_mem.attacks.lira import least_shadows
from lightning_mem.data.plan import Row, merge
from lightning_mem.evaluation.curves import curve
from lightning_mem.records import Record, digest
from lightning_mem.studies.base import AbstractStudy, Run, Settings
from lightning_mem.studies.membership_picture import draw_membership, membership_table
from lightning_mem.studies.pooling import pooled_share, seeds_interval

Kind = Literal["target", "attack", "pool", "shadow", "lira"]

COSTS = ("evaluations", "seconds_per_image")
SEED_STEP = 1000
"""Between the seeds of two rounds of shadows: no shadow shares a split with a target."""


class MembershipStudy(AbstractStudy):
    """How well do membership attacks tell, by number of members and by training step, and what do shadow models add?

    A chain per seed: for every size a target and the attacks on it; then, where ``shadows`` is given, a pool, a target
    trained on a random half of it, as many shadow models on other halves, and LiRA on the target, which is among none
    of them. All are pooled over seeds under the attacks' own names, ``definition.num_members`` being the target's.

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
        seeds: Each decides targets and attacks; at least 3 for intervals over seeds.
        lira_seeds: Seeds that have a pool; null for the first seed alone.
        overrides: Further settings of ``fit`` for every row.

    Raises:
        ValueError: If sizes or seeds repeat or are missing, shadows are asked for without their files, or a file does
            not exist.

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
        }
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
        if not num_members and not shadows:
            raise ValueError("num_members must hold at least one size, or shadows be given")
        self.num_members, self.shadows = num_members, shadows

    def _check_shadows(self, shadows: int) -> None:
        """Refuses fewer than LiRA can use: an image that all or none were trained with stops it after all trainings."""
        data = _merged(self.recipes["pool"])["data"]
        images = int(data["num_members"]) + int(data.get("num_heldout", 512))
        about = _merged(self.recipes["lira"]).get("attack", {}).get("init_args", {})
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
        """All sizes of the first seed, then of the next; pools last."""
        rows = []
        for seed in self.seeds:
            for size in self.num_members:
                target = Row(f"target_{size}_seed{seed}", seed, size, overrides=self.overrides, kind="target")
                attack = Row(f"attack_{size}_seed{seed}", seed, verb="attack", needs=[target.name], kind="attack")
                rows += [target, attack]
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
        return Row(name, seed, self._half_size, overrides=self.overrides, kind=kind)

    @property
    def _half_size(self) -> int:
        """``data.num_members`` of the pool's files."""
        return int(_merged(self.recipes["pool"])["data"]["num_members"])

    def settings(self, row: Row, folder: str | Path, needed: Mapping[str, Path]) -> dict[str, Any]:
        """With the folders of targets and shadows in their places."""
        quiet = {"trainer": {"enable_progress_bar": False, "enable_model_summary": False}}
        own = merge(quiet, row.settings(folder))
        places = [str(needed[name]) for name in row.needs]
        if row.verb == "fit":
            return own
        parents: dict[str, Any] = {"trainer": {"default_root_dir": places[0]}}
        if row.kind == "lira":
            parents["attack"] = {"init_args": {"shadows": places[1:]}}
        return merge(own, parents)

    # --- pooling -------------------------------------------------------------------------------------------------

    def report(self, runs: Sequence[Run], folder: Path) -> list[Record]:
        """Pool seeds; writes ``membership.png`` and ``membership.md`` and prints the table."""
        records = []
        for size in self.num_members:
            own = [run for run in runs if run.row.name.startswith(f"target_{size}_")]
            records += _ratios(own, size)
            records += _pooled_attacks([run for run in runs if run.row.name.startswith(f"attack_{size}_")], size)
        pools = [run for run in runs if run.row.kind == "pool"]
        if pools:
            size = self._half_size
            records += _ratios(pools, size)
            records += _pooled_attacks([run for run in runs if run.row.kind == "lira"], size)
        if any(record.name.startswith("attack/") for record in records):
            draw_membership(records, folder / "membership.png")
            table = membership_table(records)
            (folder / "membership.md").write_text(table)
            print(f"{table}\nopen {folder / 'membership.png'}, membership.md and results.jsonl there")
        return records


def _merged(files: Sequence[str]) -> dict[str, Any]:
    """Files of settings, later ones laid over earlier ones."""
    found: dict[str, Any] = {}
    for file in files:
        found = merge(found, yaml.safe_load(Path(file).read_text()))
    return found


def _ratios(runs: Sequence[Run], size: int) -> list[Record]:
    """How much the targets copy at their last step."""
    last = [rows[-1] for run in runs if (rows := curve(run.records, "memorization/ratio"))]
    if not last:
        return []
    mean, low, high = pooled_share([record.value or 0.0 for record in last], last[0].n)
    return [_pooled(last, mean, low, high, size)]


def _pooled_attacks(runs: Sequence[Run], size: int) -> list[Record]:
    """Every number of the attacks, over the seeds that have it; a calibrated attacker may choose another t by seed."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        for record in run.records:
            if record.name.startswith("attack/") and record.value is not None:
                groups.setdefault(_key(record), []).append(record)
    found = []
    for own in groups.values():
        values = [record.value for record in own if record.value is not None]
        mean, (low, high) = sum(values) / len(values), _ends(own, values)
        found.append(_pooled(own, mean, low, high, size))
    return found


def _key(record: Record) -> str:
    """What a record of one seed has in common with those of the others."""
    free = {"t", "sign"} if record.definition.get("attacker") == "calibrated" else set()
    about = {key: value for key, value in record.definition.items() if key not in free}
    return digest(record.name, record.step, record.weights, about)


def _ends(own: Sequence[Record], values: Sequence[float]) -> tuple[float | None, float | None]:
    """An interval over seeds that is not narrower than the images of all seeds together allow."""
    if len(values) < 2:
        return own[0].low, own[0].high
    mean = sum(values) / len(values)
    low, high = seeds_interval(values)
    ends = [(r.low, r.high) for r in own if r.low is not None and r.high is not None]
    if len(ends) == len(own):
        below, above = (
            (sum((value - end) ** 2 for value, end in zip(values, side, strict=True)) ** 0.5) / len(values)
            for side in zip(*ends, strict=True)
        )
        low, high = min(low, mean - below), max(high, mean + above)
    if own[0].unit == "fraction":
        low, high = max(0.0, low), min(1.0, high)
    return low, high


def _pooled(own: Sequence[Record], value: float, low: float | None, high: float | None, size: int) -> Record:
    """A record of all seeds; its definition keeps what is equal in all of theirs."""
    first = own[0].definition
    kept = {
        key: value
        for key, value in first.items()
        if all(record.definition.get(key) == value for record in own) and "digest" not in key
    }
    tested = {f"tested_{key}": kept[key] for key in ("num_members", "num_heldout") if key in kept}
    kept.pop("num_heldout", None)
    method = {} if low is None else {"interval": "t over seeds, with the images', 95%"}
    about = {**kept, **(method if len(own) > 1 else {}), **tested, "num_members": size, "seeds": len(own)}
    return replace(
        own[0], value=value, low=low, high=high, n=sum(record.n for record in own), seed=0, seconds=0.0,
        data_digest="", config_digest="", run="pooled", definition=about,
    )  # fmt: skip
