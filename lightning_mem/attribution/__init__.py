"""Attribution: which training images made a sample; one published method, one file."""

from lightning_mem.attribution.base import AbstractAttribution, Queries, QueryKind
