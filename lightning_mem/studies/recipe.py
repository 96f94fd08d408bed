"""When two trainings are the same: the settings that decide the numbers, and the images."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lightning_mem.data import MemorizationDataModule
from lightning_mem.data.split import read_indices
from lightning_mem.records import digest
from lightning_mem.studies.base import ReadConfig

NOT_DECIDING = {
    "accelerator", "default_root_dir", "devices", "enable_checkpointing", "enable_model_summary", "enable_progress_bar",
    "log_every_n_steps", "logger", "num_nodes", "profiler", "strategy",
}  # fmt: skip
"""Settings of the Trainer that say where a run happens and what is shown; measured numbers do not depend on them."""

LOOKING_ON = {"Gallery", "ModelCheckpoint", "RichProgressBar", "TQDMProgressBar"}
"""Callbacks that change neither training nor what is measured."""


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a complete configuration of ``fit`` that decides the numbers; files of indices by their content.

    Raises:
        ValueError: If a file of indices cannot be read.
    """
    trainer = {key: value for key, value in config["trainer"].items() if key not in NOT_DECIDING}
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer["callbacks"] = [c for c in callbacks if c["class_path"].rsplit(".", 1)[-1] not in LOOKING_ON]
    data = {key: value for key, value in config["data"].items() if key != "num_workers"}
    for part in ("members", "heldout"):
        if data.get(part) is not None:
            data[part] = digest(read_indices(data[part], part))
    return {"seed": config["seed_everything"], "model": config["model"], "data": data, "trainer": trainer}


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


def is_finished(folder: Path) -> bool:
    """Whether ``fit`` came to its end there."""
    return (folder / "summary.json").is_file() and (folder / "config.yaml").is_file()


class FinishedRuns:
    """Run folders that may spare a training, found by a walk over some folders.

    Args:
        roots: Folders; all run folders below them are looked at.
        read_config: See :data:`ReadConfig`.
    """

    def __init__(self, roots: Iterable[str | Path], read_config: ReadConfig) -> None:
        self._read_config = read_config
        self._folders: dict[tuple[str, ...], list[Path]] = defaultdict(list)
        for root in roots:
            for summary in sorted(Path(root).rglob("summary.json")):
                folder = summary.parent
                if is_finished(folder) and (folder / "members.json").is_file():
                    self._folders[self._key(yaml.safe_load((folder / "config.yaml").read_text()))].append(folder)

    @staticmethod
    def _key(config: Mapping[str, Any]) -> tuple[str, ...]:
        # enough to pass over nearly all of them before one is parsed
        data, trainer = config.get("data") or {}, config.get("trainer") or {}
        parts = (config.get("seed_everything"), data.get("seed"), data.get("num_members"), trainer.get("max_steps"))
        return tuple(map(str, parts))

    def find(self, config: Mapping[str, Any]) -> Path | None:
        """The first finished run with the same deciding settings and the same images."""
        wanted = deciding(config)
        for folder in self._folders.get(self._key(config), []):
            if self.settings_of(folder) == wanted and data_digest_in(folder) == data_digest_of(config):
                return folder
        return None

    def settings_of(self, folder: Path) -> dict[str, Any] | None:
        """Deciding settings of a run folder; null where today's ``fit`` cannot read its configuration."""
        try:
            return deciding(self._read_config(["--config", str(folder / "config.yaml")]))
        except ValueError:
            return None
