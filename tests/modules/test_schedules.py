import io
import math

import pytest
import torch

from lightning_mem.modules import WarmupCosine


def optimizer(*rates):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def rates_used(steps, warmup_steps, total_steps, *base):
    """Rate of each group at each optimizer step."""
    opt = optimizer(*base)
    schedule = WarmupCosine(opt, warmup_steps, total_steps)
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in opt.param_groups])
        opt.step()
        schedule.step()
    return used


@pytest.mark.parametrize(("warmup", "total"), [(0, None), (0, 10), (5, None), (5, 10), (10, 10), (20, 10), (1, 1)])
def test_rates_follow_the_formula(warmup, total):
    for step, (first, second) in enumerate(rates_used(15, warmup, total, 0.1, 2.0), start=1):
        rise = min(1.0, step / warmup) if warmup else 1.0
        fall = 1.0 if total is None else (1 + math.cos(math.pi * min(step, total) / total)) / 2
        assert first == pytest.approx(0.1 * rise * fall, abs=1e-16)
        assert second == pytest.approx(2.0 * rise * fall, abs=1e-15)


def test_the_named_points_of_the_schedule():
    used = [first for (first,) in rates_used(200, 10, 100, 1.0)]
    assert used[0] == pytest.approx(0.1, rel=1e-3)  # the first step already learns
    assert used[49] == pytest.approx(0.5)  # step 50 of 100
    assert used[99:] == [0.0] * 101
    assert used[9:] == sorted(used[9:], reverse=True)


def test_a_schedule_continued_from_its_state_gives_the_same_rates():
    whole = rates_used(30, 7, 25, 0.3)
    opt = optimizer(0.3)
    schedule = WarmupCosine(opt, 7, 25)
    for _ in range(12):
        opt.step()
        schedule.step()
    file = io.BytesIO()
    torch.save({"optimizer": opt.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = optimizer(0.3)
    continued = WarmupCosine(again, 7, 25)
    again.load_state_dict(state["optimizer"])
    continued.load_state_dict(state["schedule"])
    rates = []
    for _ in range(18):
        rates.append([group["lr"] for group in again.param_groups])
        again.step()
        continued.step()
    assert rates == whole[12:]


@pytest.mark.parametrize(("warmup", "total"), [(-1, 10), (0, 0), (3, -5)])
def test_lengths_out_of_range_are_refused(warmup, total):
    with pytest.raises(ValueError, match=f"got {warmup}, {total}"):
        WarmupCosine(optimizer(0.1), warmup, total)
