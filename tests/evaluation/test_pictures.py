"""Pictures: images stand where they belong."""

import torch

from lightning_mem.evaluation.pictures import tile


def patterns(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_tile_puts_images_where_they_belong() -> None:
    images = patterns(5)
    sheet = tile(images, columns=2, gap=1)
    assert sheet.shape == (1, 26, 17)
    assert torch.equal(sheet[:, 9:17, 9:17], images[3])
    assert (sheet[:, 8] == 160).all()
