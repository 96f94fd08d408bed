"""Data: sources of images and the labels they carry."""

from lightning_mem.data.csv_source import CSVSource
from lightning_mem.data.datamodule import Duplicates, MemorizationDataModule
from lightning_mem.data.deduplicate import DuplicateGroup, duplicate_groups
from lightning_mem.data.folder import FolderSource, read_image
from lightning_mem.data.labels import LabelRule, assign_labels, classes_of
from lightning_mem.data.listed import ListedSource
from lightning_mem.data.pool import PoolSource
from lightning_mem.data.random_labels import RandomLabels, balanced_bits, image_keys
from lightning_mem.data.sources import (
    GREY_RULE,
    RESIZE_RULE,
    AbstractSource,
    ArraySource,
    DigitsSource,
    fit_image,
)
from lightning_mem.data.torchvision_sources import CelebASource, CIFAR10Source
