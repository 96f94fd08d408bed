"""Rejection sampling: draw again until a sample is accepted; the oracle of protections by guidance."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, ScoreTerm, Target, gate_rates, guidance_settings, sample
from lightning_mem.diffusion.additions import Judge
from lightning_mem.diffusion.sampling import network_of
from lightning_mem.evaluation.draw import draw_labels
from lightning_mem.evaluation.workers import Workers
from lightning_mem.randomness import derive_seed
from lightning_mem.records import atomic_write
from lightning_mem.types import SampleSet


@dataclass(frozen=True)
class Accepted:
    """What rejection sampling gives.

    Args:
        samples: One a address; where no try was accepted, the last try.
        accepted: bool [N].
        tries: int64 [N] >= 1, draws that each address took.
    """

    samples: SampleSet
    accepted: Tensor
    tries: Tensor

    @classmethod
    def at_once(cls, samples: SampleSet) -> "Accepted":
        """A draw without a judge."""
        ones = torch.ones(len(samples), dtype=torch.int64)
        return cls(samples, ones.bool(), ones)

    @property
    def cost(self) -> float:
        """Mean draws a sample: network evaluations over those of plain sampling."""
        return self.tries.double().mean().item()

    def save(self, file: str | Path) -> None:
        """Write the samples (``.npz``), then ``<stem>_tries.csv`` beside them, which says that all is there."""
        file = Path(file)
        self.samples.save(file)
        with atomic_write(tries_file(file)) as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(["address", "accepted", "tries"])
            columns = (self.samples.addresses, self.accepted.int(), self.tries)
            writer.writerows(zip(*(column.tolist() for column in columns), strict=True))

    @classmethod
    def load(cls, file: str | Path) -> "Accepted":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the two files do not belong together.
        """
        samples, file = SampleSet.load(file), Path(file)
        with tries_file(file).open() as opened:
            rows = [[int(row[key]) for key in ("address", "accepted", "tries")] for row in csv.DictReader(opened)]
        addresses, accepted, tries = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).T
        if not torch.equal(addresses, samples.addresses):
            raise ValueError(f"{tries_file(file)} tells other addresses than {file} holds: remove both")
        return cls(samples, accepted.bool(), tries)


def tries_file(file: Path) -> Path:
    """Beside a file of samples: which were accepted, after how many draws."""
    return file.with_name(f"{file.stem}_tries.csv")


def try_seed(seed: int, attempt: int) -> int:
    """Seed of a try: the draw's own first, so that arms start from the same noise; fresh ones after it."""
    return seed if attempt == 0 else derive_seed(seed, "try", attempt)


def rejection_settings(guidance: Sequence[ScoreTerm], judge: Judge, max_tries: int) -> dict[str, Any]:
    """What identifies a draw under score terms and a judge, flat; a key that a term has gets the next number.

    Raises:
        ValueError: If max_tries is below 1.
    """
    if max_tries < 1:
        raise ValueError(f"max_tries must be at least 1, got {max_tries}")
    merged, number = guidance_settings(guidance), len(guidance) + 1
    own = {**judge.settings, "protection_max_tries": max_tries}
    return merged | {f"{key}_{number}" if key in merged else key: value for key, value in own.items()}


