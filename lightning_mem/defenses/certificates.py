"""What a protected sample comes with: how often the gate opened, how sure the classifier is, the nearest member."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mem.defenses.confidence import confidence, logits_of
from lightning_mem.diffusion import Codec, PixelCodec
from lightning_mem.diffusion.guidance import Classifier
from lightning_mem.diffusion.sampling import network_of
from lightning_mem.metrics import nearest_neighbors
from lightning_mem.types import to_float

BLOCK = 64
"""Images of one classifier call."""


@dataclass(frozen=True)
class Certificates:
    """One row a sample.

    Args:
        addresses: int64 [N].
        gate_rate: float64 [N] in [0, 1], share of the steps inside the interval at which the gate was open.
        last_confidence: float64 [N] in [1/2, 1], q at the last step that was watched.
        final_confidence: float64 [N], q of the finished image at t = 0; null without images.
        nearest: float64 [N], RMS-L2 on [0, 1] to the nearest member; null without a bank.
        nearest_index: int64 [N], its row in the bank.
    """

    addresses: Tensor
    gate_rate: Tensor
    last_confidence: Tensor
    final_confidence: Tensor | None = None
    nearest: Tensor | None = None
    nearest_index: Tensor | None = None

    def rows(self) -> list[dict[str, float | int | None]]:
        """One mapping a sample, for a table."""
        columns = {name: value for name, value in vars(self).items() if value is not None}
        return [{name: value[row].item() for name, value in columns.items()} for row in range(len(self.addresses))]


@torch.no_grad()
def final_confidence(classifier: Classifier, images: Tensor, codec: Codec | None = None) -> Tensor:
    """q of finished images at t = 0, float64 [N].

    Args:
        classifier: A random-label classifier.
        images: uint8 [N, C, H, W].
        codec: Between pixels and the classifier's space; null for pixels.
    """
    codec, network = codec or PixelCodec(), network_of(classifier)
    device = next((value.device for value in network.parameters()), images.device) if network else images.device
    found = []
    for part in torch.arange(len(images)).split(BLOCK):
        padded = torch.cat([part, part[-1:].expand(BLOCK - len(part))])
        x0 = codec.encode(to_float(images[padded]).to(device))
        t = torch.zeros(BLOCK, dtype=torch.int64, device=device)
        found.append(confidence(logits_of(classifier, x0, t)).cpu()[: len(part)])
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)


def unpadded(addresses: Tensor) -> Tensor:
    """Which rows of a call are samples of their own, bool [B]: a block is padded by repeating its last address."""
    first = torch.ones(len(addresses), dtype=torch.bool)
    first[1:] = addresses[1:] != addresses[:-1]
    return first


class Watch:
    """Remembers, for every address, the steps of its latest draw."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int, int, float]] = {}
        self._at: dict[int, tuple[int, int]] = {}

    def see(self, t: Tensor, addresses: Tensor, q: Tensor, gated: Tensor) -> None:
        """One step of some rows, all [B] on the CPU; t that grows begins another draw of an address."""
        for at, address, own, gate in zip(t.tolist(), addresses.tolist(), q.tolist(), gated.tolist(), strict=True):
            steps, opened, last, _ = self._seen.get(address, (0, 0, at, 0.0))
            steps, opened = (steps, opened) if at <= last else (0, 0)
            self._seen[address] = steps + 1, opened + gate, at, own
            rows, open_rows = self._at.get(at, (0, 0))
            self._at[at] = rows + 1, open_rows + gate

    @property
    def gate_rates(self) -> dict[int, tuple[int, int]]:
        """Training timestep -> (rows with the gate open, rows), over all draws."""
        return {t: (opened, rows) for t, (rows, opened) in sorted(self._at.items())}

    def gate_rate(self, addresses: Tensor) -> Tensor:
        """Share of the watched steps of each sample's latest draw at which the gate was open; 0 where none was."""
        seen = [self._seen.get(address, (1, 0, 0, 0.0)) for address in addresses.tolist()]
        return torch.tensor([opened / steps for steps, opened, _, _ in seen], dtype=torch.float64)

    def certificates(
        self,
        addresses: Tensor,
        classifier: Classifier,
        images: Tensor | None = None,
        bank: Tensor | None = None,
        *,
        groups: Tensor | None = None,
        codec: Codec | None = None,
    ) -> Certificates:
        """The rows of some addresses; see :meth:`CPSample.certificates`."""
        unknown = [address for address in addresses.tolist() if address not in self._seen]
        if unknown:
            raise ValueError(
                f"the addresses {unknown[:10]} were not drawn under this protection in this process "
                f"({len(self._seen)} were): draw them first, with a scale above 0"
            )
        if bank is not None and images is None:
            raise ValueError("a bank was given without images: pass the finished samples too")
        seen = [self._seen[address] for address in addresses.tolist()]
        nearest = index = None
        if images is not None and bank is not None:
            distances, places = nearest_neighbors(images, bank, 1, groups=groups)
            nearest, index = distances[:, 0].double() / math.sqrt(images[0].numel()), places[:, 0]
        return Certificates(
            addresses=addresses,
            gate_rate=self.gate_rate(addresses),
            last_confidence=torch.tensor([own for _, _, _, own in seen], dtype=torch.float64),
            final_confidence=None if images is None else final_confidence(classifier, images, codec),
            nearest=nearest,
            nearest_index=index,
        )
