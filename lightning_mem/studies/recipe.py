"""When two runs are the same: the settings that decide the numbers, the images, and the runs they build on."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lightning_mem.data import MemorizationDataModule
from lightning_mem.data.plan import Verb
from lightning_mem.data.split import read_indices
from lightning_mem.records import atomic_write, digest
from lightning_mem.studies.base import ReadConfig

NOT_DECIDING = {
    "accelerator", "default_root_dir", "devices", "enable_checkpointing", "enable_model_summary", "enable_progress_bar",
    "log_every_n_steps", "logger", "num_nodes", "profiler", "strategy",
}  # fmt: skip
"""Settings of the Trainer that say where a run happens and what is shown; measured numbers do not depend on them."""

LOOKING_ON = {"Gallery", "ModelCheckpoint", "RichProgressBar", "TQDMProgressBar"}
"""Callbacks that change neither training nor what is measured; of a surrogate the best checkpoint is the one used."""


SURROGATE = "SurrogateModule"

PARENTS = {"target", "surrogate", "time_independent", "random_label", "shadows", "subsets"}
"""Keys whose value is the folder of a run that this one builds on, or lists of them: a run counts by what made it, not
by its place."""

OF_THE_PROCESS = {"config", "out", "trainer", "weights_only"}
"""Settings of an attack or attribution that say where it happens; its Trainer names the run folder of its target, a
parent."""


ARGUMENTS: dict[Verb, str] = {"attack": "attack", "attribute": "attribution"}
"""The argument that tells a configuration of this verb from one of ``fit``."""


def verb_of(config: Mapping[str, Any]) -> Verb:
    """Whose configuration it is."""
    return next((verb for verb, argument in ARGUMENTS.items() if argument in config), "fit")


def deciding(config: Mapping[str, Any], identify: Callable[[str], str] = str) -> dict[str, Any]:
    """The part of a complete configuration that decides the numbers; files of indices by their content.

    Args:
        config: Of a row's verb.
        identify: What stands for the folder of a run that this one builds on.

    Raises:
        ValueError: If a file of indices cannot be read.
    """
    data = {key: value for key, value in config["data"].items() if key != "num_workers"}
    for part in ("members", "heldout"):
        if data.get(part) is not None:
            data[part] = digest(read_indices(data[part], part))
    found: dict[str, Any] = {"seed": config["seed_everything"], "model": config["model"], "data": data}
    if verb_of(config) != "fit":
        passed = {*found, *OF_THE_PROCESS, "seed_everything"}
        own = {key: value for key, value in config.items() if key not in passed}
        return _identified({**found, **own, "target": config["trainer"]["default_root_dir"]}, identify)
    trainer = {key: value for key, value in config["trainer"].items() if key not in NOT_DECIDING}
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    passing = LOOKING_ON - ({"ModelCheckpoint"} if config["model"].get("class_path", "").endswith(SURROGATE) else set())
    trainer["callbacks"] = [c for c in callbacks if c["class_path"].rsplit(".", 1)[-1] not in passing]
    return _identified({**found, "trainer": trainer}, identify)


def _identified(settings: Any, identify: Callable[[str], str]) -> Any:
    """Nested settings with what stands for parents in place of their folders."""
    if isinstance(settings, Mapping):
        return {
            key: _parent(value, identify) if key in PARENTS else _identified(value, identify)
            for key, value in settings.items()
        }
    return [_identified(value, identify) for value in settings] if isinstance(settings, list) else settings


def _parent(value: Any, identify: Callable[[str], str]) -> Any:
    """What stands for one folder, or for each of a list; other values as they are, with the parents within."""
    if isinstance(value, list):
        return [_parent(part, identify) for part in value]
    return identify(value) if isinstance(value, str) else _identified(value, identify)


def parents_of(config: Mapping[str, Any]) -> list[str]:
    """Folders of the runs that a configuration names as those it builds on."""
    found: list[str] = []

    def note(folder: str) -> str:
        found.append(folder)
        return folder

    deciding(config, note)
    return found


def differing(one: Any, other: Any, where: str = "") -> list[str]:
    """Dotted keys at which two nested settings differ; lists are compared as a whole."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys([*one, *other])
        missing = object()
        found = [differing(one.get(k, missing), other.get(k, missing), f"{where}.{k}".lstrip(".")) for k in keys]
        return [key for keys_below in found for key in keys_below]
    return [] if one == other else [where]


def read_data(config: Mapping[str, Any]) -> MemorizationDataModule:
    """The data module of a complete configuration, read."""
    parser = ArgumentParser()
    parser.add_class_arguments(MemorizationDataModule, "data")
    data = parser.instantiate(parser.parse_object({"data": config["data"]})).data
    data.prepare_data()
    data.setup()
    return data


