"""The verb ``evaluate``: its options, the training set they lead to, and its exit status."""

import os
import sys
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from lightning_mem.data import AbstractSource, ArraySource, MemorizationDataModule
from lightning_mem.data.listed import source_of
from lightning_mem.diffusion import Sampler
from lightning_mem.evaluation.checkpoints import Draw, check_trained_on, find_checkpoints, measure_checkpoints
from lightning_mem.evaluation.comparison import cache_folder
from lightning_mem.evaluation.evaluate import (
    Compared,
    best_device,
    exceeded,
    find_sources,
    measure_source,
    parse_limits,
    print_measurement,
)
from lightning_mem.evaluation.inputs import (
    check_members,
    content_digest,
    is_run,
    read_run_config,
    read_stack,
    shape_of,
)
from lightning_mem.evaluation.measure import EVERY, Measure, MetricName
from lightning_mem.evaluation.reference import Reference, files_of
from lightning_mem.evaluation.table import curve_table
from lightning_mem.evaluation.workers import Workers
from lightning_mem.types import Weights

WAYS = (
    "say what the samples are compared with: --config RUN/config.yaml, --data.* or --source as for `fit`, or "
    "--members FILE_OR_FOLDER [--heldout FILE_OR_FOLDER]"
)

NOT_USED = ("model", "seed_everything", "ckpt_path", "weights_only")
"""Parts of a run's configuration that say nothing about its images or how they are measured."""


