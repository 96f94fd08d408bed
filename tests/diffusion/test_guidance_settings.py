"""What a guided draw writes down, the loop it runs in, and what is refused."""

import json
import math
import re

import pytest
import torch
from guiding import NetworkClassifier, network_target
from lightning.pytorch import Trainer

from lightning_mem.callbacks.drawing import Blocks, Drawer
from lightning_mem.diffusion import (
    ClassifierGuidance,
    DiffusionProcess,
    guidance_settings,
    sample,
)
from lightning_mem.evaluation import draw_samples
from lightning_mem.types import SampleSet


@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_drawer_guides_inside_the_predict_loop(inference_mode, tmp_path):
    target, classifier = network_target(), NetworkClassifier()
    before = {name: value.clone() for name, value in classifier.module.state_dict().items()}
    guidance = ClassifierGuidance(classifier, torch.arange(70) % 3, 50.0, interval=(300, 1000))
    settings = {
        "sampler": "ddim", "num_steps": 4, "eta": 0.0, "block": 64, "sample_seed": 5, "target": target.digest,
    }  # fmt: skip
    drawer = Drawer(target, settings, [guidance])
    # registered: the strategy moves it with the denoiser's network
    assert {id(p) for p in classifier.module.parameters()} <= {id(p) for p in drawer.parameters()}
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, inference_mode=inference_mode,
    )  # fmt: skip
    drawn = trainer.predict(drawer, dataloaders=Blocks(tmp_path / "blocks", 0, 70, drawer.settings))
    plain = draw_samples(target, 70, seed=5, num_steps=4)
    direct = draw_samples(target, 70, seed=5, num_steps=4, guidance=[guidance])
    images = torch.cat([part.images for part in drawn])
    assert torch.equal(images, direct.images)
    assert not torch.equal(images, plain.images)
    assert all(torch.equal(value, before[name]) for name, value in classifier.module.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.module.parameters())
    own = guidance_settings([guidance])
    assert own == {**guidance.settings, "guidance_clip": "x0 and eps"}
    assert drawer.settings == drawn[0].settings == {**settings, **own}
    assert direct.settings == {**plain.settings, **own}


def test_settings_tell_guidances_apart_and_survive_the_disk(tmp_path):
    labels = torch.arange(6) % 3
    classifier, other = NetworkClassifier(), NetworkClassifier()
    other.digest = "other"
    guidances = [
        ClassifierGuidance(classifier, labels),
        ClassifierGuidance(other, labels),
        ClassifierGuidance(classifier, labels.flip(0)),
        ClassifierGuidance(classifier, labels, addresses=torch.arange(1, 7)),
        ClassifierGuidance(classifier, labels, 2.0),
        ClassifierGuidance(classifier, labels, interval=(0, 999)),
        ClassifierGuidance(classifier, labels, schedule="linear"),
    ]
    settings = [guidance_settings([guidance]) for guidance in guidances]
    assert len({json.dumps(entry, sort_keys=True) for entry in settings}) == 7
    order = torch.tensor([4, 1, 0, 3, 2, 5])  # the same labels in another order are the same guidance
    assert ClassifierGuidance(classifier, labels[order], addresses=order).settings == guidances[0].settings
    both = guidance_settings(guidances[:2])
    assert both["guidance_classifier"] == "network"
    assert both["guidance_classifier_2"] == "other"
    assert guidance_settings([]) == {}
    found = draw_samples(network_target(), 6, num_steps=2, guidance=guidances[:2])
    found.save(tmp_path / "guided.npz")
    assert SampleSet.load(tmp_path / "guided.npz").settings == found.settings
    assert both.items() <= found.settings.items()


def test_terms_that_cannot_be_told_apart_are_refused_where_samples_are_kept():
    nameless = NetworkClassifier()
    nameless.digest = ""
    with pytest.raises(ValueError, match="no digest"):
        draw_samples(
            network_target(), 2, num_steps=2, guidance=[ClassifierGuidance(nameless, torch.zeros(2, dtype=torch.int64))]
        )
    with pytest.raises(ValueError, match="needs a mapping `settings`"):
        draw_samples(network_target(), 2, num_steps=2, guidance=[lambda x_t, t, addresses: None])


LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.tensor([0, 1, 3])}, "labels must lie in [0, 3), got 0 to 3"),
        ({"labels": torch.tensor([0, -1])}, "labels must lie in [0, 3), got -1 to 0"),
        ({"labels": torch.tensor([0.0, 1.0])}, "integers [N], got torch.float32 (2,)"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, "integers [N], got torch.int64 (2, 3)"),
        ({"addresses": torch.arange(3)}, "one entry per label (4), got (3,)"),
        ({"addresses": torch.tensor([0, 1, 1, 2])}, "an address occurs twice"),
        ({"interval": (500, 500)}, "0 <= low < high <= 1000, got [500, 500)"),
        ({"interval": (600, 500)}, "got [600, 500)"),
        ({"interval": (-1, 500)}, "got [-1, 500)"),
        ({"interval": (500, 1001)}, "got [500, 1001)"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
        ({"schedule": "cosine"}, "got 'cosine'"),
        ({"process": DiffusionProcess("linear")}, "another noising process"),
        ({"process": DiffusionProcess(num_timesteps=500)}, "another noising process (1000 timesteps"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ClassifierGuidance(NetworkClassifier(), **{"labels": LABELS, **options})


def test_a_sample_without_a_label_is_refused():
    guidance = ClassifierGuidance(NetworkClassifier(), LABELS, addresses=torch.tensor([2, 4, 6, 8]))
    with pytest.raises(ValueError, match=re.escape("no label for the addresses [3, 9]; it has 4 addresses (2 to 8)")):
        sample(network_target(), [2, 3, 9], seed=0, num_steps=2, guidance=[guidance])
    empty = ClassifierGuidance(NetworkClassifier(), LABELS[:0])
    with pytest.raises(ValueError, match=re.escape("no label for the addresses [0]; it has 0 addresses (none)")):
        sample(network_target(), [0], seed=0, num_steps=2, guidance=[empty])


def test_classifiers_that_cannot_guide_are_refused():
    class Plain:
        num_classes = 3

        def __call__(self, x_t, t):
            return x_t.flatten(1)[:, :2]

    class Blind(Plain):
        num_classes = 2

        @torch.no_grad()
        def __call__(self, x_t, t):
            return super().__call__(x_t, t) * 2

    with pytest.raises(ValueError, match="pass process="):
        ClassifierGuidance(Plain(), LABELS)
    at = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    with pytest.raises(ValueError, match=re.escape("must return logits [4, 3], got [4, 2]")):
        ClassifierGuidance(Plain(), LABELS, process=DiffusionProcess())(*at)
    with pytest.raises(ValueError, match="carry no gradient to x_t"):
        ClassifierGuidance(Blind(), LABELS % 2, process=DiffusionProcess())(*at)
