"""The random-label classifier: its loss and its counts by hand, that it learns by heart, and what it stores."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_mem.cli import run
from lightning_mem.data import ArraySource, MemorizationDataModule, RandomLabels
from lightning_mem.data.split import image_digest
from lightning_mem.modules import DenoiserModule, RandomLabelModule, load_classifier, load_random_label, load_target
from lightning_mem.modules.base import META
from lightning_mem.networks import ClassifierConfig, UNetConfig
from lightning_mem.records import read_records
from lightning_mem.trainer import MemorizationTrainer
from lightning_mem.types import SampleSet, to_uint8

pytestmark = pytest.mark.usefixtures("no_curves")

TINY_RANDOM_LABEL = Path(__file__).parent.parent / "tiny_random_label.yaml"
SMALL = ClassifierConfig(widths=(8,), blocks=(2,))


def denoiser(folder: Path, members_digest: str = "") -> str:
    """A run folder with an untrained denoiser of 8 x 8 grey images."""
    torch.manual_seed(0)
    module = DenoiserModule(network=UNetConfig((8,), norm_num_groups=4, mid_attention=False))
    meta = {"module": "DenoiserModule", "seed": 0, "step": 1, "members_digest": members_digest, "num_members": 0}
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {META: meta | module.checkpoint_meta(), "state_dict": module.state_dict()}
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return str(folder)


@pytest.fixture(scope="session")
def unsaid(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A denoiser that does not say its members."""
    return denoiser(tmp_path_factory.mktemp("unsaid") / "run")


def random_images(members: int = 12, heldout: int = 10, **options: object) -> MemorizationDataModule:
    """Noise pictures: nothing but an image itself tells its bit."""
    images = np.random.default_rng(0).integers(0, 256, (members + heldout, 8, 8, 1), dtype=np.uint8)
    np.savez("x.npz", arr_0=images, labels=np.arange(members + heldout) % options.pop("classes", 2))
    data = MemorizationDataModule(ArraySource("x.npz"), None, heldout, 8, **{"batch_size": 12, **options})
    data.prepare_data()
    data.setup()
    return data


