"""Evaluation: one set of samples against one set of training images, every metric, its control, and what is written.

Needs no Trainer: the callbacks of ``fit`` and the verb ``evaluate`` stand on it, as do attacks and defenses.
"""

from lightning_mem.evaluation.comparison import Banks, Comparison, Rules, cache_folder
from lightning_mem.evaluation.curves import draw_curves, onset
from lightning_mem.evaluation.draw import draw_labels, draw_samples
from lightning_mem.evaluation.ledger import ledger_rows, read_ledger
from lightning_mem.evaluation.measure import Measure, Measurement, MetricName
from lightning_mem.evaluation.numbers import Number
from lightning_mem.evaluation.reference import Reference
from lightning_mem.evaluation.rejection import Accepted, rejection_sample
from lightning_mem.evaluation.run_data import run_data
from lightning_mem.evaluation.scene import Scene
from lightning_mem.evaluation.workers import Workers
