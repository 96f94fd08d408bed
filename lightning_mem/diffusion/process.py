"""The forward process: schedule, noising, and the conversions between eps, v, x0 and the score."""

from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor

from lightning_mem.records import digest
from lightning_mem.types import Prediction

Schedule = Literal["linear", "scaled_linear", "cosine"]
Sampler = Literal["ddim", "ddpm", "dpm++", "heun", "euler"]

_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_PREDICTION_TYPES = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
_SAMPLERS: dict[str, type[SchedulerMixin]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
    "euler": EulerDiscreteScheduler,
}
# Their default spacings are fractional; only `trailing` visits training timesteps.
_INTEGER_SPACING = {"heun": {"timestep_spacing": "trailing"}, "euler": {"timestep_spacing": "trailing"}}
# What a scheduler's configuration must hold to be read as a discrete variance-preserving process.
_NEEDED = ("num_train_timesteps", "beta_schedule", "prediction_type")
# Classes whose alpha_bar is the plain product of their betas.
_READABLE = {
    *("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler"),
    *(
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DPMSolverSDEScheduler",
        "UniPCMultistepScheduler",
    ),
    *("DEISMultistepScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler"),
    "KDPM2AncestralDiscreteScheduler",
}
# What decides a sample beside alpha_bar and the prediction.
_DECIDING = ("clip_sample", "clip_sample_range", "thresholding", "timestep_spacing", "steps_offset", "variance_type")


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] so that it multiplies rows of ``like`` [B, ...], in its dtype and on its device."""
    return values.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.ndim - 1))


class DiffusionProcess:
    r"""Discrete variance-preserving noising over a diffusers scheduler configuration.

    .. math:: x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\,\epsilon

    Args:
        schedule: How the noise grows: ``linear`` (DDPM), ``scaled_linear`` (latent diffusion) or ``cosine``.
        num_timesteps: Training timesteps T; t runs from 0 (least noise) to T - 1.
        prediction: What the network outputs: the noise ``eps``, the velocity ``v``, or the clean image ``x0``.
        beta_start: First beta of the linear schedules.
        beta_end: Last beta of the linear schedules.
        clip_sample: Samplers clip their estimate of x0 to [-1, 1]; right for pixels, wrong for latents.
        zero_terminal_snr: Rescale the betas so that the last timestep is pure noise; needs ``v`` or ``x0``.

    Raises:
        ValueError: If a number is out of range, or ``eps`` is asked for at zero terminal signal.

    Source:
        Ho et al., arXiv:2006.11239, eq. 4; cosine: Nichol and Dhariwal, arXiv:2102.09672, eq. 17;
        v: Salimans and Ho, arXiv:2202.00512, appendix D.
    """

    def __init__(
        self,
        schedule: Schedule = "cosine",
        num_timesteps: int = 1000,
        prediction: Prediction = "eps",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        clip_sample: bool = True,
        zero_terminal_snr: bool = False,
    ) -> None:
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        for name, value, legal in (("schedule", schedule, _SCHEDULES), ("prediction", prediction, _PREDICTION_TYPES)):
            if value not in legal:
                raise ValueError(f"{name} must be one of {sorted(legal)}, got {value!r}")
        self._setup(
            {
                "_class_name": "DDPMScheduler",
                "num_train_timesteps": num_timesteps,
                "beta_schedule": _SCHEDULES[schedule],
                "beta_start": beta_start,
                "beta_end": beta_end,
                "prediction_type": _PREDICTION_TYPES[prediction],
                "clip_sample": clip_sample,
                "rescale_betas_zero_snr": zero_terminal_snr,
            }
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DiffusionProcess":
        """The process of a diffusers scheduler configuration.

        Args:
            config: As in ``scheduler_config.json``.

        Raises:
            ValueError: If it is flow matching or continuous time (named), or its keys are missing.
        """
        name = str(config.get("_class_name", "DDPMScheduler"))
        flow = "Flow" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        continuous = "EDM" in name or config.get("sigma_data") or config.get("timestep_type") == "continuous"
        if flow or continuous or name not in _READABLE or config.get("snr_shift_scale"):
            kind = "flow matching" if flow else "continuous time" if continuous else "not a plain product of betas"
            raise ValueError(
                f"{name} is {kind}, which is not built yet; legal are discrete variance-preserving schedules "
                "(configurations of DDPM, DDIM, DPM-Solver, Euler, Heun and their kin)"
            )
        missing = [key for key in _NEEDED if key not in config]
        if missing:
            raise ValueError(f"the scheduler configuration lacks {missing}; it has {sorted(config)}")
        process = cls.__new__(cls)
        process._setup(dict(config))
        return process

    def _setup(self, config: dict[str, Any]) -> None:
        self.config = {k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"}
        scheduler = DDPMScheduler.from_config(self.config)
        self.num_timesteps: int = scheduler.config.num_train_timesteps
        if scheduler.config.prediction_type not in _PREDICTIONS:
            raise ValueError(
                f"prediction_type must be one of {sorted(_PREDICTIONS)}, got {scheduler.config.prediction_type!r}"
            )
        self.prediction: Prediction = _PREDICTIONS[scheduler.config.prediction_type]
        self.alpha_bar: Tensor = scheduler.alphas_cumprod.double()
        self._deciding = {key: scheduler.config.get(key) for key in _DECIDING}
        self._zero_signal = torch.nonzero(self.alpha_bar == 0).flatten()
        if self.prediction == "eps" and len(self._zero_signal):
            raise ValueError(
                f"alpha_bar is 0 at t = {self._zero_signal.tolist()}: eps does not determine x0 there. "
                "Use prediction v or x0 with zero_terminal_snr."
            )
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def digest(self) -> str:
        """Digest of the schedule, the prediction, and what else decides a sample."""
        return digest(self.alpha_bar, self.prediction, self._deciding)

    def alpha_bar_at(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha_bar of timesteps t int64 [B], shaped to multiply rows of ``like``."""
        return _per_row(self._table(t.device)[t], like)

    def checked_interval(self, interval: tuple[int, int] | None) -> tuple[int, int]:
        """Training timesteps [low, high); null is all of them.

        Raises:
            ValueError: If not 0 <= low < high <= T.
        """
        low, high = (0, self.num_timesteps) if interval is None else (interval[0], interval[1])
        if not 0 <= low < high <= self.num_timesteps:
            raise ValueError(
                f"interval [low, high) must satisfy 0 <= low < high <= {self.num_timesteps}, got [{low}, {high})"
            )
        return low, high

    def _table(self, device: torch.device) -> Tensor:
        """alpha_bar on a device, copied there once; MPS has no float64."""
        if device not in self._tables:
            table = self.alpha_bar.float() if device.type == "mps" else self.alpha_bar
            self._tables[device] = table.to(device)
        return self._tables[device]

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of t int64 [B], float64 [B]."""
        alpha_bar = self._table(t.device)[t]
        return alpha_bar / (1 - alpha_bar)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, for x0 and eps [B, ...] and t int64 [B]."""
        alpha_bar = self.alpha_bar_at(t, x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps

    def training_target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network is asked for: eps, x0, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        alpha_bar = self.alpha_bar_at(t, x0)
        return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction | None = None) -> Tensor:
        """Clean image that a network output means at x_t and t.

        Args:
            output: [B, ...].
            x_t: [B, ...].
            t: int64 [B].
            prediction: What ``output`` is; null for the process's own.
        """
        prediction = prediction or self.prediction
        if prediction == "x0":
            return output
        alpha_bar = self.alpha_bar_at(t, x_t)
        if prediction == "v":
            return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * output
        self._refuse_zero_signal(t, "eps does not determine x0")
        return (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()

    def to_eps(self, output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction | None = None) -> Tensor:
        """Noise that a network output means at x_t and t; arguments as in :meth:`to_x0`."""
        prediction = prediction or self.prediction
        if prediction == "eps":
            return output
        alpha_bar = self.alpha_bar_at(t, x_t)
        if prediction == "v":
            return (1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * output
        return (x_t - alpha_bar.sqrt() * output) / (1 - alpha_bar).sqrt()

    def to_score(self, output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction | None = None) -> Tensor:
        """grad log p_t(x_t) = -eps / sqrt(1 - alpha_bar); arguments as in :meth:`to_x0`."""
        eps = self.to_eps(output, x_t, t, prediction)
        return -eps / (1 - self.alpha_bar_at(t, x_t)).sqrt()

    def from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The output in the process's own prediction that means x0 at x_t and t."""
        if self.prediction == "x0":
            return x0
        eps = self.to_eps(x0, x_t, t, "x0")
        return eps if self.prediction == "eps" else self.training_target(x0, eps, t)

    def add_score(
        self, output: Tensor, score: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction | None = None
    ) -> Tensor:
        r"""Add a score term to a network output, in the output's own parameterisation.

        .. math:: \epsilon - \sqrt{1-\bar\alpha}\,s, \qquad x_0 + \frac{1-\bar\alpha}{\sqrt{\bar\alpha}}\,s,
            \qquad v - \frac{\sqrt{1-\bar\alpha}}{\sqrt{\bar\alpha}}\,s

        Args:
            output: [B, ...].
            score: What is added to grad log p_t(x_t), [B, ...].
            x_t: [B, ...].
            t: int64 [B].
            prediction: What ``output`` is; null for the process's own.

        Raises:
            ValueError: If alpha_bar is 0 at a t and the output is v or x0 (the term is infinite there).
        """
        prediction = prediction or self.prediction
        alpha_bar = self.alpha_bar_at(t, x_t)
        if prediction == "eps":
            return output - (1 - alpha_bar).sqrt() * score
        self._refuse_zero_signal(t, "a score term is infinite in v and x0")
        if prediction == "x0":
            return output + (1 - alpha_bar) / alpha_bar.sqrt() * score
        return output - ((1 - alpha_bar) / alpha_bar).sqrt() * score

    def clip_x0(self, output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction | None = None) -> Tensor:
        r"""The output that means the x0 which samplers clip to, and the eps that belongs to it.

        .. math:: x_0' = \mathrm{clip}(x_0), \qquad \epsilon' = (x_t - \sqrt{\bar\alpha}\,x_0')/\sqrt{1-\bar\alpha}

        diffusers' DDIM clips x0 but keeps the eps of the output. Where guidance takes x0 far outside, that eps then
        drives x_t the other way. Entries inside the range stay as they are, bit for bit.

        Args:
            output: [B, ...].
            x_t: [B, ...].
            t: int64 [B].
            prediction: What ``output`` is; null for the process's own.

        Source:
            Dhariwal and Nichol, arXiv:2105.05233 (their sampler derives eps from the clipped x0).
        """
        prediction = prediction or self.prediction
        if not self._deciding["clip_sample"] or self._deciding["thresholding"]:
            return output
        x0 = self.to_x0(output, x_t, t, prediction)
        limit = self._deciding["clip_sample_range"] or 1.0
        clipped = x0.clamp(-limit, limit)
        meant = clipped
        if prediction != "x0":
            meant = self.to_eps(clipped, x_t, t, "x0")
        if prediction == "v":
            alpha_bar = self.alpha_bar_at(t, x_t)
            meant = alpha_bar.sqrt() * meant - (1 - alpha_bar).sqrt() * clipped
        return torch.where(x0 == clipped, output, meant)

    def _refuse_zero_signal(self, t: Tensor, why: str) -> None:
        if len(self._zero_signal) and torch.isin(t.cpu(), self._zero_signal).any():
            raise ValueError(f"alpha_bar is 0 at t = {self._zero_signal.tolist()}: {why}")

    def scheduler(self, sampler: Sampler, num_steps: int, prediction: Prediction | None = None) -> SchedulerMixin:
        """A diffusers scheduler for this process, its timesteps set.

        Args:
            sampler: ``ddim``, ``ddpm``, ``dpm++`` (DPM-Solver++ multistep), ``heun`` or ``euler``.
            num_steps: Sampler steps in [1, T].
            prediction: What the denoiser outputs; null for the process's own.

        Raises:
            ValueError: If the sampler is unknown or does not know this schedule, num_steps is out of range, or the
                sampler would visit a timestep twice, or one that is no integer in [0, T).
        """
        if sampler not in _SAMPLERS:
            raise ValueError(f"sampler must be one of {sorted(_SAMPLERS)}, got {sampler!r}")
        if sampler == "heun" and len(self._zero_signal):
            raise ValueError("diffusers' Heun does not know zero terminal SNR; use ddim, ddpm or euler")
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"num_steps must lie in [1, {self.num_timesteps}], got {num_steps}")
        prediction_type = _PREDICTION_TYPES[prediction or self.prediction]
        scheduler = _SAMPLERS[sampler].from_config(
            self.config, prediction_type=prediction_type, **_INTEGER_SPACING.get(sampler, {})
        )
        scheduler.set_timesteps(num_steps)
        steps = scheduler.timesteps
        whole = torch.equal(steps, steps.round()) and int(steps.min()) >= 0 and int(steps.max()) < self.num_timesteps
        if not whole or len(steps.unique()) != num_steps:
            raise ValueError(
                f"{sampler} with num_steps {num_steps} would not visit {num_steps} different timesteps in "
                f"[0, {self.num_timesteps}); choose fewer steps, a divisor of {self.num_timesteps}, or a "
                "configuration without use_karras_sigmas"
            )
        return scheduler
