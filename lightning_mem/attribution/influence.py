"""First-order influence: how an ensemble's samples move with the weights of its members, by forward differentiation."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_mem.attribution.codes import UnitCodes
from lightning_mem.attribution.counterfactual import Landscape, unit_distances
from lightning_mem.attribution.ensemble import Ensemble
from lightning_mem.data.datamodule import BLOCK
from lightning_mem.diffusion import Sampler, sample_x0
from lightning_mem.evaluation import Workers
from lightning_mem.evaluation.draw import draw_labels
from lightning_mem.types import to_uint8


def weight_changes(codes: UnitCodes) -> Tensor:
    r"""What leaving out each unit does to the weights of the members, float64 [n, m].

    .. math:: \Delta w_{ik} = \frac{1 - c_{ik}}{m - |c_i|} - \frac{1}{m}

    which is :math:`(1 - 2 c_{ik})/m` where half of the members saw each unit; each row sums to 0.

    Source:
        Dai and Gifford, arXiv:2406.07908 (differential ablation; the formula for weights other than m/2 is derived).
    """
    unseen = (~codes.codes).double()
    return unseen / unseen.sum(1, keepdim=True) - 1 / codes.num_members


def weight_derivatives(
    ensemble: Ensemble,
    addresses: Sequence[int] | Tensor,
    *,
    seed: int,
    num_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    block: int = BLOCK,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    r"""Samples of an ensemble and their derivatives by the weight of each member, through the whole sampler.

    .. math:: J_k = \frac{\partial x}{\partial w_k} \bigg|_{w = 1/m}

    by forward-mode differentiation: one draw with a tangent for each of m members, in memory that does not grow with
    the steps. Attention runs in its plain form, because the fused kernels have no forward derivative.

    Args:
        ensemble: Which draws them.
        addresses: Of the samples' noise, int64 [Q].
        seed: Of the draw.
        num_steps: Sampler steps.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        block: Images per network call.
        dtype: Precision; the members' networks must have it.

    Returns:
        x in the denoiser's space, [Q, C, H, W], and J [m, Q, C, H, W].

    Undefined when:
        The sampler clips (its estimate of x0) where a member's prediction lies outside: the derivative is 0 there.
    """
    wanted = torch.as_tensor(addresses).to(torch.int64)
    members = ensemble.codes.num_members
    even = torch.full((members,), 1 / members, dtype=torch.float64)
    classes = ensemble.members[0].num_classes
    options: dict[str, Any] = {
        "seed": seed, "num_steps": num_steps, "sampler": sampler, "eta": eta, "block": block, "dtype": dtype,
        "condition": None if classes is None else draw_labels(classes, wanted, seed),
    }  # fmt: skip
    drawn, slopes = torch.empty(0), []
    for direction in torch.eye(members, dtype=torch.float64):
        with _plain_forward_mode(), forward_ad.dual_level():
            weights = forward_ad.make_dual(even, direction)
            found = forward_ad.unpack_dual(sample_x0(ensemble.weighted(weights), wanted, **options))
        drawn = found.primal
        slopes.append(torch.zeros_like(drawn) if found.tangent is None else found.tangent)
    return drawn, torch.stack(slopes)


@contextmanager
def _plain_forward_mode() -> Iterator[None]:
    """Attention in its plain form; torch compiles its forward derivatives by what it calls deprecated itself."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", DeprecationWarning)
        yield


def first_order_shifts(derivatives: Tensor, codes: UnitCodes) -> Tensor:
    r"""How far each sample moves when each unit is left out, to first order: one sweep scores all units.

    .. math:: x^{(i)} - x \approx \sum_k J_k\,\Delta w_{ik}

    exact with one sampler step that does not clip, for the sample is linear in the weights then.

    Args:
        derivatives: J, [m, Q, C, H, W]; see :func:`weight_derivatives`.
        codes: Units and codes.

    Returns:
        [n, Q, C, H, W].
    """
    return torch.einsum("k...,ik->i...", derivatives, weight_changes(codes).to(derivatives))


@torch.no_grad()
def first_order_landscape(
    ensemble: Ensemble,
    images: Tensor,
    unit_of: Tensor,
    addresses: Sequence[int] | Tensor,
    *,
    seed: int,
    num_steps: int = 50,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    workers: Workers | None = None,
) -> Landscape:
    """As :func:`lightning_mem.attribution.landscape`, the counterfactuals to first order and not quantised.

    Costs m draws of the ensemble with tangents, however many units there are.

    Args:
        ensemble: Which draws the samples.
        images: uint8 [N, C, H, W], all images of the units.
        unit_of: int64 [N], the unit of each.
        addresses: Of the samples' noise, int64 [Q].
        seed: Of the draw.
        num_steps: Sampler steps.
        sampler: See :func:`lightning_mem.diffusion.sample`.
        eta: See there.
        workers: How blocks are dealt out.
    """
    workers, wanted = workers or Workers(), torch.as_tensor(addresses).to(torch.int64)
    codec, units = ensemble.members[0].codec, len(ensemble.codes.units)
    options: dict[str, Any] = {"seed": seed, "num_steps": num_steps, "sampler": sampler, "eta": eta}

    def compute(rows: Tensor) -> Tensor:
        drawn, derivatives = weight_derivatives(ensemble, wanted[rows], **options)
        whole = codec.decode(drawn)
        before = unit_distances(to_uint8(whole), images, unit_of, units)
        columns = []
        for unit, change in enumerate(weight_changes(ensemble.codes)):
            shift = torch.einsum("k...,k->...", derivatives, change.to(derivatives))
            moved = codec.decode(drawn + shift)
            after = unit_distances((moved + 1) * 127.5, images, unit_of, units)
            length = (moved - whole).double().flatten(1).norm(dim=1).cpu() / 2
            columns.append(torch.stack([length, after[:, unit] - before[:, unit], after.argmin(1).double()], 1))
        pixels = to_uint8(whole).cpu().flatten(1).double()
        return torch.cat([pixels, before, torch.stack(columns, 1).flatten(1)], 1)

    found = workers.in_blocks(len(wanted), compute, label="derivatives")
    dim = images[0].numel()
    factual = found[:, :dim].to(torch.uint8).reshape(-1, *images.shape[1:])
    rest = found[:, dim + units :].unflatten(1, (units, 3))
    return Landscape(
        factual, rest[..., 0].clone(), rest[..., 1].clone(), found[:, dim : dim + units].clone(), rest[..., 2].long()
    )