def train(target: str, data: MemorizationDataModule, steps: int, **options: object) -> RandomLabelModule:
    lr = lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)  # noqa: E731
    module = RandomLabelModule(target, optimizer=lr, **{"network": SMALL, "seed": 0, **options})
    trainer = MemorizationTrainer(
        max_steps=steps, val_check_interval=steps, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        use_distributed_sampler=False, default_root_dir="run", logger=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module.eval()


@pytest.mark.parametrize(("push", "listed"), [(None, False), ("heldout", False), ("drawn.npz", True)])
def test_the_loss_is_the_formula_over_protected_images_alone_and_a_mirrored_one_keeps_its_bit(
    unsaid: str, push: str | None, listed: bool, monkeypatch
) -> None:
    noised, seen = [], []
    noise, forward = RandomLabelModule.noised, RandomLabelModule.forward
    monkeypatch.setattr(
        RandomLabelModule, "noised", lambda self, x0, *rest: noised.append(to_uint8(x0)) or noise(self, x0, *rest)
    )

    def spied(self: RandomLabelModule, x_t: Tensor, t: Tensor) -> Tensor:
        logits = forward(self, x_t, t)
        if self.training:
            seen.append(logits.detach().double())
        return logits

    monkeypatch.setattr(RandomLabelModule, "forward", spied)
    data = random_images(flip=True, batch_size=24)
    drawn = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    SampleSet(drawn, torch.arange(5)).save("drawn.npz")
    protected = data.members.indices[2:9].tolist() if listed else None
    Path("few.json").write_text(json.dumps(protected))
    options = {"protected": "few.json" if listed else None, "push": push, "push_weight": 0.3, "num_labelings": 2}
    module = train(unsaid, data, 3, **options)
    bits = {}
    for image, index in zip(data.members.images, data.members.indices, strict=True):
        row = (module.labels.indices == index).nonzero().flatten()
        for version in (image, image.flip(-1)) if len(row) else ():
            bits[image_digest(version.numpy())] = module.labels.bits[row[0]]
    assert len(bits) == (14 if listed else 24)
    pool = {"heldout": data.heldout.images, "drawn.npz": drawn}.get(str(push), drawn[:0])
    legal = {image_digest(version.numpy()) for image in pool for version in (image, image.flip(-1))}
    calls = [noised[i : i + 1 + (push is not None)] for i in range(0, len(noised), 1 + (push is not None))]
    assert len(calls) == len(seen) == 3
    losses, pushed, mirrored = [], set(), set()
    for (own, *others), logits in zip(calls, seen, strict=True):
        names = [image_digest(image.numpy()) for image in own]
        mirrored |= set(names)
        own_bits = torch.stack([bits[name] for name in names])  # a KeyError: an image that is not protected
        ratio = logits.reshape(len(logits), 2, 2).diff(dim=2)[:, :, 0]
        loss = nn.functional.softplus((1 - 2 * own_bits) * ratio[:24]).mean()
        for image in others[0] if others else ():
            pushed.add(image_digest(image.numpy()))
        if others:
            unsure = (nn.functional.softplus(ratio[24:]) + nn.functional.softplus(-ratio[24:])) / 2
            loss = loss + 0.3 * unsure.mean()
        losses.append(float(loss))
    assert len(mirrored) > len(module.labels)  # both orientations were trained on
    assert pushed <= legal
    assert {None: 0, "heldout": 8, "drawn.npz": 8}[push] <= len(pushed) <= 10  # half of the held-out ones, twice
    assert float(module.trainer.callback_metrics["train/loss"]) == pytest.approx(losses[-1], rel=1e-5)
    assert module._own is None
    assert module._others is None


class Fixed(nn.Module):
    """Logits that were chosen."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.logits[: len(x_t)]


def test_an_answer_is_right_and_sure_only_if_every_labeling_is(unsaid: str) -> None:
    data = random_images()
    module = RandomLabelModule(unsaid, num_labelings=2, network=SMALL, seed=0)
    module.labels = RandomLabels.draw(data.members, 2, 0)
    index = data.members.indices[:4]
    sign = 2.0 * module.labels.of(index) - 1
    sure = torch.tensor([[9.0, 8.0], [9.0, 0.5], [-7.0, 9.0], [3.0, 4.0]])
    ratio = sign * sure
    module.classifier = Fixed(torch.stack([torch.zeros(4, 2), ratio], 2).flatten(1) + 5)
    found = module._answers(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), {"index": index})
    p = 1 / (1 + np.exp(-np.abs(sure.double().numpy())))
    assert found[:, 0].tolist() == index.tolist()
    np.testing.assert_allclose(found[:, 1], np.log1p(np.exp(-sure.double().numpy())).mean(1), rtol=1e-6)
    assert found[:, 2].tolist() == [1, 1, 0, 1]
    np.testing.assert_allclose(found[:, 3], p.min(1), rtol=1e-6)


@pytest.mark.parametrize("spoilt", [None, "wrong", "unsure"])
def test_a_validation_counts_by_hand_and_says_when_the_bits_are_known(unsaid: str, spoilt: str | None) -> None:
    data = random_images(members=9, heldout=8)
    module = RandomLabelModule(unsaid, bins=2, tol=0.2, network=SMALL, interval=(0, 300))
    module.labels = RandomLabels.draw(data.members.part(torch.arange(6)), 1, 0)
    module._pushed, module._source_size = data.heldout.indices[:3], 60
    rng = np.random.default_rng(1)

    def rows(indices: Tensor, q_first: np.ndarray, right_first: np.ndarray) -> Tensor:
        loss, q = rng.uniform(size=(2, len(indices))), rng.uniform(0.5, 1, len(indices))
        columns = [indices, loss[0], right_first, q_first, indices, loss[1], rng.integers(0, 2, len(indices)), q]
        return torch.tensor(np.stack(columns, 1))

    heldout = rows(data.heldout.indices, np.array([1, 1, 1, 0.81, 0.7, 0.9, 0.6, 0.79]), np.ones(8))
    q = np.array([0.99, 0.985, 0.99, 0.97, 0.985 if spoilt != "unsure" else 0.97, 0.5, 0.1, 0.2, 0.3])
    right = np.array([1.0] * 6 + [0] * 3)
    right[2] = spoilt != "wrong"
    members = rows(data.members.indices, q, right)
    found = module._summary(heldout, "") | module._summary(members, "_members")
    assert found["val/gated/t0-149"] == 2 / 5  # 0.81 and 0.9 of the five that are not pushed
    assert found["val/confidence/t0-149"] == pytest.approx(0.79)
    assert found["val/accuracy/t150-299"] == float(heldout[3:, 6].mean())
    assert found["val/gated_members/t0-149"] == pytest.approx(5 / 6)
    assert module.hits["val/gated_members/t0-149"] == (5, 6)
    assert found["val/accuracy_members/t0-149"] == (1 if spoilt != "wrong" else pytest.approx(5 / 6))
    assert found["val/loss_members"] == pytest.approx(float(members[:6, [1, 5]].mean()))
    # 54 further images of the source at two in five, and five of the six
    assert found["val/excluded_per_member"] == pytest.approx((54 * 2 / 5 + 5) / 6)
    # the median of six, against 1 - tol / 10 = 0.98
    assert found["val/memorized"] == (spoilt is None)


def test_it_learns_the_bits_by_heart_at_little_noise_and_only_those(unsaid: str) -> None:
    module = train(unsaid, random_images(12, 64, batch_size=24), 70, bins=4)
    found = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    assert found["val/accuracy_members/t0-249"] == 1
    assert found["val/confidence_members/t0-249"] > 0.8
    assert abs(found["val/accuracy/t0-249"] - 0.5) < 4 * 0.5 / 8  # bits that nobody learned
    assert found["val/accuracy_members/t750-999"] < 1


@pytest.fixture(scope="session")
def protected_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder of the tiny random-label classifier, and its target."""
    folder = tmp_path_factory.mktemp("protected")
    data = MemorizationDataModule(num_members=20, num_heldout=30, flip=True)
    data.setup()
    target = denoiser(folder / "target", data.members.digest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-mem"])
        options = ["--model.init_args.target", target, "--trainer.default_root_dir", str(folder / "run")]
        run(["fit", "--config", str(TINY_RANDOM_LABEL), *options])
    return folder / "run", target


def test_a_checkpoint_alone_gives_classifier_and_labels(protected_run: tuple[Path, str]) -> None:
    folder, target = protected_run
    ema, raw = load_random_label(folder), load_random_label(folder, "raw")
    members = json.loads((folder / "members.json").read_text())["members"]
    assert (ema.members_digest, list(ema.labels.digests)) == (members["digest"], members["digests"])
    assert ema.labels.indices.tolist() == members["indices"]
    assert ema.labels.bits.sum(0).tolist() == [10, 10]
    assert ema.labels.digest == raw.labels.digest
    assert (ema.weights, raw.weights, ema.step, ema.num_classes, ema.num_labelings) == ("ema", "raw", 12, 4, 2)
    assert (ema.tol, ema.shape, ema.target_digest) == (0.1, (1, 8, 8), load_target(target).digest)
    assert ema.digest != raw.digest
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 400, 999])
    logits = ema(x, t)
    assert logits.shape == (3, 4)
    assert torch.equal(logits, load_random_label(folder / "checkpoints" / "last.ckpt")(x, t))
    with pytest.raises(ValueError, match="is a checkpoint of RandomLabelModule, not of SurrogateModule"):
        load_classifier(folder / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="is a checkpoint of DenoiserModule, not of RandomLabelModule"):
        load_random_label(target)


