"""What the tests of guidance draw from and are guided by."""

import torch
from oracles import MixtureDenoiser
from torch import nn

from lightning_mem.diffusion import (
    DiffusionProcess,
    Target,
    sample_x0,
)
from lightning_mem.networks import UNetConfig, UNetDenoiser, build_unet

VARIANTS = [
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "ddpm"},
    {"sampler": "dpm++"},
    {"sampler": "heun"},
    {"sampler": "euler"},
]
PREDICTIONS = ["eps", "v", "x0"]


def variant_name(options):
    return "-".join(str(value) for value in options.values())


class Network(nn.Module):
    """A time-conditional classifier with everything that must stand still: batch statistics, dropout, weights."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.num_classes = num_classes
        self.time = nn.Embedding(1000, 4)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5), nn.Flatten()
        )
        self.head = nn.Linear(4 * 64 + 4, num_classes)

    def forward(self, x_t, t):
        return self.head(torch.cat([self.layers(x_t), self.time(t)], 1))


class NetworkClassifier:
    """A network as a classifier with an identity and a process."""

    digest = "network"

    def __init__(self, num_classes=3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.module = Network(num_classes)
        self.num_classes = num_classes
        self.process = DiffusionProcess()
        self.seen = []

    def __call__(self, x_t, t):
        self.seen.append(t.clone())
        return self.module(x_t, t)


class Untouchable:
    """A classifier that must not be asked."""

    num_classes = 3
    process = DiffusionProcess()
    digest = "untouchable"

    def __call__(self, x_t, t):
        raise AssertionError(f"asked at t = {t.tolist()}")


def network_target(prediction="eps"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = build_unet(UNetConfig((8, 8), norm_num_groups=4), image_size=8, channels=1).eval()
    return Target(UNetDenoiser(unet, prediction), DiffusionProcess(prediction=prediction), (1, 8, 8), digest="unet")


def pair(prediction="eps", schedule="linear", share=0.5):
    """A mixture of a left and a right Gaussian, and each of them alone."""
    process = DiffusionProcess(schedule, prediction=prediction, clip_sample=False)
    means = torch.stack([torch.full((1, 2, 2), -0.6), torch.full((1, 2, 2), 0.6)])
    means[1, 0, 0, 0] = -0.2
    scales, weights = torch.tensor([0.3, 0.15]), torch.tensor([1 - share, share])
    both = MixtureDenoiser(means, scales, process, weights)
    alone = [MixtureDenoiser(means[c : c + 1], scales[c : c + 1], process) for c in range(2)]
    return both, alone


def draw(target, count=16, **options):
    return sample_x0(target, range(count), **{"seed": 0, "num_steps": 20, "block": 16, **options})
