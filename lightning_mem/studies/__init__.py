"""Studies: whatever trains or attacks one recipe many times, as a plan of ordinary folders."""

from lightning_mem.studies.base import AbstractStudy, ReadConfig, Run, Settings
from lightning_mem.studies.calibration import ProtectionCalibration
from lightning_mem.studies.datamodeling import DatamodelingStudy
from lightning_mem.studies.emm import EffectiveMemorization
from lightning_mem.studies.ensembles import EnsembleStudy
from lightning_mem.studies.pooling import (
    PowerLaw,
    fit_power_law,
    level_crossing,
    pooled_share,
    seeds_interval,
)
from lightning_mem.studies.protection import ProtectionTable
from lightning_mem.studies.removal import RemovalStudy
from lightning_mem.studies.runner import study
from lightning_mem.studies.shadows import MembershipStudy
from lightning_mem.studies.side_sweep import SideSweep
