import re

import pytest
import torch

from lightning_mem.networks import UNetConfig, UNetDenoiser, build_unet

TINY = UNetConfig((8, 8), norm_num_groups=4, mid_attention=False)


def built(config=TINY, num_classes=None, channels=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_unet(config, image_size=8, channels=channels, num_classes=num_classes).eval()


def batch(n=6, channels=1):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, channels, 8, 8, generator=draw), torch.randint(1000, (n,), generator=draw)


def resnet(width_in, width_out, embedding):
    """Parameters of one residual block: two norms, two 3x3, the projected embedding, a 1x1 where widths differ."""
    norms = 2 * width_in + 2 * width_out
    convolutions = 9 * width_out * (width_in + width_out) + 2 * width_out
    shortcut = width_out * (width_in + 1) if width_in != width_out else 0
    return norms + convolutions + width_out * (embedding + 1) + shortcut


def test_the_tiny_network_has_the_parameters_counted_by_hand():
    width, embedding = 8, 32  # the time embedding is four times the first width
    conv3 = 9 * width * width + width
    expected = (
        (9 * width + width)  # in
        + embedding * (width + 1)  # the two layers of the time embedding
        + embedding * (embedding + 1)
        + 2 * resnet(width, width, embedding)  # down: one block a level,
        + conv3  # and the stride between the two
        + 2 * resnet(width, width, embedding)  # middle
        + 4 * resnet(2 * width, width, embedding)  # up: layers_per_block + 1 blocks, each with its skip
        + conv3
        + 2 * width  # out
        + (9 * width + 1)
    )
    assert sum(p.numel() for p in built().parameters()) == expected


def test_labels_cost_one_embedding_each():
    plain, labelled = (sum(p.numel() for p in built(num_classes=n).parameters()) for n in (None, 7))
    assert labelled - plain == 7 * 32


@pytest.mark.parametrize("channels", [1, 3])
def test_the_output_has_the_shape_of_the_images_and_depends_on_the_timestep(channels):
    denoiser = UNetDenoiser(built(channels=channels), "eps")
    x_t, t = batch(channels=channels)
    output = denoiser(x_t, t)
    assert output.shape == x_t.shape
    later = denoiser(x_t, (t + 500) % 1000)
    assert ((output - later).flatten(1).norm(dim=1) > 1e-3).all()


def test_rows_do_not_see_each_other():
    denoiser = UNetDenoiser(built(UNetConfig((8, 8), norm_num_groups=4, attention_levels=(0,))), "eps")
    x_t, t = batch()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    output = denoiser(x_t, t)
    # equal up to float32 rounding of sums over at most 16 * 9 products
    torch.testing.assert_close(denoiser(x_t[order], t[order]), output[order], rtol=0, atol=1e-5)
    other = x_t.clone()
    other[1:] = 0
    torch.testing.assert_close(denoiser(other, t)[0], output[0], rtol=0, atol=1e-5)


def test_a_conditional_network_needs_labels_and_uses_them():
    denoiser = UNetDenoiser(built(num_classes=3), "eps")
    x_t, t = batch()
    with pytest.raises(ValueError, match="class_labels should be provided"):
        denoiser(x_t, t)
    zeros, ones = (denoiser(x_t, t, torch.full((6,), label)) for label in (0, 1))
    assert ((zeros - ones).flatten(1).norm(dim=1) > 1e-3).all()
    named = denoiser(x_t, t, {"class_labels": torch.full((6,), 1)})
    assert torch.equal(named, ones)


def test_an_unconditional_network_refuses_labels():
    x_t, t = batch()
    with pytest.raises(ValueError, match="class_embedding"):
        UNetDenoiser(built(), "eps")(x_t, t, torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize(("levels", "expected"), [(None, []), ((0,), [0]), ((2,), [2]), ((0, 2), [0, 2])])
def test_attention_stands_at_the_levels_asked_for_on_both_sides(levels, expected):
    config = UNetConfig((8, 8, 8), norm_num_groups=4, attention_levels=levels, attention_head_dim=4)
    unet = built(config)
    down = [i for i, block in enumerate(unet.down_blocks) if hasattr(block, "attentions")]
    up = [2 - i for i, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")]
    assert down == expected
    assert sorted(up) == expected
    heads = {layer.heads for block in unet.down_blocks for layer in getattr(block, "attentions", ())}
    assert heads == ({2} if expected else set())  # 8 channels, 4 each


@pytest.mark.parametrize("wanted", [True, False])
def test_the_middle_attends_only_if_asked(wanted):
    unet = built(UNetConfig((8, 8), norm_num_groups=4, mid_attention=wanted))
    attending = [name for name, _ in unet.named_modules() if name.startswith("mid_block") and name.endswith("to_q")]
    assert bool(attending) == wanted


def test_dropout_and_other_arguments_reach_the_network():
    unet = built(UNetConfig((8, 8), norm_num_groups=4, dropout=0.3, extra={"act_fn": "relu"}))
    rates = {
        layer.p for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Dropout) and "resnets" in name
    }
    assert rates == {0.3}
    assert unet.config.act_fn == "relu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_out_channels": ()}, "at least one level"),
        ({"block_out_channels": (8, 12), "norm_num_groups": 8}, "(8) must divide every channel count, not [12]"),
        ({"dropout": 1.0}, "got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"attention_levels": (0, 2)}, "[0, 2), got [2]"),
        ({"attention_levels": (-1,)}, "got [-1]"),
    ],
)
def test_settings_that_make_no_network_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        UNetConfig(**options)


@pytest.mark.parametrize(("size", "levels"), [(8, 5), (12, 4), (7, 2)])
def test_a_size_that_cannot_be_halved_is_refused(size, levels):
    config = UNetConfig((8,) * levels, norm_num_groups=4)
    with pytest.raises(ValueError, match=f"divisible by {2 ** (levels - 1)} for {levels} levels, got {size}"):
        build_unet(config, size, 1)
