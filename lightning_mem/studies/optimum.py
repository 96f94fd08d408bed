"""The closed-form optimum beside a trained network: the ratio that no training can exceed."""

from dataclasses import replace
from typing import Any

from jsonargparse import ArgumentParser

from lightning_mem.diffusion import DiffusionProcess, EmpiricalDenoiser
from lightning_mem.evaluation import Measure, Reference, draw_samples
from lightning_mem.evaluation.curves import curve
from lightning_mem.records import Record
from lightning_mem.studies.base import Run
from lightning_mem.studies.recipe import read_data


def optimum_ratio(run: Run) -> Record | None:
    """The ratio of samples drawn from the closed-form optimum on a run's images, as the run draws its own.

    Args:
        run: A finished run; its labels condition the optimum as they do the network.

    Returns:
        One record; null where the configuration does not name a process: no denoiser, or one of a pretrained
        folder.
    """
    settings = run.config["model"]["init_args"]
    if "process" not in settings or (settings["process"] is None and settings.get("pretrained") is not None):
        return None
    parser = ArgumentParser()
    parser.add_argument("--process", type=DiffusionProcess | None)
    process = parser.instantiate(parser.parse_object({"process": settings["process"]})).process or DiffusionProcess()
    data = read_data(run.config)
    images, owners = data.bank()
    labels = data.members.labels
    if labels is not None:  # a label that no image carries has no optimum
        labels = labels.unique(return_inverse=True)[1][owners]
    like = curve(run.records, "memorization/ratio")[-1]
    drawing: dict[str, Any] = {key: like.definition[key] for key in ("sampler", "num_steps", "eta")}
    target = EmpiricalDenoiser(images, process, labels).target()
    samples = draw_samples(target, like.definition["num_samples"], seed=like.definition["sample_seed"], **drawing)
    measured = Measure(Reference.from_datamodule(data), (), threshold=like.definition["threshold"])(samples)
    ratio = next(record for record in measured.records if record.name == "memorization/ratio")
    rule = run.config["data"]["labels"]
    about = {"num_members": len(data.members), "labels": rule, "denoiser": "closed-form optimum"}
    return replace(ratio, name="emm/optimum", run="closed form", definition={**ratio.definition, **about})
