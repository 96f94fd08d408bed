"""Text conditioning: the call by which a text-to-image UNet becomes a Denoiser, and what embeds prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mem.diffusion.target import Condition
from lightning_mem.types import Prediction

STATES = "encoder_hidden_states"
"""Name of prompt embeddings [B, tokens, channels] in a condition."""


class PromptEncoder:
    """Embeddings of prompts, as Stable Diffusion makes them: the last hidden states of CLIP's text model.

    A prompt is cut or padded to the tokenizer's length, and each is embedded by itself, so that no company changes it.

    Args:
        tokenizer: Of transformers.
        text_encoder: Of transformers; is frozen.
    """

    def __init__(self, tokenizer: Any, text_encoder: nn.Module) -> None:
        self.tokenizer = tokenizer
        self.text_encoder: Any = text_encoder.float().eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of these prompts: ``encoder_hidden_states`` float32 [N, tokens, channels]."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list, one a sample, got the text {prompts!r}")
        length, device = self.tokenizer.model_max_length, self.text_encoder.device
        found = []
        for prompt in prompts:
            tokens = self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True)
            found.append(self.text_encoder(torch.tensor([tokens.input_ids], device=device))[0])
        return {STATES: torch.cat(found)}


class TextDenoiser:
    r"""A diffusers UNet2DConditionModel as a :class:`~lightning_mem.diffusion.Denoiser`, guided by its own condition.

    .. math:: \epsilon(x_t, \varnothing) + w\,(\epsilon(x_t, c) - \epsilon(x_t, \varnothing))

    Args:
        module: The UNet.
        prediction: What it outputs.
        empty: Condition of the empty prompt, one row a tensor; null where it is not known. It is what a call without a
            condition means.
        cfg_weight: w; 1 is the conditional output itself, at half the cost.

    Raises:
        ValueError: If cfg_weight is not 1 and the empty prompt is not known. When called: if there is no condition.

    Source:
        Ho and Salimans, arXiv:2207.12598, eq. 6, with w counted as diffusers' ``guidance_scale`` is.
    """

    def __init__(
        self,
        module: nn.Module,
        prediction: Prediction,
        empty: Mapping[str, Tensor] | None = None,
        cfg_weight: float = 1.0,
    ) -> None:
        if cfg_weight != 1 and empty is None:
            raise ValueError(
                f"cfg_weight {cfg_weight} needs the embedding of the empty prompt, but the model has no text encoder"
            )
        self.module, self.prediction = module, prediction
        self.empty, self.cfg_weight = empty, cfg_weight

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """The network's own output at training timestep t, conditional and unconditional combined."""
        if isinstance(condition, Tensor):
            raise ValueError("a text-to-image model takes prompt embeddings, not labels: target.conditioner makes them")
        if condition is None and self.empty is None:
            raise ValueError(f"the model has no text encoder: pass condition={{{STATES!r}: [B, tokens, channels]}}")
        if condition is None or self.cfg_weight == 1:
            return self.module(x_t, t, **(self._none(len(x_t), x_t.device) if condition is None else condition)).sample
        none = self._none(len(x_t), x_t.device)
        both = {name: torch.cat([none[name], value]) for name, value in condition.items()}
        without, given = self.module(x_t.repeat(2, 1, 1, 1), t.repeat(2), **both).sample.chunk(2)
        return without + self.cfg_weight * (given - without)

    def _none(self, count: int, device: torch.device) -> dict[str, Tensor]:
        empty = self.empty or {}
        return {name: value.to(device).expand(count, *value.shape[1:]) for name, value in empty.items()}
