"""AMS and UMS of a stream of samples: counts per band and a mask of training images, never the matrix of scores."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mem.metrics.features import AbstractExtractor, extract_features
from lightning_mem.metrics.intervals import leave_out_interval, wilson_interval
from lightning_mem.metrics.neighbors import Rows
from lightning_mem.metrics.scores import (
    SSCD_BANDS,
    Bands,
    Pairs,
    check_bands,
    check_pairs,
    in_band,
    numbered_groups,
    threshold_bands,
)
from lightning_mem.metrics.similarities import Measure, closer_of, neighborhood_scale, score_blocks

FEWEST_MET = 10
"""Distinct training images from which on UMS has an interval: below, the jackknife's normal theory fails."""


class MemorizationScores(Metric):
    """AMS and UMS of samples against a fixed bank (:func:`average_memorization_score`, its unique companion).

    Lower is better; AMS in [0, 1], UMS at least 0; from one sample on. Compare banks of one size and equal numbers of
    samples. The states are counts and masks over groups of training images, reduced by sum and by maximum: exact under
    DDP. The bank is a plain attribute: neither parameter, buffer nor state, so no checkpoint holds a training image.

    Args:
        bank: uint8 [N, C, H, W] images, or [N, d] features of them; tensor or (memory-mapped) array.
        bands: Name of a band to ``(low, high)`` in units of the measure, ``low <= score < high``.
        extractor: Turns uint8 images, samples' and bank's, into features. Null: they are compared as they are.
        measure: ``cosine`` (of features), ``rms_l2``, or ``normalized_l2``: RMS-L2 over alpha times the sample's mean
            RMS-L2 to its k nearest.
        pairs: Whether UMS counts all pairs in a band or each sample's closest training image.
        groups: int64 [N]; training images of one group (duplicates) count once. Null: each counts.
        thresholds: Where :meth:`curves` are taken; may be empty.
        k: Neighbours in the mean of ``normalized_l2``; at most the number of groups is taken.
        alpha: Its factor, positive.
        blocks: Blocks of samples that UMS's interval leaves out in turn, at least 2.
        chunk_bytes: Working memory in bytes. Null: 512 MiB.

    Raises:
        ValueError: If a band, a threshold or a number is outside its range, or groups do not fit the bank.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    hits: Tensor
    step_hits: Tensor
    block_sizes: Tensor
    met: Tensor
    closest: Tensor

    def __init__(
        self,
        bank: Rows,
        bands: Bands = SSCD_BANDS,
        *,
        extractor: AbstractExtractor | None = None,
        measure: Measure = "cosine",
        pairs: Pairs = "any",
        groups: Rows | None = None,
        thresholds: Sequence[float] = (),
        k: int = 50,
        alpha: float = 0.5,
        blocks: int = 20,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_bands(bands)
        check_pairs(pairs)
        if blocks < 2:
            raise ValueError(f"blocks must be at least 2, got {blocks}")
        if k < 2 or not alpha > 0:
            raise ValueError(f"k must be at least 2 and alpha positive, got {k} and {alpha}")
        if len(bank) == 0:
            raise ValueError(f"bank must hold at least one image, got shape {tuple(bank.shape)}")
        self.closer = closer_of(measure)
        self.measure, self.pairs, self.extractor = measure, pairs, extractor
        self.groups = numbered_groups(groups, len(bank))
        self.num_groups = int(self.groups.max()) + 1
        self.bank = self._features(bank)
        self.bands = dict(bands)
        self.thresholds = tuple(float(t) for t in thresholds)
        self._steps = list(threshold_bands(self.thresholds, self.closer).values()) if self.thresholds else []
        self.k, self.alpha = min(k, self.num_groups), alpha
        self.blocks, self.chunk_bytes = blocks, chunk_bytes
        self._worst = -math.inf if self.closer == "larger" else math.inf
        for name, size in {"hits": len(self.bands), "step_hits": len(self._steps), "block_sizes": blocks}.items():
            self.add_state(name, default=torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
        masks = torch.zeros(blocks, len(self.bands), self.num_groups, dtype=torch.uint8)
        self.add_state("met", default=masks, dist_reduce_fx="max")
        closest = torch.full((self.num_groups,), self._worst)
        self.add_state("closest", default=closest, dist_reduce_fx="max" if self.closer == "larger" else "min")

    def update(self, samples: Tensor, indices: Tensor | None = None) -> None:
        """Take in a chunk of samples.

        Args:
            samples: uint8 images or features, of the bank's kind.
            indices: int64 [B] addresses of the samples, which put them into blocks of UMS's interval: given, the
                interval too is the same on any number of processes. Null: numbered as they come.

        Raises:
            ValueError: If the samples do not fit the bank, or one is not finite.
        """
        rows = self._features(samples)
        if indices is None:
            indices = int(self.block_sizes.sum()) + torch.arange(len(rows))
        elif indices.shape != (len(rows),):
            raise ValueError(f"indices must be int64 [{len(rows)}], one per sample, got {tuple(indices.shape)}")
        device, larger = self.closest.device, self.closer == "larger"
        block_of, group_of = indices.to(device) % self.blocks, self.groups.to(device)
        scale = None
        if self.measure == "normalized_l2":
            scale = neighborhood_scale(
                rows, self.bank, self.k, self.alpha, groups=self.groups, chunk_bytes=self.chunk_bytes
            )
        best = torch.full((len(rows),), self._worst, device=device)
        nearest = torch.zeros(len(rows), dtype=torch.int64, device=device)
        for at, where, scores in score_blocks(rows, self.bank, self.measure, scale=scale, chunk_bytes=self.chunk_bytes):
            scores = scores.to(device)
            value, index = scores.max(1) if larger else scores.min(1)
            improves = value > best[at] if larger else value < best[at]
            best[at] = torch.where(improves, value, best[at])
            nearest[at] = torch.where(improves, index + where.start, nearest[at])
            if self.pairs == "any":
                self._note(group_of[where], scores.amax(0) if larger else scores.amin(0))
                for number, band in enumerate(self.bands.values()):
                    sample, image = in_band(scores, band).nonzero(as_tuple=True)
                    self.met[block_of[at][sample], number, group_of[where][image]] = 1
        if self.pairs == "nearest":
            self._note(group_of[nearest], best)
        for number, band in enumerate(self.bands.values()):
            hit = in_band(best, band)
            self.hits[number] += hit.sum()
            if self.pairs == "nearest":
                self.met[block_of[hit], number, group_of[nearest[hit]]] = 1
        for number, step in enumerate(self._steps):
            self.step_hits[number] += in_band(best, step).sum()
        self.block_sizes += torch.bincount(block_of, minlength=self.blocks)

    def compute(self) -> dict[str, Tensor]:
        """``average/<band>`` and ``unique/<band>``, float64 scalars.

        Raises:
            ValueError: If no sample was given.
        """
        n = self._checked_total()
        average, unique = self.hits.double() / n, self.met.amax(0).sum(1, dtype=torch.float64) / n
        shown = {f"average/{name}": average[place] for place, name in enumerate(self.bands)}
        return shown | {f"unique/{name}": unique[place] for place, name in enumerate(self.bands)}

    def curves(self) -> tuple[Tensor, Tensor]:
        """AMS and UMS from each threshold on (:func:`memorization_curves`), over all processes (each must call it)."""
        with self.sync_context():
            n = self._checked_total()
            met = [in_band(self.closest, step).sum() for step in self._steps]
            return self.step_hits.double() / n, torch.tensor(met, dtype=torch.float64, device=self.met.device) / n

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float] | None]:
        """Intervals of what :meth:`compute` returns, over all processes (each must call it).

        AMS has Wilson's, UMS a block jackknife's, cut at 0. Null where no honest one exists: UMS met fewer than
        ``FEWEST_MET`` training images, or a block is empty.
        """
        found: dict[str, tuple[float, float] | None] = {}
        with self.sync_context():
            n = self._checked_total()
            for place, name in enumerate(self.bands):
                found[f"average/{name}"] = wilson_interval(int(self.hits[place]), n, level)
                found[f"unique/{name}"] = self._unique_interval(self.met[:, place], n, level)
        return found

    def _unique_interval(self, met: Tensor, n: int, level: float) -> tuple[float, float] | None:
        times = met.sum(0, dtype=torch.int64)  # in how many blocks each training image was met
        whole = int((times > 0).sum())
        if whole < FEWEST_MET or (self.block_sizes == 0).any():
            return None
        lost = ((met > 0) & (times == 1)).sum(1)  # met in this block and in no other
        low, high = leave_out_interval(whole / n, (whole - lost).double() / (n - self.block_sizes), level)
        return max(0.0, low), high

    def _note(self, groups: Tensor, scores: Tensor) -> None:
        """Keep the closest score of each group."""
        self.closest.scatter_reduce_(0, groups, scores, "amax" if self.closer == "larger" else "amin")

    def _checked_total(self) -> int:
        n = int(self.block_sizes.sum())
        if n == 0:
            raise ValueError(f"{type(self).__name__} has seen 0 samples: call update before compute")
        return n

    def _features(self, rows: Rows) -> Rows:
        if self.extractor is not None and rows.dtype in (torch.uint8, np.uint8):
            return extract_features(rows, self.extractor)
        return rows