def evaluate(
    samples: list[str] | None = None,
    data: Mapping[str, Any] | None = None,
    source: AbstractSource | None = None,
    members: str | None = None,
    heldout: str | None = None,
    checkpoints: str | None = None,
    metrics: list[MetricName] | None = None,
    extractors: list[str] | None = None,
    extractor_weights: dict[str, str] | None = None,
    threshold: float | None = None,
    delta: float | None = None,
    resize: bool = False,
    out: str | None = None,
    step: int | None = None,
    pairs: int = 32,
    fail_above: list[str] | None = None,
    compare: Compared = "value",
    num_samples: int | None = None,
    num_steps: int | None = None,
    sampler: Sampler | None = None,
    eta: float | None = None,
    sample_seed: int | None = None,
    weights: Weights = "ema",
    cache_dir: str | None = "auto",
    device: str = "auto",
    trainer: Mapping[str, Any] | None = None,
    run: str | None = None,
) -> list[str]:
    """Measure samples of any generator against a training set: every metric, its interval and held-out control.

    Prints a table; writes ``results.jsonl`` and ``ledger.csv``, and draws the closest pairs in ``images/``.

    Args:
        samples: What to measure, each on its own: ``.npz`` (``arr_0`` uint8 [N, H, W, C]), ``.npy``, folders of images,
            or run folders (the samples of the last evaluation). ``.npz`` and folders may come from any generator.
        data: Training and held-out images as for ``fit``; a run's ``config.yaml`` holds them. Sizes that are not given
            are taken from the samples.
        source: Shorter for ``data.source``.
        members: Training images: a folder, ``.npz``, ``.npy``, or a ``.csv`` that names them; all, as they are.
        heldout: Images of the same kind that were never trained on, for the control; with ``members``.
        checkpoints: A glob, quoted: draw samples from each of these checkpoints, measure them, and draw the curve.
            Those whose records are there already are passed over.
        metrics: Families of numbers; null for all.
        extractors: Feature spaces: ``pixels``, ``inception``, ``inception-64``, ``timm/<model>``, ``sscd``; null takes
            the run's, else ``pixels``.
        extractor_weights: Local weight file per extractor name; null takes the run's.
        threshold: Of the memorization ratio, in (0, 1); null takes the run's, else 1/3.
        delta: RMS-L2 on [0, 1] up to which a training image counts as extracted; null takes the run's, else 0.15.
        resize: Make samples of another size or number of channels fit the training images (short side, antialiased,
            centre crop; grey by luma). It becomes part of every definition. Off, they are refused.
        out: Folder of the results. Null: the run folder for its own last samples, ``<samples>_evaluation`` beside all
            others, ``<run>/checkpoints_evaluation`` for checkpoints.
        step: Optimizer steps of the network that drew the samples, for the records; null for the run's last, else 0.
        pairs: How many pairs of sample and nearest training image to draw, the closest first.
        fail_above: Limits ``KEY=NUMBER``, e.g. ``memorization/ratio=0.01``; may be repeated. Above one the exit status
            is 1.
        compare: What is compared with a limit: ``value``, the number itself, or ``low``, the lower end of its 95 %
            interval: then chance alone seldom fails a model.
        num_samples: Samples of each checkpoint; null takes the run's, else 512.
        num_steps: Sampler steps of checkpoints; null takes the run's, else 50.
        sampler: For checkpoints: ``ddim``, ``ddpm``, ``dpm++``, ``heun`` or ``euler``; null takes the run's, else ddim.
        eta: DDIM's share of fresh noise, 0 to 1; null takes the run's, else 0.
        sample_seed: Seed of noise and labels of checkpoints; null takes the run's, else 0.
        weights: Of checkpoints: ``ema`` takes averaged weights where there are any, ``raw`` the optimizer's own.
        cache_dir: Folder where features of reference images are kept; ``auto`` takes the environment's
            LIGHTNING_MEM_CACHE, else ``~/.cache/lightning_mem``; null keeps none.
        device: Where to compute; ``auto`` takes a GPU where there is one.
        trainer: Of the run's configuration: how it measured itself.
        run: Folder of the run that ``data`` is of: its ``members.json`` must name the images that are found.

    Returns:
        What lies above its limit, in words; empty when nothing does.

    Raises:
        ValueError: If an option is not legal, inputs cannot be read or do not fit, or there is no training set.
        FileNotFoundError: If there is nothing at a path.
    """
    if bool(samples) == (checkpoints is not None):
        raise ValueError("give --samples X [X2 ...] or --checkpoints 'GLOB', one of the two")
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    limits = parse_limits(fail_above or [])
    found = find_checkpoints(checkpoints) if checkpoints is not None else []
    given = [path for path in samples or [] if is_run(path)] or [str(c.path.parent.parent) for c in found[:1]]
    if members is None and source is None and data is None and given and is_run(given[0]):
        run, config = given[0], read_run_config(given[0])
        data, trainer = config["data"], config.get("trainer")
    measured = _run_settings(trainer)
    reference = _reference(samples, data, source, members, heldout, run, resize)
    check_trained_on(found, reference.members_digest)
    measure = Measure(
        reference,
        extractors or measured.get("extractors") or ["pixels"],
        extractor_weights or measured.get("extractor_weights"),
        measured.get("threshold", 1 / 3) if threshold is None else threshold,
        Workers(device=best_device(device)),
        metrics or EVERY,
        measured.get("delta", 0.15) if delta is None else delta,
        cache_folder(cache_dir),
    )
    console = Console()
    all_records = []
    if found:
        asked: dict[str, Any] = {
            "num_samples": num_samples, "num_steps": num_steps, "sampler": sampler, "eta": eta, "seed": sample_seed,
        }  # fmt: skip
        settings = {key: measured[key] for key in asked if key in measured}
        draw = Draw(**settings | {key: value for key, value in asked.items() if value is not None}, weights=weights)
        folder = Path(out or found[0].path.parent.parent / "checkpoints_evaluation")
        all_records = measure_checkpoints(found, measure, draw, folder, pairs=pairs)
        console.print(curve_table(all_records, f"{checkpoints}: {draw.num_samples} samples each"))
        console.print(f"results.jsonl, ledger.csv and images/curves.png in {folder}\n")
    for one in find_sources(samples or [], reference, resize=resize, out=out, step=step):
        measurement = measure_source(one, measure, pairs)
        print_measurement(one, measure, measurement, console)
        all_records.append(measurement.records)
    return [line for records in all_records for line in exceeded(records, limits, compare)]


def _run_settings(trainer: Mapping[str, Any] | None) -> dict[str, Any]:
    """How the run measured itself: what its configuration says of SampleEvaluation."""
    callbacks = (trainer or {}).get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if str(callback.get("class_path", "")).endswith("SampleEvaluation"):
            return {k: v for k, v in (callback.get("init_args") or {}).items() if v is not None}
    return {}


def _reference(
    samples: list[str] | None,
    data: Mapping[str, Any] | None,
    source: AbstractSource | None,
    members: str | None,
    heldout: str | None,
    run: str | None,
    resize: bool,
) -> Reference:
    if members is not None:
        if data is not None or source is not None:
            raise ValueError("give --members, or --config, --data.* or --source: they name two training sets")
        stack = read_stack(members)
        held = None if heldout is None else read_stack(heldout)
        if held is not None and held.shape[1:] != stack.shape[1:]:
            raise ValueError(f"{members} holds images {tuple(stack.shape[1:])}, {heldout} {tuple(held.shape[1:])}")
        listed = source_of(members)
        files = {} if isinstance(listed, ArraySource) else {"file_of": files_of(listed)}
        found = Reference.from_images(stack, held, **files)
        # as a run names its sets, so that its checkpoints know them
        return replace(found, members_digest=content_digest(stack), heldout_digest=content_digest(found.heldout))
    if heldout is not None:
        raise ValueError("--heldout goes with --members; for a source, use --data.num_heldout or --data.heldout")
    if data is None and source is None:
        raise ValueError(WAYS)
    module = _datamodule(dict(data or {}), source, samples, resize)
    module.prepare_data()
    module.setup()
    if run is not None:
        check_members(run, {"members": module.members.digest, "heldout": module.heldout.digest})
    return Reference.from_datamodule(module)


