"""The data of a trained run, read again from its folder and checked to be those it was trained on."""

from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_mem.data import MemorizationDataModule
from lightning_mem.evaluation.inputs import check_members, is_run, read_run_config
from lightning_mem.modules.random_label import target_members


def run_folder(path: str | Path) -> Path:
    """The run folder that a checkpoint lies in, or the folder itself.

    Raises:
        ValueError: If there is none: a diffusers model does not say its images.
    """
    path = Path(path)
    for folder in (path, path.parent.parent):
        if is_run(folder):
            return folder
    raise ValueError(f"{path} lies in no run folder (one with a config.yaml), so its training images are not known")


def run_data(path: str | Path) -> MemorizationDataModule:
    """The data module of a trained run, set up: its members, held-out images and source.

    Args:
        path: The run folder, or a checkpoint in it.

    Raises:
        ValueError: If there is no run folder, or the images found now are not those that ``members.json`` and the
            checkpoint name (by digest).
    """
    folder = run_folder(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MemorizationDataModule, "data")
    options = {"data": read_run_config(folder)["data"]}
    data: MemorizationDataModule = parser.instantiate_classes(parser.parse_object(options)).data
    data.prepare_data()
    data.setup()
    check_members(folder, {"members": data.members.digest, "heldout": data.heldout.digest})
    trained = target_members(path)
    if trained and trained != data.members.digest:
        raise ValueError(
            f"{path} was trained on the member set {trained}, but {folder}/config.yaml leads to {data.members.digest}: "
            "the source has changed since, or the file is of another run"
        )
    return data