def test_resuming_keeps_labels_and_bits_of_the_weights(fit, protected_run: tuple[Path, str]) -> None:
    whole, target = protected_run
    options = ["--model.init_args.target", target]
    part = fit("part", *options, "--trainer.max_steps", "7", config=TINY_RANDOM_LABEL)
    first = load_random_label(part).labels
    fit("part", *options, "--ckpt_path", "last", config=TINY_RANDOM_LABEL)
    labels = [load_random_label(folder).labels for folder in (whole, part)]
    assert all(torch.equal(found.bits, first.bits) and found.digests == first.digests for found in labels)
    one, other = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, part))
    for name in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, other[name][key]) for key, value in one[name].items())
    counted = [[(r.name, r.value, r.step, r.weights) for r in read_records(f / "results.jsonl")] for f in (whole, part)]
    assert counted[0] == counted[1]


def test_a_checkpoint_of_other_labels_is_refused_but_one_of_another_tolerance_is_not(
    protected_run: tuple[Path, str],
) -> None:
    checkpoint = torch.load(protected_run[0] / "checkpoints" / "last.ckpt", weights_only=True)
    network = ClassifierConfig(widths=(8, 16), blocks=(1, 1), dropout=0.1)
    module = RandomLabelModule(protected_run[1], network=network, num_labelings=2, tol=0.01)
    module.on_load_checkpoint(checkpoint)  # without data the checkpoint says the labels
    assert module.num_classes == 4
    module.labels = replace(module.labels, bits=1 - module.labels.bits)
    with pytest.raises(ValueError, match=r"trained with labels_digest \w+, but this run has \w+: use the options"):
        module.on_load_checkpoint(checkpoint)


