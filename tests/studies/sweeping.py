"""A small sweep of SIDE, and records as its attacks leave them."""

from pathlib import Path
from typing import Any

import yaml
from tiny_study import TINY

from lightning_mem.metrics import wilson_interval
from lightning_mem.records import Record
from lightning_mem.studies import SideSweep

SURROGATE = {
    "model": {"class_path": "x.SurrogateModule", "init_args": {"target": "?"}},
    "data": {"source": {"class_path": "x.PseudoLabels", "init_args": {"target": "?", "num_clusters": 10}}},
    "trainer": {"max_steps": 30},
}
ATTACK = {"attack": {"class_path": "x.SIDE", "init_args": {"guidance_scale": 1.0}}}
N = 500


def planted(values: dict[str, float], n: int = N) -> list[Record]:
    """Records of an attack whose arms hit as often as told; every second copied image is a new one."""
    found = []
    for arm, hits in values.items():
        about = {"surrogate": arm, "rule": "1/3", "target_digest": f"{hits}"}
        low, high = wilson_interval(round(hits * n), n)
        found.append(Record("attack/side/hits", hits, n, 12, low, high, "ema", definition=about))
        found.append(Record("attack/side/hits_heldout", 0.0, n, 12, 0.0, 0.01, "ema", definition=about))
        found.append(Record("attack/side/ams/high", hits / 2, n, 12, weights="ema", definition=about))
        found.append(Record("attack/side/ums/high", hits / 4, n, 12, weights="ema", definition=about))
        found.append(Record("attack/side/unique_share", hits / 2, n, 12, weights="ema", definition=about))
    return found


def sweep(**changes: Any) -> SideSweep:
    for name, content in (("surrogate.yaml", SURROGATE), ("side.yaml", ATTACK)):
        Path(name).write_text(yaml.safe_dump(content))
    own: dict[str, Any] = {
        "config": [str(TINY)], "surrogate": ["surrogate.yaml"], "attack": ["side.yaml"], "parameter": "lambda",
        "values": [0.5, 1.0], "sets": {"attack": ["attack.init_args.guidance_scale"]}, "num_members": 20, "seeds": [0],
    }  # fmt: skip
    return SideSweep(**{**own, **changes})
