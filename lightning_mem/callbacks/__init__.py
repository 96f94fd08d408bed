"""Callbacks and loggers: evaluation during training, pictures, the run folder."""

from lightning_mem.callbacks.averaging import EMA
from lightning_mem.callbacks.classification import ClassifierRecords
from lightning_mem.callbacks.curves import Curves
from lightning_mem.callbacks.evaluation import SampleEvaluation
from lightning_mem.callbacks.gallery import Gallery
from lightning_mem.callbacks.ledger import Ledger
from lightning_mem.callbacks.run_folder import RunFolder
from lightning_mem.callbacks.summary import RunSummary, summarize
from lightning_mem.callbacks.tracking import MetricsCSV, WandbTracking
