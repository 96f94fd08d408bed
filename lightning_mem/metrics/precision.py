"""Full float32, whatever autocast, TF32 or matmul precision is set outside."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, no TF32 and no autotuned kernels: a product is the same on every call.

    Args:
        device: Whose autocast is switched off.
    """
    backends: Any = torch.backends
    wanted: list[tuple[Any, str, Any]] = [(backends.cudnn, "benchmark", False), (backends.cudnn, "deterministic", True)]
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9; once these are used, the older names raise
        kinds = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        wanted += [(kind, "fp32_precision", "ieee") for kind in kinds]
    else:
        wanted += [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
    before = [getattr(owner, name) for owner, name, _ in wanted]
    try:
        for owner, name, value in wanted:
            setattr(owner, name, value)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (owner, name, _), value in zip(wanted, before, strict=True):
            setattr(owner, name, value)
