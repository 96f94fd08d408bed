import re

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from lightning_mem.diffusion import DiffusionProcess, Target, sample, sample_x0
from lightning_mem.networks import UNetConfig, UNetDenoiser, build_unet
from lightning_mem.randomness import generator

VARIANTS = [
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "ddpm"},
    {"sampler": "dpm++"},
    {"sampler": "heun"},
    {"sampler": "euler"},
]


def variant_name(options):
    return "-".join(str(value) for value in options.values())


def network_target(prediction="eps", num_classes=None, dropout=0.0, **options):
    """A small UNet with random weights, its outputs far from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = UNetConfig((8, 8), norm_num_groups=4, dropout=dropout)
        unet = build_unet(config, image_size=8, channels=1, num_classes=num_classes).eval()
    process = DiffusionProcess(prediction=prediction, **options)
    return Target(UNetDenoiser(unet, prediction), process, (1, 8, 8), num_classes=num_classes)


def draw(target, indices, **options):
    return sample_x0(target, indices, **{"seed": 0, "num_steps": 4, "block": 16, **options})


@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
def test_a_sample_depends_on_its_address_only(options):
    target = network_target()
    whole = draw(target, range(40), **options)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(target, order, **options), whole[order])
    assert torch.equal(draw(target, [37, 2, 2], **options), whole[[37, 2, 2]])
    assert len(whole.flatten(1).unique(dim=0)) == 40
    assert not torch.equal(draw(target, [37], seed=1, **options)[0], whole[37])


@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
def test_the_last_block_is_padded(options):
    target = network_target()
    whole = draw(target, range(65), block=64, num_steps=2, **options)
    assert whole.shape == (65, 1, 8, 8)
    parts = [draw(target, part, block=64, num_steps=2, **options) for part in (range(64), [64])]
    assert torch.equal(whole, torch.cat(parts))


def test_the_number_of_threads_changes_no_bit():
    target = network_target()
    before = torch.get_num_threads()
    drawn = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            drawn.append(draw(target, range(20), sampler="ddpm"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*drawn)


def test_sampling_leaves_the_global_generator_alone():
    target = network_target(dropout=0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for options in VARIANTS:
        draw(target, range(3), **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_turns_dropout_off_and_leaves_every_layer_as_it_was():
    target = network_target(dropout=0.5)
    unet = target.denoiser.module
    evaluated = draw(target, range(5))
    unet.train()
    unet.mid_block.eval()  # a part that a user froze
    modes = {name: layer.training for name, layer in unet.named_modules()}
    assert torch.equal(draw(target, range(5)), evaluated)
    assert {name: layer.training for name, layer in unet.named_modules()} == modes


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_ddim_is_the_pipeline_of_diffusers_bit_for_bit(prediction, eta):
    target = network_target(prediction)
    pipeline = DDIMPipeline(target.denoiser.module, DDIMScheduler.from_config(target.process.config))
    pipeline.set_progress_bar_config(disable=True)
    generators = [generator(7, "sample", i) for i in range(64)]
    theirs = pipeline(64, generators, eta, num_inference_steps=5, output_type="pt").images
    ours = draw(target, range(64), seed=7, eta=eta, num_steps=5, block=64)
    assert torch.equal((ours / 2 + 0.5).clamp(0, 1), theirs)
    pixels = sample(target, range(64), seed=7, eta=eta, num_steps=5)
    assert torch.equal(pixels, (theirs * 255).round().to(torch.uint8))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
def test_a_term_of_zeros_changes_no_bit(options, prediction):
    target = network_target(prediction)
    plain = draw(target, range(5), **options)
    zeros = draw(target, range(5), guidance=[lambda x_t, t, addresses: torch.zeros_like(x_t)], **options)
    assert torch.equal(plain, zeros)


@pytest.mark.parametrize("options", VARIANTS, ids=variant_name)
def test_terms_see_training_timesteps_addresses_and_the_scale_of_the_denoiser(options):
    target = network_target()
    seen = []

    def watch(x_t, t, addresses):
        seen.append((x_t, t, addresses))
        return torch.zeros_like(x_t)

    draw(target, [30, 11, 12], guidance=[watch], **options)
    expected = target.process.scheduler(options["sampler"], 4).timesteps
    assert [int(t[0]) for _, t, _ in seen] == [int(t) for t in expected]
    for x_t, t, addresses in seen:
        assert t.dtype == torch.int64
        assert (t == t[0]).all()
        assert addresses[:3].tolist() == [30, 11, 12]
        assert x_t.shape == (16, 1, 8, 8)
    # at the largest t, x_t is unit noise in every solver; Euler's own state there is several hundred times that
    assert seen[0][0].std() == pytest.approx(1.0, abs=0.15)


def test_a_term_may_differentiate_a_network():
    # classifier guidance: the gradient of a log-probability with respect to x_t
    target = network_target()
    weight = torch.randn(8 * 8, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def classifier(x_t, t, addresses):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((x.flatten(1) @ weight).sum(), x)
        return gradient

    constant = weight.detach().reshape(1, 8, 8)
    given = draw(target, range(4), guidance=[lambda x_t, t, addresses: constant.expand_as(x_t)])
    assert torch.equal(draw(target, range(4), guidance=[classifier]), given)


def test_the_step_callback_sees_every_step_of_every_block():
    target = network_target()
    seen = []
    drawn = draw(target, range(20), on_step=lambda step, t, x: seen.append((step, t, x)))
    timesteps = [int(t) for t in target.process.scheduler("ddim", 4).timesteps]
    assert [(step, t) for step, t, _ in seen] == 2 * list(enumerate(timesteps))
    assert torch.equal(torch.cat([seen[3][2], seen[7][2]])[:20], drawn)


def test_no_addresses_give_no_images():
    drawn = sample(network_target(), [], seed=0)
    assert drawn.shape == (0, 1, 8, 8)
    assert drawn.dtype == torch.uint8


def test_labels_reach_the_network_row_by_row():
    target = network_target(num_classes=3)
    labels = torch.arange(20) % 3
    mixed = draw(target, range(20), condition=labels)
    for label in range(3):
        alone = draw(target, range(20), condition=torch.full((20,), label))
        assert torch.equal(mixed[labels == label], alone[labels == label])
        assert not torch.equal(mixed[labels != label], alone[labels != label])


@pytest.mark.parametrize(
    ("num_classes", "options", "message"),
    [
        (3, {}, "conditioned on 3 classes"),
        (3, {"condition": torch.tensor([0, 1])}, "one row per index (4), got 2"),
        (3, {"condition": torch.tensor([0, 1, 2, 3])}, "[0, 3), got 0 to 3"),
        (3, {"condition": torch.tensor([0, -1, 2, 2])}, "[0, 3), got -1 to 2"),
        (None, {"eta": -0.5}, "got -0.5 with ddim"),
        (None, {"eta": 0.5, "sampler": "heun"}, "got 0.5 with heun"),
        (None, {"block": 0}, "got 0"),
        (None, {"num_steps": 0}, "got 0"),
        (None, {"sampler": "plms"}, "plms"),
    ],
)
def test_options_that_do_not_fit_are_refused(num_classes, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(network_target(num_classes=num_classes), range(4), **options)


def test_addresses_that_are_no_integers_are_refused():
    # 0.5 and 0.7 would both become sample 0
    with pytest.raises((TypeError, ValueError)):
        draw(network_target(), [0.5, 0.7])
