"""One step of a training: noise, prediction, loss, gradients, and what the optimizer makes of them.

The objective is that of diffusers' train_text_to_image_lora_sdxl.py.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler

from imagend.errors import UnsupportedSetting
from imagend.train_spec import Train
from imagend.worker.batches import Batches, generator
from imagend.worker.checkpoint import Checkpoint
from imagend.worker.train_cache import Cache, encode
from imagend.worker.trainee import Trainee

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Steps:
    """Those of one training. Each depends on the weights, the optimizer's state and its number, and on nothing else."""

    def __init__(self, pipe: Any, spec: Train, trainee: Trainee, cache: Cache, batches: Batches, device: Any) -> None:
        self._pipe, self._spec, self._trainee, self._cache, self._batches = pipe, spec, trainee, cache, batches
        self._device = torch.device(device)
        self.precision = precision(spec, self._device)
        self._accelerator = _accelerator(self.precision, self._device)
        self._scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self._scheduler.alphas_cumprod = self._scheduler.alphas_cumprod.to(self._device)
        weights = [*trainee.weights.values()]
        optimizer = torch.optim.AdamW(weights, lr=spec.learning_rate, weight_decay=spec.adam_weight_decay)
        self._optimizer = self._accelerator.prepare(optimizer)

    def autocast(self) -> Any:
        return self._accelerator.autocast()

    def __call__(self, number: int) -> float:
        """Do the step; its loss. What fails changes nothing."""
        spec = self._spec
        self._optimizer.zero_grad()
        for group in self._optimizer.param_groups:
            group["lr"] = spec.learning_rate_at(number)
        count = spec.gradient_accumulation_steps
        loss = 0.0
        for part in range(count):
            found = self._loss(number, part) / count
            self._accelerator.backward(found)
            loss += float(found.detach())
        self._accelerator.clip_grad_norm_(self._trainee.weights.values(), spec.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def _loss(self, number: int, part: int) -> torch.Tensor:
        spec, cache, scheduler = self._spec, self._cache, self._scheduler
        assert spec.seed is not None
        drawn = generator(spec.seed, "step", number, part)
        indices = self._batches.at(number * spec.gradient_accumulation_steps + part)
        latents = self._scaled(cache.latents(indices, drawn)).to(self._device)
        noise = torch.randn(latents.shape, generator=drawn)
        noise += spec.noise_offset * torch.randn((*latents.shape[:2], 1, 1), generator=drawn)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (len(indices),), generator=drawn)
        dropped = (torch.rand(len(indices), generator=drawn) < spec.proportion_empty_prompts).tolist()
        captions = ["" if drop else cache.captions[index] for index, drop in zip(indices, dropped, strict=True)]
        noise, times = noise.to(self._device), times.to(self._device)
        with self.autocast():
            unet = self._pipe.unet
            embeds, pooled = self._encoded(captions)
            sizes = torch.tensor([cache.time_ids[index] for index in indices], device=self._device)
            conditions = {"text_embeds": pooled, "time_ids": sizes}
            noisy = scheduler.add_noise(latents, noise, times).to(unet.dtype)
            found = unet(noisy, times, embeds, added_cond_kwargs=conditions, return_dict=False)[0]
        is_v = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, times) if is_v else noise
        losses = torch.nn.functional.mse_loss(found.float(), target.float(), reduction="none").mean((1, 2, 3))
        return (losses * self._weights(times, is_v)).mean()

    def _encoded(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if self._spec.train_text_encoder:
            return encode(self._pipe, captions)
        pairs = [self._cache.texts[caption] for caption in captions]
        embeds, pooled = (torch.stack(part).to(self._device) for part in zip(*pairs, strict=True))
        return embeds, pooled

    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._pipe.vae.config
        mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        if mean is None or std is None:
            return latents * config.scaling_factor
        mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in (mean, std))
        return (latents - mean) * config.scaling_factor / std

    def _weights(self, times: torch.Tensor, is_v: bool) -> torch.Tensor:
        """Min-SNR (https://arxiv.org/abs/2303.09556); 1 without snr_gamma."""
        if (gamma := self._spec.snr_gamma) is None:
            return torch.ones(times.shape, device=times.device)
        alphas = self._scheduler.alphas_cumprod[times].float()
        snr = alphas / (1.0 - alphas)
        return snr.clamp(max=gamma) / (snr + 1.0 if is_v else snr.clamp(min=1e-8))

    def note(self, step: int, losses: list[float], seconds: float) -> Checkpoint:
        """All that the next step depends on."""
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in self._trainee.weights.items():
            tensors[f"adapter.{name}"] = weight
            tensors |= {f"{key}.{name}": value for key, value in self._optimizer.state.get(weight, {}).items()}
        scaler = self._accelerator.scaler
        return Checkpoint(step, tensors, losses, scaler.state_dict() if scaler else {}, seconds)

    def go_on(self, checkpoint: Checkpoint) -> None:
        """From where it was noted. Raises KeyError, RuntimeError where that is not of these weights."""
        for name, weight in self._trainee.weights.items():
            weight.data.copy_(checkpoint.tensors[f"adapter.{name}"])
            for key in _MOMENTS if checkpoint.step else ():
                value = checkpoint.tensors[f"{key}.{name}"]
                self._optimizer.state[weight][key] = value if key == "step" else value.to(self._device)
        if self._accelerator.scaler and checkpoint.scaler:
            self._accelerator.scaler.load_state_dict(checkpoint.scaler)


def precision(spec: Train, device: torch.device) -> str:
    """Raises UnsupportedSetting."""
    on_gpu = device.type == "cuda"
    best = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if on_gpu else "no"
    asked = spec.mixed_precision or best
    if on_gpu and asked == "no":
        raise UnsupportedSetting("mixed_precision: on a GPU the base is kept in half precision; ask for bf16 or fp16")
    if not on_gpu and asked == "fp16":
        raise UnsupportedSetting("mixed_precision: fp16 needs a GPU; ask for bf16 or no")
    return asked


def _accelerator(mixed_precision: str, device: torch.device) -> Accelerator:
    """One for each training: accelerate keeps one precision for all of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu", device_placement=False)
