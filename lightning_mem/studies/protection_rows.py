"""Chains of rows behind the studies of protections: a target, what its protections need, and the attacks on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mem.data.plan import Row, merge
from lightning_mem.studies.base import QUIET, AbstractStudy, Settings

PLAIN = "plain"
"""How the target is trained that protections protect."""


class ProtectionChains(AbstractStudy):
    """Per seed: the target, its random-label classifiers, its surrogate, and the attacks; see its subclasses.

    Args:
        config: Files of ``fit`` that train the target.
        random_label: Files of ``fit`` that train the random-label classifier.
        attack: Files of ``attack`` with :class:`lightning_mem.attacks.Protections`.
        num_members: Images of the target.
        classifiers: Random-label classifiers by name, each with its settings over the files; null for one, called
            ``random_label``.
        protections: By name, each a mapping with class_path and init_args. Where init_args name a ``random_label``, it
            is the name of one of ``classifiers``.
        guidances: Attacks by name, in the same way; a ``surrogate`` among init_args is put in by the study.
        surrogate: Files of ``fit`` that train SIDE's surrogate; null for none.
        trainings: Targets trained in other ways, by name, each with its settings over the target's files: they have no
            protections. null for none.
        loss: Files of ``attack`` with :class:`lightning_mem.attacks.LossAttack`; null for no such row.
        settings: Protections that the loss attack is tried on, by the word for ``definition.setting``.
        seeds: Each decides one target and all that is built on it; at least 3 for intervals.
        overrides: Further settings of ``fit`` for every target.
        attack_overrides: Of ``attack`` for :class:`Protections`.

    Raises:
        ValueError: If a file does not exist, seeds repeat or are missing, or a name is not known.
    """

    def __init__(
        self,
        config: list[str],
        random_label: list[str],
        attack: list[str],
        num_members: int,
        protections: Settings,
        classifiers: Settings | None = None,
        guidances: Settings | None = None,
        surrogate: list[str] | None = None,
        trainings: Settings | None = None,
        loss: list[str] | None = None,
        settings: dict[str, str] | None = None,
        seeds: list[int] | None = None,
        overrides: Settings | None = None,
        attack_overrides: Settings | None = None,
    ) -> None:
        super().__init__(config, overrides)
        self.seeds = [0, 1, 2] if seeds is None else seeds
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must hold at least one and none twice, got {self.seeds}")
        self.recipes = {
            "target": config, "random_label": random_label, "surrogate": surrogate or [], "attack": attack,
            "loss": loss or [],
        }  # fmt: skip
        files = [file for given in self.recipes.values() for file in given]
        missing = [file for file in files if not Path(file).is_file()]
        if missing or not (random_label and attack):
            raise ValueError(f"random_label and attack must name a file each, and all must exist; missing: {missing}")
        self.num_members, self.protections = num_members, dict(protections.values)
        self.classifiers = {"random_label": {}} if classifiers is None else dict(classifiers.values)
        self.guidances = {} if guidances is None else dict(guidances.values)
        self.trainings = {} if trainings is None else dict(trainings.values)
        self.words = dict(settings or {})
        self.attack_overrides = {} if attack_overrides is None else attack_overrides.values
        if PLAIN in self.trainings or set(self.trainings) & set(self.protections):
            raise ValueError(f"trainings must not be called {PLAIN} or as a protection, got {list(self.trainings)}")
        self._check()

    def _check(self) -> None:
        for name, given in {**self.protections, **self.guidances}.items():
            if not isinstance(given, Mapping) or "class_path" not in given:
                raise ValueError(f"{name} must be a mapping with class_path and init_args, got {given!r}")
            wanted = given.get("init_args", {}).get("random_label")
            if wanted is not None and wanted not in self.classifiers:
                raise ValueError(f"{name} takes the random_label {wanted!r}, but classifiers are {[*self.classifiers]}")
        unknown = [name for name in self.words.values() if name not in self.protections]
        if unknown or (self.words and not self.recipes["loss"]):
            raise ValueError(
                f"settings must name protections ({', '.join(self.protections)}) and need the files of loss, got "
                f"{self.words}"
            )
        if (
            any("surrogate" in given.get("init_args", {}) for given in self.guidances.values())
            and not self.recipes["surrogate"]
        ):
            raise ValueError("a guidance by a surrogate needs surrogate, the files of fit that train it")

    # --- rows ----------------------------------------------------------------------------------------------------

    def files(self, row: Row) -> list[str]:
        """By kind of row."""
        return self.recipes[row.kind.partition(":")[0]]

    def rows(self) -> list[Row]:
        """The whole chain of the first seed, then of the next."""
        return [row for seed in self.seeds for row in self._chain(seed)]

    def _chain(self, seed: int) -> list[Row]:
        found: list[Row] = []
        for training, own in {PLAIN: {}, **self.trainings}.items():
            end = f"seed{seed}" if training == PLAIN else f"{training}_seed{seed}"
            target = Row(
                f"target_{end}", seed=seed, num_members=self.num_members, overrides=merge(self.overrides, own),
                kind=f"target:{training}",
            )  # fmt: skip
            found.append(target)
            needs = [target.name]
            if training == PLAIN:
                for name, settings in self.classifiers.items():
                    found.append(
                        Row(f"{name}_{end}", seed=seed, overrides=settings, needs=(target.name,),
                            kind=f"random_label:{name}")
                    )  # fmt: skip
                    needs.append(found[-1].name)
            if self.recipes["surrogate"]:
                found.append(Row(f"surrogate_{end}", seed=seed, needs=(target.name,), kind="surrogate"))
                needs.append(found[-1].name)
            found.append(
                Row(f"attack_{end}", seed=seed, verb="attack", overrides=self.attack_overrides, needs=tuple(needs),
                    kind=f"attack:{training}")
            )  # fmt: skip
            if training == PLAIN:
                found += [
                    Row(f"loss_{word}_{end}", seed=seed, verb="attack", needs=tuple(needs), kind=f"loss:{word}")
                    for word in self.words
                ]
        return found

    def settings(self, row: Row, folder: str | Path, needed: Mapping[str, Path]) -> dict[str, Any]:
        """Of the row, with the folders of what it builds on in their places."""
        kind, _, word = row.kind.partition(":")
        places = {name.rpartition("_seed")[0]: str(path) for name, path in needed.items()}
        parents: dict[str, Any] = {}
        if kind != "target":
            target = next(path for name, path in places.items() if name.startswith("target"))
            if kind == "random_label":
                members = {"num_members": self.num_members}
                parents = {"model": {"init_args": {"target": target}}, "data": members}
            elif kind == "surrogate":
                source = {"init_args": {"target": target, "seed": row.seed}}
                parents = {"model": {"init_args": {"target": target}}, "data": {"source": source}}
            else:
                parents = {
                    "trainer": {"default_root_dir": target},
                    "attack": {"init_args": self._of_attack(kind, word, places)},
                }
        return merge(merge(QUIET, row.settings(folder)), parents)

    def _of_attack(self, kind: str, word: str, places: Mapping[str, str]) -> dict[str, Any]:
        if kind == "loss":
            return {"protection": self._placed(self.protections[self.words[word]], places), "setting": word}
        shields = self.protections if word == PLAIN else {}
        return {
            "training": word,
            "protections": {name: self._placed(given, places) for name, given in shields.items()},
            "guidances": {name: self._placed(given, places) for name, given in self.guidances.items()},
        }

    @staticmethod
    def _placed(given: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
        """An addition with the folders of the classifier and the surrogate that it names."""
        own = dict(given.get("init_args", {}))
        if own.get("random_label") is not None:
            own["random_label"] = places[str(own["random_label"])]
        if "surrogate" in own:
            own["surrogate"] = next(path for name, path in places.items() if name.startswith("surrogate"))
        return {"class_path": given["class_path"], "init_args": own}