def _datamodule(
    data: dict[str, Any], source: AbstractSource | None, samples: list[str] | None, resize: bool
) -> MemorizationDataModule:
    """The data module; images of any size are read at the samples' size where nothing is said."""
    if source is not None and data.get("source") is not None:
        raise ValueError("give --source or data.source, not both")
    if source is not None:
        data["source"] = source
    sizeless = data.get("image_size") is None and not _is_digits(data.get("source"))
    if sizeless and samples and not resize:
        channels, height, width = shape_of(samples[0])
        if height != width:
            raise ValueError(f"{samples[0]} holds images of {height} x {width}; a source is read as square ones")
        data |= {"image_size": height, "channels": channels}
    if source is not None:
        return MemorizationDataModule(**data)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MemorizationDataModule, "data")
    return parser.instantiate_classes(parser.parse_object({"data": data})).data


def _is_digits(source: Any) -> bool:
    name = source.get("class_path", "") if isinstance(source, Mapping) else type(source).__name__
    return source is None or name.rsplit(".", 1)[-1] == "DigitsSource"


def _as_it_is(value: Any) -> Any:
    """A section of a run's configuration, read and not built: no network, no Trainer."""
    return value


def add_options(parser: ArgumentParser) -> None:
    """Add the verb's options: lists without brackets, and the sections of a run's configuration."""
    parser.add_argument(
        "--samples", nargs="+", type=str, default=[], metavar="PATH",
        help="What to measure, each on its own: .npz (arr_0 uint8 [N, H, W, C]) or .npy files, folders of images, run "
        "folders (the samples of the last evaluation); from any generator.",
    )  # fmt: skip
    parser.add_argument(
        "--fail_above", "--fail-above", action="append", type=str, default=[], metavar="KEY=NUMBER",
        help="Exit with status 1 when a number is above this limit, e.g. memorization/ratio=0.01; may be repeated.",
    )  # fmt: skip
    parser.add_function_arguments(evaluate, skip={"samples", "data", "fail_above", "trainer", "run"})
    parser.add_class_arguments(MemorizationDataModule, "data", instantiate=False)
    for name in ("trainer", *NOT_USED):
        parser.add_argument(f"--{name}", type=_as_it_is, default=None, help=SUPPRESS)


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the data module that can be compared: a source by its class and arguments."""
    source = data.get("source")
    return {**data, "source": (type(source), vars(source) if isinstance(source, AbstractSource) else source)}


def run_evaluate(config: Any = None, data: Namespace | None = None, **options: Any) -> None:
    """Measure samples of any generator against a training set: every metric, its interval and held-out control.

    The training set is that of a run (--config RUN/config.yaml, or --samples RUN alone), of --data.* or --source as for
    fit, or --members with --heldout. No model is needed, except by --checkpoints.

    Prints a table and writes results.jsonl, ledger.csv (which image was copied, how often, by which samples) and
    images/ (the closest pairs).

    Exit status: 0; 1 when a number is above a limit of --fail-above (--compare says whether the number itself or the
    lower end of its interval is); 2 for bad input and errors.

    Args:
        config: Configuration files that were read; null for none.
        data: Options of the data module.
        **options: Of :func:`evaluate`.

    Raises:
        SystemExit: With status 1 when a number lies above its limit, 2 for errors.
    """
    parser = ArgumentParser()
    parser.add_class_arguments(MemorizationDataModule, "data", instantiate=False)
    chosen = None if data is None else data.as_dict()
    if not config and chosen == parser.get_defaults().data.as_dict():
        chosen = None
    for name in NOT_USED:
        options.pop(name, None)
    try:
        run = None
        for folder in (Path(str(file)).parent for file in config or []):
            if is_run(folder):  # overridden, the data are no longer the run's
                own = parser.instantiate_classes(parser.parse_object({"data": read_run_config(folder)["data"]}))
                run = str(folder) if _plain(own.data.as_dict()) == _plain(chosen or {}) else None
        above = evaluate(data=chosen, run=run, **options)
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("LIGHTNING_MEM_TRACEBACK"):
            raise
        print(f"{type(error).__name__}: {error}\n(LIGHTNING_MEM_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(2)
    if above:
        print("\n".join(above), file=sys.stderr)
        sys.exit(1)