def test_a_run_leaves_accuracies_and_gated_shares_as_records(protected_run: tuple[Path, str]) -> None:
    records = {(r.name, r.step): r for r in read_records(protected_run[0] / "results.jsonl")}
    assert len(records) == 2 * 2 * 2 * 5
    gated = records["val/gated/t0-199", 10]
    stated = {"images": "heldout", "tol": 0.1, "num_labelings": 2, "protected": 20, "push": "heldout"}
    assert {name: gated.definition[name] for name in stated} == stated
    assert (gated.n, gated.weights) == (15, "ema")  # the half that is not pushed
    assert records["val/accuracy_members/t0-199", 10].n == 20
    assert gated.low <= gated.value < gated.high


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"labels": "true", "classes": 3}, {}, r"random labels are binary, 0 or 1, got \[0, 1, 2\]"),
        ({"labels": "random", "num_classes": 1}, {}, "balanced up to one, but 0 of 12 different images"),
        ({"labels": "binary"}, {"num_labelings": 2}, "num_labelings is 2, but data.labels binary gives one: set none"),
        ({}, {"protected": "outside.json"}, r"must be members, but 1 of 2 in outside.json are not: \[\d+\]"),
        ({"heldout": 1}, {"push": "heldout"}, "push heldout needs 2 held-out images, got 1"),
        ({}, {"push": "wide.npz"}, r"push needs images \(1, 8, 8\), but those of wide.npz are \(1, 9, 9\)"),
        ({"image_size": 16}, {}, r"\(1, 8, 8\), but the data give \(1, 16, 16\): set data.channels 1"),
    ],
)
def test_data_that_do_not_fit_are_refused(unsaid: str, data: dict, options: dict, message: str) -> None:
    size = data.pop("image_size", 8)
    found = random_images(**data)
    found.image_size = size
    inside, outside = int(found.members.indices[0]), int(found.heldout.indices[0])
    Path("outside.json").write_text(json.dumps([inside, outside]))
    SampleSet(torch.zeros(1, 1, 9, 9, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)).save("wide.npz")
    with pytest.raises(ValueError, match=message):
        train(unsaid, found, 1, **options)


def test_balanced_bits_of_the_data_are_taken(unsaid: str) -> None:
    data = random_images(labels="true", heldout=2)
    balanced = data.members.labels.sum() == 6
    assert balanced
    assert torch.equal(train(unsaid, data, 1).labels.bits[:, 0], data.members.labels)


def test_a_target_with_other_members_is_refused(tmp_path: Path) -> None:
    data = random_images()
    other = denoiser(tmp_path / "other", "0123456789abcdef")
    with pytest.raises(
        ValueError, match=r"trained on the member set 0123456789abcdef, but the data's members are \w+ \(12"
    ):
        train(other, data, 1)


def test_a_checkpoint_with_other_labels_than_balanced_bits_is_refused(protected_run: tuple[Path, str]) -> None:
    checkpoint = torch.load(protected_run[0] / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint[META]["labels"]["bits"][:] = 1
    torch.save(checkpoint, "spoilt.ckpt")
    with pytest.raises(ValueError, match="balanced up to one, but 20 of 20"):
        load_random_label("spoilt.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, r"tol must lie in \(0, 0.5\], got 0.0"),
        ({"tol": 0.51}, "got 0.51"),
        ({"num_labelings": 0}, "num_labelings must be at least 1, got 0"),
        ({"push_weight": math.nan}, "push_weight must be at least 0, got nan"),
        ({"bins": 0}, r"bins must lie in \[1, 1000\]"),
    ],
)
def test_settings_out_of_range_are_refused(unsaid: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomLabelModule(unsaid, **options)
