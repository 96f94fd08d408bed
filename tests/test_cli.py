"""The command line: help that teaches, one place for each size, and errors that say what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wandb
import yaml

from lightning_mem import __version__
from lightning_mem.__main__ import VERBS, main
from lightning_mem.cli import FOLDER_VERBS, MemorizationCLI
from lightning_mem.cli import main as cli_main
from lightning_mem.types import SampleSet

TINY = Path(__file__).parent / "tiny.yaml"


def test_help_and_version_need_no_heavy_import() -> None:
    code = (
        "import sys; from lightning_mem.__main__ import main; main(['--help']); main(['--version']);"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"lightning-mem {__version__}" in done.stdout


def test_help_names_every_verb(capsys: pytest.CaptureFixture) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    assert VERBS.keys() == MemorizationCLI.subcommands().keys() | FOLDER_VERBS.keys()
    assert all(f"  {verb} " in shown for verb in VERBS)


def test_docstrings_are_the_manual(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli_main(["fit", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "How many images of the same source are never trained on; they are the control." in shown
    assert "continues this run folder exactly where it stopped" in shown


def test_a_verb_behind_a_file_of_settings_is_as_complete_as_one_in_front(capsys: pytest.CaptureFixture) -> None:
    Path("all.yaml").write_text("fit:\n  data:\n    num_members: 7\n")
    shown = []
    for words in (["fit", "--data.num_members", "7"], ["--config", "all.yaml", "fit"]):
        with pytest.raises(SystemExit):
            cli_main([*words, "--print_config"])
        shown.append(yaml.safe_load(capsys.readouterr().out))
    assert shown[0]["data"]["num_members"] == 7
    assert shown[0] == shown[1]


def test_sizes_are_said_once(fit) -> None:
    run = fit("run", "--trainer.max_steps", "1", "--data.image_size", "16", "--data.channels", "3")
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["lightning_mem"]
    assert saved["shape"] == [3, 16, 16]
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["image_size"] == 16


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    ("labels", "classes", "options"),
    [("random", 3, ["--data.num_classes", "3"]), ("unique", 20, []), ("binary", 2, []), ("true", 10, [])],
)
def test_labels_condition_the_network(fit, labels: str, classes: int, options: list[str]) -> None:
    run = fit("run", "--data.labels", labels, *options, "--trainer.max_steps", "5")
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["state_dict"]["unet.class_embedding.weight"].shape[0] == classes
    samples = SampleSet.load(run / "samples" / "last.npz")
    assert samples.labels is not None
    assert 0 <= int(samples.labels.min()) <= int(samples.labels.max()) < classes


@pytest.mark.usefixtures("no_curves")
def test_every_verb_takes_the_saved_configuration(fit) -> None:
    run = fit("run")
    before = (run / "metrics.csv").read_text()
    saved = run / "config.yaml"
    for verb in ("validate", "test"):
        fit("run", verb=verb, config=saved)
    fit("run", "--num_samples", "70", "--num_steps", "2", verb="sample", config=saved)
    fit("run", "--num_samples", "70", "--num_steps", "2", "--out", "again", verb="predict", config=saved)
    one, two = SampleSet.load(run / "samples" / "last_ema_seed0_0-70.npz"), SampleSet.load("again.npz")
    assert one.digest == two.digest
    steps = [json.loads(line)["step"] for line in (run / "results.jsonl").read_text().splitlines()]
    assert set(steps) == {5, 10, 12}
    assert (run / "metrics.csv").read_text() == before


@pytest.mark.usefixtures("no_curves")
def test_sampling_continues_where_it_stopped(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mem.evaluation import blocks

    run = fit("run")
    options = ["--num_samples", "200", "--num_steps", "2"]
    original, calls = blocks.sample, []

    def draw(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "sample", draw)
        with pytest.raises(RuntimeError, match="power cut"):
            fit("run", *options, "--out", "part", verb="sample")
        fit("run", *options, "--out", "part", verb="sample")
    assert len(calls) == 3 + 2  # two blocks were there
    fit("run", *options, "--out", "whole", verb="sample")
    assert SampleSet.load("part.npz").digest == SampleSet.load("whole.npz").digest
    assert not Path("part.blocks").exists()
    assert run.exists()


def refused(capsys: pytest.CaptureFixture, *options: str) -> str:
    """What the user reads; the command ended with an error and made no run folder."""
    with pytest.raises(SystemExit) as stop:
        cli_main(["fit", "--config", str(TINY), "--trainer.default_root_dir", "refused", *options])
    assert stop.value.code not in (0, None)
    assert not Path("refused/checkpoints").exists()
    return " ".join(f"{stop.value.code} {capsys.readouterr().err}".split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.num_members", "1800"], "1800 members and 24 held-out images were asked for, but digits has 1797"),
        (["--data.num_members", "0"], "num_members must be at least 1, got 0"),
        (["--data.channels", "2"], "channels must be 1 or 3, got 2"),
        (["--data.nonsense", "1"], "nonsense"),
        (["--model.init_args.nonsense", "1"], "nonsense"),
        (["--model.init_args.network.dropout", "1.5"], "dropout must lie in [0, 1), got 1.5"),
        (["--model.init_args.network.norm_num_groups", "3"], "norm_num_groups (3) must divide every channel count"),
        (["--model.init_args.process.schedule", "quadratic"], "quadratic"),
        (["--data.image_size", "9"], "image_size must be divisible by 2 for 2 levels, got 9"),
        (["--data.labels", "random"], "num_classes"),
        (["--data.duplicates.count", "21", "--data.duplicates.times", "2"], "duplicates.count is 21, but there are 20"),
        (["--ckpt_path", "missing.ckpt"], "there is no missing.ckpt"),
        (["--data.members", "members.txt"], "num_members or members, not both"),
    ],
)
def test_bad_options_are_refused(capsys: pytest.CaptureFixture, options: list[str], message: str) -> None:
    assert message in refused(capsys, *options)


def test_threshold_outside_its_range_is_refused(fit, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(TINY.read_text().replace("num_steps: 3", "num_steps: 3\n        threshold: 1.5"))
    with pytest.raises((SystemExit, ValueError)):
        fit("run", config=config)


def test_overlap_of_members_and_heldout_is_named(fit) -> None:
    Path("members.txt").write_text("1\n2\n3\n4\n")
    Path("heldout.json").write_text("[9, 3, 8, 7, 6, 5]")
    options = ["--data.num_members", "null", "--data.members", "members.txt", "--data.heldout", "heldout.json"]
    with pytest.raises(ValueError, match=r"indices \[3\] are both members and held out"):
        fit("run", *options)


def test_checkpoint_of_another_member_set_is_refused(fit) -> None:
    run = fit("run", "--trainer.max_steps", "2")
    saved = (run / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"trained on the member set .* \(20 images\), but .* \(21 images\)"):
        fit("run", "--data.num_members", "21", "--ckpt_path", "last")
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == saved


def test_checkpoint_of_another_module_is_refused(fit) -> None:
    run = fit("run", "--trainer.max_steps", "2")
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["lightning_mem"]["module"] = "SurrogateModule"
    torch.save(checkpoint, "other.ckpt")
    with pytest.raises(ValueError, match="DenoiserModule was given a checkpoint of SurrogateModule"):
        fit("run", "--ckpt_path", "other.ckpt")


def test_damaged_checkpoint_is_refused_by_name(fit) -> None:
    run = fit("run", "--trainer.max_steps", "2")
    content = (run / "checkpoints" / "last.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half.ckpt cannot be read as a checkpoint"):
        fit("run", "--ckpt_path", "half.ckpt")


def test_checkpoint_that_would_run_code_is_refused(fit) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path("sprung").touch, ())

    run = fit("run", "--trainer.max_steps", "2")
    torch.save({"state_dict": {}, "trap": Trap()}, "trap.ckpt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        fit(str(run), "--ckpt_path", "trap.ckpt")
    assert not Path("sprung").exists()


def test_best_of_a_control_that_does_not_exist_is_refused(fit) -> None:
    with pytest.raises(ValueError, match=r"ModelCheckpoint monitors frechet/pixels/heldout.*data.num_heldout"):
        fit("run", "--data.num_heldout", "0")


def test_without_heldout_images_a_run_says_so_and_trains(fit, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(TINY.read_text().replace("pixels/heldout", "pixels/train"))
    with pytest.warns(UserWarning, match="no control"):
        run = fit("run", "--data.num_heldout", "0", config=config)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["memorization/ratio"]["n"] == 70
    assert summary["memorization/ratio_heldout"]["value"] is None


def test_validate_without_a_trained_network_is_refused(fit) -> None:
    with pytest.raises(ValueError, match="there is no trained network"):
        fit("empty", verb="validate")


@pytest.mark.usefixtures("no_curves")
def test_loss_that_is_not_finite_stops_with_step_and_checkpoint(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mem.modules import DenoiserModule

    original = DenoiserModule._loss

    def loss(self, *args):
        value = original(self, *args)
        return value * float("nan") if self.training and self.global_step == 7 else value

    monkeypatch.setattr(DenoiserModule, "_loss", loss)
    with pytest.raises(FloatingPointError, match=r"not finite since step 8; .*run/checkpoints/last.ckpt"):
        fit("run")
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


@pytest.mark.usefixtures("no_curves")
def test_full_disk_leaves_the_previous_checkpoint(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mem.callbacks import run_folder

    original, calls = torch.save, []

    def save(value, file):
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        original(value, file)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.torch, "save", save)
        with pytest.raises(OSError, match=r"No space left on device.*previous .*last.ckpt is intact"):
            fit("run")
    kept = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 5
    assert not list(Path("run/checkpoints").glob(".*"))


def test_wandb_without_an_account_says_how_to_go_on(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # its settings are read once a process: another test's offline mode would stay
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("NETRC", str(Path.cwd() / "netrc"))
    options = ["--trainer.logger", "lightning_mem.callbacks.WandbTracking", "--trainer.logger.init_args.offline"]
    with pytest.raises(RuntimeError, match=r"W&B did not start.*offline true"):
        fit("run", *options, "false")


def test_the_program_ends_with_one_line_not_a_traceback(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli_main(["validate", "--config", str(TINY), "--trainer.default_root_dir", "empty"])
    assert str(stop.value.code).startswith("ValueError: there is no trained network")


def test_a_verb_on_folders_builds_neither_network_nor_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mem import cli

    def count(numbers: list[int], folder: str = "runs") -> None:
        """Count what is given.

        Args:
            numbers: What to count.
            folder: Where.
        """
        seen.append((numbers, folder))

    seen: list[tuple[list[int], str]] = []
    monkeypatch.setitem(FOLDER_VERBS, "count", count)
    monkeypatch.setattr(cli.MemorizationTrainer, "__init__", lambda *_, **__: pytest.fail("a Trainer was built"))
    Path("count.yaml").write_text("numbers: [1, 2]\n")
    cli_main(["count", "--config", "count.yaml", "--folder", "here"])
    assert seen == [([1, 2], "here")]


def test_the_docstring_of_a_verb_on_folders_is_its_manual(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli_main(["study", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Only show the rows, which of them are there already" in shown
    assert "read_config" not in shown


def test_a_verb_on_folders_ends_with_its_own_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> None:
        """Leave at once."""
        sys.exit(2)

    monkeypatch.setitem(FOLDER_VERBS, "leave", leave)
    with pytest.raises(SystemExit) as stop:
        cli_main(["leave"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["study", "--nonsense", "1"], "unrecognized arguments: --nonsense 1"),
        (["study", "--config", "missing.yaml"], "File does not exist"),
        (["study", "--folder", "here"], "study"),
    ],
)
def test_a_verb_on_folders_refuses_what_it_does_not_know(
    capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli_main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
