"""How much faster are gradients of every image, taken together, than one after another?

Ours is the real path of the gradient attributions: ``ImageGradients`` with its addressed noise, ``vmap`` over ``grad``
in chunks. Two peers take the same gradients of the same loss at the same noise, drawn beforehand, one image after
another: a plain loop of backward passes (``torch.autograd.grad``), and ``torch.func.grad`` of ``functional_call``.
With several timesteps an image, each peer puts them into one batch of its backward pass, as ours does. Before anything
is timed all three must agree to rounding. Rounds take turns in order (A B C, B C A ...), after a warm-up, so that slow
drifts of the machine cancel.

    OMP_NUM_THREADS=1 python benchmarks/gradients.py
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad
from training_step import ROOT, clock, recipe, report

from lightning_mem.attribution.gradients import ImageGradients, spaced_timesteps
from lightning_mem.diffusion import Target
from lightning_mem.networks import UNetDenoiser, build_unet
from lightning_mem.randomness import generator
from lightning_mem.records import Record, digest
from lightning_mem.types import to_float


class OneByOne:
    """The same gradients, an image at a time."""

    def __init__(self, target: Target, images: Tensor, num_timesteps: int, device: str) -> None:
        process, network = target.process, target.denoiser.module
        times = spaced_timesteps(num_timesteps, process.num_timesteps)
        draws = [torch.randn(target.shape, generator=generator(0, "attribution", "", t, 0)) for t in times]
        eps = torch.stack(draws).to(device)
        self.eps, self.t, self.network = eps, torch.tensor(times, device=device), network
        self.x_t = [process.add_noise(x0.expand_as(eps), eps, self.t) for x0 in to_float(images).to(device)]
        self.parameters = dict(network.named_parameters())
        self.gradient = grad(self._functional)

    def _functional(self, parameters: dict[str, Tensor], x_t: Tensor) -> Tensor:
        output = functional_call(self.network, parameters, (x_t, self.t)).sample
        return (output - self.eps).square().mean()

    def loop(self, out: Tensor) -> Tensor:
        """Backward passes, into ``out`` [N, P]."""
        for row, x_t in zip(out, self.x_t, strict=True):
            loss = (self.network(x_t, self.t).sample - self.eps).square().mean()
            parts = torch.autograd.grad(loss, list(self.parameters.values()))
            torch.cat([part.flatten() for part in parts], out=row)
        return out

    def unbatched(self, out: Tensor) -> Tensor:
        """``torch.func`` without ``vmap``, into ``out`` [N, P]."""
        values = {name: part.detach() for name, part in self.parameters.items()}
        for row, x_t in zip(out, self.x_t, strict=True):
            torch.cat([part.flatten() for part in self.gradient(values, x_t).values()], out=row)
        return out


def agreement(ours: Tensor, peer: Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((ours - peer).abs().max() / ours.abs().max())


def main(given: list[str] | None = None) -> Record:
    """Run the benchmark.

    Args:
        given: Command line; null takes the process's own.
    """
    parser = argparse.ArgumentParser(description="Our per-example gradients against two ways to take them in turn.")
    parser.add_argument("--pairs", type=int, default=9, help="timings of each side")
    parser.add_argument("--num_images", type=int, default=64, help="images of one timing")
    parser.add_argument("--chunk", type=int, default=64, help="noised images that ours differentiates together")
    parser.add_argument("--num_timesteps", type=int, default=1, help="timesteps an image")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--network", choices=["digits", "cifar10"], default="digits", help="of configs/NAME")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "gradients.jsonl"))
    args = parser.parse_args(given)
    if min(args.pairs, args.num_images, args.chunk, args.num_timesteps) < 1:
        raise SystemExit(f"--pairs, --num_images, --chunk and --num_timesteps must be at least 1, got {vars(args)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device here; use --device cpu")
    config, process, size, channels = recipe(args.network)
    torch.manual_seed(0)
    unet = build_unet(config, size, channels).eval().to(args.device)
    target = Target(UNetDenoiser(unet, process.prediction), process, (channels, size, size), device=args.device)
    images = torch.randint(0, 256, (args.num_images, channels, size, size), dtype=torch.uint8)
    gradients = ImageGradients(
        target, num_timesteps=args.num_timesteps, calls_at_once=args.chunk, device=torch.device(args.device)
    )
    room = {name: gradients.memory(len(images)) for name in ("ours", "loop", "unbatched")}  # used again, as by a store
    peers = OneByOne(target, images, args.num_timesteps, args.device)
    sides: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: gradients(images, out=room["ours"]), "loop": lambda: peers.loop(room["loop"]),
        "unbatched": lambda: peers.unbatched(room["unbatched"]),
    }  # fmt: skip
    first = {name: call() for name, call in sides.items()}  # and the warm-up
    apart = max(agreement(first["ours"], first[name]) for name in ("loop", "unbatched"))
    if not apart < 1e-4:
        raise SystemExit(f"the gradients disagree by {apart:.2g} of the largest: nothing is compared")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.pairs):
        order = list(sides)
        for name in order[number % 3 :] + order[: number % 3]:
            start = clock(args.device)
            sides[name]()
            seconds[name].append(clock(args.device) - start)
    definition: dict[str, Any] = {
        "network": f"configs/{args.network}", "network_digest": digest(unet.config), "num_images": args.num_images,
        "num_weights": gradients.num_weights, "chunk": args.chunk, "num_timesteps": args.num_timesteps,
        "disagreement": float(f"{apart:.2g}"),
    }  # fmt: skip
    told = {
        "loop": "a loop of backward passes (torch.autograd.grad), one image each",
        "unbatched": "a loop of torch.func.grad over functional_call, one image each",
    }
    last = [
        report(
            f"time/gradients_{name}", seconds["ours"], seconds[name], args.num_images, {**definition, "peer": words},
            args.out,
        )
        for name, words in told.items()
    ]  # fmt: skip
    return last[0]


if __name__ == "__main__":
    main()
