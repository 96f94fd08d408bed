"""The ledger names each copied image once, and the same whoever writes it."""

from pathlib import Path

import torch

from lightning_mem.evaluation import Measure, Reference
from lightning_mem.evaluation.ledger import drop_ledger_rows, ledger_rows, read_ledger
from lightning_mem.types import SampleSet


def patterns(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_ledger_counts_the_copies_of_each_image() -> None:
    bank = patterns(10)
    reference = Reference(bank, patterns(10, 1), torch.arange(10), indices=torch.arange(10) + 500)
    samples = SampleSet(torch.cat([bank[[4, 4, 7, 4]], patterns(2, 2)]), torch.tensor([9, 8, 7, 6, 5, 4]))
    rows = ledger_rows(samples, reference, Measure(reference)(samples), step=3)
    assert [(row["index"], row["copies"], row["samples"]) for row in rows] == [("504", "3", "9 8 6"), ("507", "1", "7")]
    assert {row["nearest"] for row in rows} == {"0.000000"}


def test_ledger_names_one_image_for_both_orientations() -> None:
    bank = patterns(5)
    both = torch.cat([bank, bank.flip(-1)])
    owners = torch.arange(5).repeat(2)
    reference = Reference(both, patterns(5, 1), owners, indices=torch.arange(5), mirror=True)
    samples = SampleSet(torch.stack([bank[2], bank[2].flip(-1)]), torch.arange(2))
    rows = ledger_rows(samples, reference, Measure(reference)(samples), step=0)
    assert [(row["index"], row["copies"]) for row in rows] == [("2", "2")]


def test_ledger_rows_past_a_step_are_dropped() -> None:
    Path("ledger.csv").write_text("step,weights,index,copies,nearest,samples\n1,ema,0,1,0.1,0\n3,ema,0,1,0.1,0\n")
    drop_ledger_rows("ledger.csv", 2)
    assert [row["step"] for row in read_ledger("ledger.csv")] == ["1"]