def rejection_sample(
    target: Target,
    addresses: Sequence[int] | Tensor,
    judge: Judge,
    *,
    seed: int = 0,
    max_tries: int = 100,
    num_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    guidance: Sequence[ScoreTerm] = (),
    workers: Workers | None = None,
    begun: SampleSet | Accepted | None = None,
    keep: Callable[[Accepted], None] | None = None,
) -> Accepted:
    """Samples of these addresses, each drawn again from fresh noise until the judge accepts it.

    Try k of an address depends on seed, k and the address only; labels (of a conditional target, of guidance) stay
    those of the address. What is accepted at once is the very sample that an unprotected draw gives.

    Args:
        target: What is drawn from.
        addresses: int64 [N], each once.
        judge: Says which samples may leave.
        seed: Of the draw.
        max_tries: Draws an address may take, at least 1.
        num_steps: Sampler steps.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        guidance: Score terms with ``settings``.
        workers: How blocks are dealt out, and the device to which all networks are moved; null for this process and
            the target's device.
        begun: Under the same options: the first try, where it was drawn already, or what was kept of more tries.
        keep: Called with what there is after each try but the first; not before all is judged.

    Raises:
        ValueError: If max_tries is below 1, there are no addresses, or ``begun`` holds others.
    """
    workers = workers or Workers(device=torch.device(target.device))
    own = torch.as_tensor(addresses).cpu().flatten().to(torch.int64)
    if len(own) == 0:
        raise ValueError("addresses must name at least one sample, got none")
    settings = {"sampler": sampler, "num_steps": num_steps, "eta": eta, "block": BLOCK, "sample_seed": seed}
    settings |= rejection_settings(guidance, judge, max_tries)
    first = begun.samples if isinstance(begun, Accepted) else begun
    if first is not None and not torch.equal(first.addresses, own):
        raise ValueError(f"the first try holds {len(first)} samples of other addresses than the {len(own)} asked for")
    for part in (target.denoiser, judge, *guidance):
        if (network := network_of(part)) is not None:
            network.to(workers.device)
    target.device = workers.device
    labels = None if target.num_classes is None else draw_labels(target.num_classes, own, seed)
    images = torch.empty(0, dtype=torch.uint8) if first is None else first.images.clone()
    rates = gate_rates(guidance, own)
    if rates is not None and first is not None and first.gate_rate is not None:
        rates = first.gate_rate.clone()
    accepted, tries = torch.zeros(len(own), dtype=torch.bool), torch.zeros(len(own), dtype=torch.int64)
    if isinstance(begun, Accepted):
        accepted, tries = begun.accepted.clone(), begun.tries.clone()

    def so_far() -> Accepted:
        seen = None if rates is None else rates.clone()
        samples = SampleSet(images.clone(), own, labels, target.weights, settings, seen)
        return Accepted(samples, accepted.clone(), tries.clone())

    for attempt in range(int(tries.max()), max_tries):
        rows = (~accepted).nonzero().flatten()
        if len(rows) == 0:
            break

        def draw(places: Tensor, rows: Tensor = rows, attempt: int = attempt) -> Tensor:
            mine = rows[places.unique()]
            found = sample(
                target,
                own[mine],
                seed=try_seed(seed, attempt),
                num_steps=num_steps,
                sampler=sampler,
                eta=eta,
                guidance=guidance,
                condition=None if labels is None else labels[mine],
                block=BLOCK,
            )
            return found[torch.searchsorted(mine, rows[places])].to(workers.device)

        def watched(places: Tensor, rows: Tensor = rows) -> Tensor:  # of the very blocks this process has just drawn
            found = gate_rates(guidance, own[rows[places]])
            return (torch.zeros(len(places)) if found is None else found).to(workers.device)

        if attempt > 0 or first is None:
            drawn = workers.in_blocks(len(rows), draw, label=f"try {attempt + 1}").cpu()
            if attempt == 0:
                images = torch.empty_like(drawn)
            images[rows] = drawn
            if rates is not None:
                rates[rows] = workers.in_blocks(len(rows), watched).cpu()

        def verdict(places: Tensor, new: Tensor = images[rows]) -> Tensor:
            return judge(new[places]).byte().to(workers.device)

        accepted[rows] = workers.in_blocks(len(rows), verdict).cpu().bool()  # dealt out: all hear one verdict
        tries[rows] += 1
        if keep is not None and attempt > 0:
            keep(so_far())
    return so_far()


def _kept(part: Path) -> Accepted | None:
    """What earlier tries left; null where there is nothing, or a stop came while it was written.

    Images that are one try ahead of their table do no harm: that try is drawn again, and is the same.
    """
    try:
        return Accepted.load(part)
    except (OSError, ValueError):
        return None


def rejection_into(
    file: Path,
    first: SampleSet,
    target: Target,
    judge: Judge,
    *,
    seed: int,
    max_tries: int,
    guidance: Sequence[ScoreTerm],
    workers: Workers,
    on_the_first: Callable[[Callable[[], None]], None],
    **options: Any,
) -> Accepted:
    """:func:`rejection_sample` after a first try, kept in a file; read from there where it is there.

    What there is after each further try is kept in ``<stem>_part.npz``, and a call that was stopped goes on from there.

    Args:
        file: ``.npz``; which samples were accepted after how many draws is in ``<stem>_tries.csv`` beside it.
        first: The first try, with all the settings of its draw.
        target: What is drawn from.
        judge: Says which samples may leave.
        seed: Of the draw.
        max_tries: Draws an address may take.
        guidance: Score terms of the first try.
        workers: How blocks are dealt out.
        on_the_first: Calls a function on the first process while the others wait.
        **options: Of the sampler: num_steps, sampler, eta.

    Raises:
        ValueError: If the file holds another draw.
    """
    part = file.with_name(f"{file.stem}_part.npz")
    there, begun = tries_file(file).is_file(), _kept(part)
    on_the_first(lambda: None)  # all have looked before the first one writes
    settings = {**first.settings, **rejection_settings(guidance, judge, max_tries)}
    if there:
        found = Accepted.load(file)
        if found.samples.settings != settings or not torch.equal(found.samples.addresses, first.addresses):
            raise ValueError(
                f"{file} holds another draw ({len(found.samples)} samples, {found.samples.settings}) than this one "
                f"({len(first)}, {settings}): remove it or choose another --out"
            )
        return found
    if begun is not None and begun.samples.settings != settings:
        begun = None  # of another draw

    def whole(drawn: Accepted) -> Accepted:
        return replace(drawn, samples=replace(drawn.samples, settings=settings))

    found = whole(
        rejection_sample(
            target, first.addresses, judge, seed=seed, max_tries=max_tries, guidance=guidance, workers=workers,
            begun=begun or first, keep=lambda drawn: on_the_first(lambda: whole(drawn).save(part)), **options,
        )
    )  # fmt: skip

    def finish() -> None:
        found.save(file)
        for path in (part, part.with_suffix(".json"), tries_file(part)):
            path.unlink(missing_ok=True)

    on_the_first(finish)
    return found
