"""``python -m lightning_mem`` and the console script: help and version without heavy imports."""

import sys

from lightning_mem import __version__

VERBS = {
    "fit": "train, drawing memorization ratio, held-out control and Fréchet distance as it goes",
    "validate": "measure a trained run as fit does at its validations",
    "test": "as validate, with the full number of samples",
    "sample": "draw a SampleSet from a trained run; continues where it stopped",
    "predict": "the same as sample",
    "attack": "attack a trained run and score what came out against its training images and the held-out control",
    "attribute": "tell which training images made a trained run's samples, by several methods side by side",
    "evaluate": "measure samples of any generator against a training set: a table, records, the closest pairs",
    "study": "train one recipe many times by a plan and report what came of it; continues where it stopped",
}

EXAMPLES = """\
examples:
  lightning-mem fit --config configs/digits/denoiser.yaml
  lightning-mem fit --config configs/digits/denoiser.yaml --data.num_members 1024 --trainer.default_root_dir runs/1024
  lightning-mem fit --config runs/digits/config.yaml --ckpt_path last --trainer.max_steps 5000
  lightning-mem validate --config runs/digits/config.yaml
  lightning-mem sample --config runs/digits/config.yaml --num_samples 10000
  lightning-mem attack --config runs/digits/config.yaml --config configs/digits/attacks/side.yaml
  lightning-mem evaluate --samples my_gan/ --members train/ --heldout unseen/ --fail-above memorization/ratio=0.01
  lightning-mem study --config configs/digits/studies/emm.yaml --dry_run true
"""


def usage() -> str:
    """The program's own help."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{text}" for name, text in VERBS.items())
    return (
        "usage: lightning-mem VERB --config FILE [--config OVERLAY ...] [--option value ...]\n\n"
        "Train diffusion models and watch, while they train, how much they copy their training images.\n\n"
        f"verbs (each has its own manual: lightning-mem VERB --help):\n{verbs}\n\n{EXAMPLES}\n"
        "Every option of a YAML file can be given on the command line after it: later wins."
    )


def main(args: list[str] | None = None) -> None:
    """Answer help and version at once; hand everything else to the command line proper.

    Args:
        args: Command line; null takes the process's own.
    """
    given = sys.argv[1:] if args is None else args
    if given in ([], ["--help"], ["-h"]):
        print(usage())
    elif given == ["--version"]:
        print(f"lightning-mem {__version__}")
    else:
        from lightning_mem.cli import main as run

        run(args)


if __name__ == "__main__":
    main()