def data_digest_of(config: Mapping[str, Any]) -> str:
    """Digest of the members and held-out images that a configuration leads to; reads them."""
    data = read_data(config)
    return digest(data.members.digest, data.heldout.digest)


def data_digest_in(folder: Path) -> str:
    """The same digest of a run, from its ``members.json``; empty without one."""
    path = folder / "members.json"
    if not path.is_file():
        return ""
    content = json.loads(path.read_text())
    return digest(content["members"]["digest"], content["heldout"]["digest"])


def is_finished(folder: Path, verb: Verb = "fit") -> bool:
    """Whether the verb came to its end there; a study writes the configuration of other verbs than ``fit`` then."""
    return (folder / "config.yaml").is_file() and (folder / LAST_FILE[verb]).is_file()


LAST_FILE: dict[Verb, str] = {"fit": "summary.json", "attack": "results.jsonl", "attribute": "results.jsonl"}
"""What a verb leaves behind at its end."""

PARENTS_FILE = "parents.json"
"""In a folder whose run builds on others: what they were then."""


class FinishedRuns:
    """Folders of runs and attacks that may spare one, found by a walk over some folders.

    Args:
        roots: Folders; all below them are looked at.
        read_config: See :class:`ReadConfig`.
    """

    def __init__(self, roots: Iterable[str | Path], read_config: ReadConfig) -> None:
        self._read_config = read_config
        self._known: dict[str, str] = {}
        self._folders: dict[tuple[str, ...], list[Path]] = defaultdict(list)
        for root in roots:
            for path in sorted(Path(root).rglob("config.yaml")):
                folder = path.parent
                if not any((folder / last).is_file() for last in LAST_FILE.values()):
                    continue
                config = yaml.safe_load(path.read_text())
                verb = verb_of(config)
                if is_finished(folder, verb) and (verb != "fit" or (folder / "members.json").is_file()):
                    self._folders[self._key(config)].append(folder)

    @staticmethod
    def _key(config: Mapping[str, Any]) -> tuple[str, ...]:
        # enough to pass over nearly all of them before one is parsed
        data, trainer = config.get("data") or {}, config.get("trainer") or {}
        steps = trainer.get("max_steps") if verb_of(config) == "fit" else None
        return tuple(
            map(str, (verb_of(config), config.get("seed_everything"), data.get("seed"), data.get("num_members"), steps))
        )

    def learn(self, folder: str | Path, identity: str) -> None:
        """From now on a folder counts as this, whether or not it holds a run yet."""
        self._known[os.path.normpath(folder)] = identity

    def identify(self, folder: str) -> str:
        """What stands for a run: the digest of its deciding settings; its path where it cannot be read."""
        place = os.path.normpath(folder)
        if place not in self._known:
            settings = self.settings_of(Path(place)) if (Path(place) / "config.yaml").is_file() else None
            self._known[place] = folder if settings is None else digest(settings)
        return self._known[place]

    def deciding(self, config: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
        """The deciding settings, with the identity of each run that the configuration builds on.

        Args:
            config: The configuration.
            folder: Of a finished row: its parents count as what they were when it was run.
        """
        path = None if folder is None else folder / PARENTS_FILE
        then = json.loads(path.read_text()) if path is not None and path.is_file() else {}
        return deciding(config, lambda parent: then.get(parent) or self.identify(parent))

    def note_parents(self, config: Mapping[str, Any], folder: Path) -> None:
        """Write down what a row was run on: a parent may go on, and its folder then holds another run."""
        found = {parent: self.identify(parent) for parent in parents_of(config)}
        if found:
            with atomic_write(folder / PARENTS_FILE) as file:
                json.dump(found, file, indent=1)

    def find(self, config: Mapping[str, Any]) -> Path | None:
        """The first finished run with the same deciding settings and the same images.

        The images of a run that builds on another follow from the other's: they are not read.
        """
        wanted, derived = self.deciding(config), bool(parents_of(config))
        for folder in self._folders.get(self._key(config), []):
            if self.settings_of(folder) == wanted and (derived or data_digest_in(folder) == data_digest_of(config)):
                return folder
        return None

    def settings_of(self, folder: Path) -> dict[str, Any] | None:
        """Deciding settings of a folder; null where today's verb cannot read its configuration."""
        path = folder / "config.yaml"
        try:
            verb = verb_of(yaml.safe_load(path.read_text()))
            return self.deciding(self._read_config(["--config", str(path)], verb), folder)
        except ValueError:
            return None
