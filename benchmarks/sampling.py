"""Is our sampling as fast as diffusers' DDIMPipeline?

``lightning_mem.diffusion.sample`` against ``DDIMPipeline`` on one network, with the same sampler steps, from the same
noise, in blocks of the same size. Before anything is timed both must give the same images, to the bit (in 32-true;
under autocast the pipeline steps its solver in reduced precision, ours does not, and the largest difference is shown).
The pipeline returns arrays, not PIL images, and shows no bar: it is not slowed down.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py
"""

import statistics
from collections.abc import Callable

import torch
from diffusers import DDIMPipeline
from torch import Tensor
from training_step import ROOT, check, clock, options, recipe, report

from lightning_mem.diffusion import Target, sample
from lightning_mem.diffusion.sampling import sample_x0
from lightning_mem.networks import UNetDenoiser, build_unet
from lightning_mem.randomness import generator
from lightning_mem.records import Record, digest


def main(given: list[str] | None = None) -> Record:
    """Run the benchmark.

    Args:
        given: Command line; null takes the process's own.
    """
    parser = options("Our sampler against diffusers' DDIMPipeline.", 50, "sampler steps")
    parser.add_argument("--num_samples", type=int, default=512, help="images of one pair; a multiple of batch_size")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "sampling.jsonl"))
    args = parser.parse_args(given)
    check(args)
    if args.num_samples < 1 or args.num_samples % args.batch_size:
        raise SystemExit(f"--num_samples must be a multiple of --batch_size {args.batch_size}, got {args.num_samples}")
    config, process, size, channels = recipe(args.network)
    torch.manual_seed(0)
    unet = build_unet(config, size, channels).eval().to(args.device)
    if args.channels_last:
        unet.to(memory_format=torch.channels_last)
    if args.compile:
        unet.compile()
    target = Target(UNetDenoiser(unet, process.prediction), process, (channels, size, size), device=args.device)
    pipeline = DDIMPipeline(unet, process.scheduler("ddim", args.steps)).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    addresses = torch.arange(args.num_samples)
    precision = torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16-mixed")

    def ours(rows: Tensor) -> Tensor:
        return sample(target, rows, seed=0, num_steps=args.steps, block=args.batch_size)

    def peer(rows: Tensor) -> Tensor:
        generators = [generator(0, "sample", int(i)) for i in rows]
        images = pipeline(batch_size=len(rows), generator=generators, num_inference_steps=args.steps, output_type="np")
        return torch.from_numpy(images.images).permute(0, 3, 1, 2)

    def timed(side: Callable[[Tensor], Tensor], rows: Tensor) -> float:
        start = clock(args.device)
        side(rows)
        return clock(args.device) - start

    with precision:
        x0 = sample_x0(target, addresses, seed=0, num_steps=args.steps, block=args.batch_size)
        blocks = addresses.split(args.batch_size)
        theirs = torch.cat([peer(rows) for rows in blocks])
        difference = ((x0 / 2 + 0.5).clamp(0, 1).cpu() - theirs).abs().max().item()
        if args.precision == "32-true" and difference:
            raise SystemExit(f"the two samplers disagree by {difference}: they must be equal before they are compared")
        print(f"largest difference between the two samplers: {difference}")
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        # within a pair the two alternate block by block: the machine's speed drifts over seconds, for both alike
        for _ in range(args.pairs):
            pair: dict[str, list[float]] = {"ours": [], "peer": []}
            for number, rows in enumerate(blocks):
                order = [("ours", ours), ("peer", peer)]
                for name, side in order if number % 2 == 0 else order[::-1]:
                    pair[name].append(timed(side, rows))
            for name, turns in pair.items():
                times[name].append(statistics.median(turns))
    definition = {
        "peer": "diffusers DDIMPipeline, output_type np, no bar",
        "network": f"configs/{args.network}",
        "network_digest": digest(unet.config),
        "batch_size": args.batch_size,
        "num_samples": args.num_samples,
        "num_steps": args.steps,
        "precision": args.precision,
        "compile": args.compile,
        "channels_last": args.channels_last,
        "largest_difference": difference,
    }
    return report("time/sampling", times["ours"], times["peer"], args.batch_size, definition, args.out)


if __name__ == "__main__":
    main()
