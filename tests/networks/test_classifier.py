"""The classifier: timm's ResNet with one FiLM by the timestep, in the one right place."""

import json
import math

import pytest
import timm
import torch
from torch import nn

from lightning_mem.networks import ClassifierConfig, TimeClassifier, build_classifier
from lightning_mem.networks.classifier import TimeModulation

TINY = ClassifierConfig(widths=(8, 16), blocks=(1, 1))


def build(config: ClassifierConfig = TINY, size: int = 8, **options: object) -> TimeClassifier:
    torch.manual_seed(0)
    return build_classifier(config, size, 1, 5, **options).eval()


def images(size: int = 8, channels: int = 1) -> torch.Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))


def modulation_of(network: TimeClassifier) -> TimeModulation:
    return network.backbone.layer1[0].bn1.modulation


def taught(network: TimeClassifier) -> TimeClassifier:
    """The same, with a time module that does something."""
    with torch.no_grad():
        for parameter in modulation_of(network).linear.parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
        for module in network.modules():  # timm starts residual branches at zero
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight.fill_(1)
    return network


T = torch.tensor([0, 10, 500, 999])


def test_it_starts_as_the_plain_network_whatever_t_is() -> None:
    timed = build()
    plain = build(time_dependent=False)
    shared = {name.replace("bn1.norm.", "bn1."): value for name, value in timed.state_dict().items()}
    plain.load_state_dict({name: value for name, value in shared.items() if "modulation" not in name})
    assert torch.equal(timed(images(), T), plain(images(), T))


def test_what_t_does_is_the_formula_after_the_first_norm_and_before_the_activation() -> None:
    network = taught(build())
    block, seen = network.backbone.layer1[0], {}
    block.conv1.register_forward_hook(lambda module, args, out: seen.update(conv=out.clone()))
    block.act1.register_forward_pre_hook(lambda module, args: seen.update(into_act=args[0].clone()))
    network(images(), T)
    norm, modulation = block.bn1.norm, modulation_of(network)
    h = seen["conv"].double()
    shape = (1, -1, 1, 1)
    h = (h - norm.running_mean.reshape(shape)) / (norm.running_var.reshape(shape) + norm.eps).sqrt()
    h = h * norm.weight.reshape(shape) + norm.bias.reshape(shape)
    angles = T.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(64) / 63)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    spread = waves.var(1, unbiased=False, keepdim=True)
    z = (waves - waves.mean(1, keepdim=True)) / (spread + modulation.norm.eps).sqrt()
    z = z / (1 + torch.exp(-z))
    linear = modulation.linear.double()
    scale, shift = (z @ linear.weight.T + linear.bias).reshape(4, 2, 8).unbind(1)
    expected = (1 + scale)[..., None, None] * h + shift[..., None, None]
    torch.testing.assert_close(seen["into_act"].double(), expected, rtol=1e-4, atol=1e-4)


def test_t_belongs_to_its_row_and_is_not_kept() -> None:
    network = taught(build())
    together = network(images(), T)
    assert not torch.allclose(together, network(images(), T.flip(0)), atol=1e-3)
    torch.testing.assert_close(together[2:3], network(images()[2:3], T[2:3]), rtol=1e-4, atol=1e-5)
    assert network.backbone.layer1[0].bn1.t is None
    with pytest.raises(ValueError, match="the timestep is not known here"):
        network.backbone(images())


def test_without_time_there_is_no_time_module_and_t_changes_nothing() -> None:
    network = build(time_dependent=False)
    assert not any(isinstance(module, TimeModulation) for module in network.modules())
    assert torch.equal(network(images(), T), network(images(), T.flip(0)))


def test_defaults_are_a_resnet34_of_timm_at_64_pixels_and_a_small_one_below() -> None:
    assert ClassifierConfig().resolved(64) == ClassifierConfig(backbone="resnet34", stem="large", activation="relu")
    assert ClassifierConfig().resolved(63) == ClassifierConfig(backbone="small", stem="small", activation="silu")
    with torch.device("meta"):
        theirs = timm.create_model("resnet34", num_classes=5, in_chans=1)
        ours = build_classifier(ClassifierConfig(), 64, 1, 5, time_dependent=False)
    sizes = [{name: value.shape for name, value in network.state_dict().items()} for network in (theirs, ours.backbone)]
    assert sizes[0] == sizes[1]


def test_a_small_stem_keeps_the_resolution() -> None:
    config = ClassifierConfig(backbone="resnet18", stem="small")
    network, seen = build(config), []
    network.backbone.layer1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert network(images(), T).shape == (4, 5)
    assert seen == [(4, 64, 8, 8)]


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_the_activation_is_the_one_asked_for(activation: str) -> None:
    network = build(ClassifierConfig(widths=(8, 16), blocks=(1, 1), activation=activation))
    x = torch.linspace(-3, 3, 13)
    names = [name for name, _ in network.backbone.named_modules() if name.endswith(("act1", "act2"))]
    assert len(names) == 5
    for name in names:
        assert torch.equal(network.backbone.get_submodule(name)(x.clone()), getattr(nn.functional, activation)(x))


def test_group_norm_sees_one_image_at_a_time() -> None:
    config = ClassifierConfig(widths=(8, 16), blocks=(1, 1), norm="group", norm_num_groups=4)
    network = taught(build(config)).train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(images(), T)[:1], network(images()[:1], T[:1]), rtol=1e-4, atol=1e-5)


def test_a_configuration_survives_json() -> None:
    config = ClassifierConfig(backbone="resnet18", widths=(8, 16, 32), blocks=(1, 2, 1), extra={"drop_path_rate": 0.1})
    assert ClassifierConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("config", "size", "classes", "message"),
    [
        ({"backbone": "vit_tiny_patch16_224"}, 8, 5, "small or a ResNet of timm .*got 'vit_tiny_patch16_224'"),
        ({"backbone": "resnet34", "stem": "large"}, 16, 5, "image_size must be at least 32 .*got 16: use stem small"),
        ({"widths": (8, 16, 16, 16), "blocks": (1,) * 4}, 4, 5, "image_size must be at least 8 for small"),
        ({"norm": "group", "norm_num_groups": 3}, 8, 5, r"norm_num_groups \(3\) must divide every width, not 32"),
        ({}, 8, 1, "num_classes of at least 2, got 1"),
    ],
)
def test_what_cannot_be_built_is_refused(config: dict, size: int, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_classifier(ClassifierConfig(**config), size, 1, classes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widths": (8, 16), "blocks": (1,)}, r"widths and blocks need one .*got \[8, 16\] and \[1\]"),
        ({"widths": (), "blocks": ()}, "1 to 4 levels"),
        ({"widths": (8,), "blocks": (1,)}, r"blocks must come to at least 2 .*got \[1\]"),
        ({"widths": (9,), "blocks": (2,)}, "the first of widths must be even, got 9"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"time_channels": 21}, "time_channels must be even and at least 4, got 21"),
    ],
)
def test_settings_out_of_range_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**config)
