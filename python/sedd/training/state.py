"""What training changes: model, moving average, optimiser, random numbers, position in the data and step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sedd.config import TrainConfig
from sedd.data.batches import Batches
from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.objectives import sample_times
from sedd.network import compile_network
from sedd.runtime import autocast_dtype
from sedd.training.checkpoint import load_weights, stored_name
from sedd.training.learning_rate import learning_rate_factor

__all__ = ["Pace", "TrainState"]


@dataclass(frozen=True)
class Pace:
    """How long steps take, measured at the last checkpoint.

    Attributes:
        step: the step of the last checkpoint.
        elapsed: seconds of training up to it.
        seconds_per_step: seconds per step since the checkpoint before; 0 before the first one.
    """

    step: int = 0
    elapsed: float = 0.0
    seconds_per_step: float = 0.0

    def elapsed_at(self, step: int) -> float:
        """Predicted seconds of training up to a step."""
        return self.elapsed + (step - self.step) * self.seconds_per_step

    def measured(self, step: int, elapsed: float) -> Pace:
        """The pace at a later step."""
        return Pace(step, elapsed, (elapsed - self.elapsed) / (step - self.step))


class TrainState:
    """A training run in memory: takes steps, and turns into a dictionary of tensors and plain values and back.

    Attributes:
        diffusion: the model that is trained.
        ema: the moving average of its parameters, in evaluation mode.
        optimizer: AdamW.
        generator: random numbers of times and noise.
        batches: the training data, and the position in it.
        step: optimiser steps taken.
        elapsed: seconds of training, those before a resumption included.
        valid: the validation bound at this step, None if it was not computed.
        pace: see :class:`Pace`.

    Args:
        config: options of the run.
        diffusion: a new model on its device.
        batches: training batches.
    """

    def __init__(self, config: TrainConfig, diffusion: Diffusion, batches: Batches) -> None:
        self.config = config
        self.diffusion = diffusion
        self.device = diffusion.device
        self.autocast_dtype = autocast_dtype(config.precision, self.device)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.ema = copy.deepcopy(diffusion).eval().requires_grad_(False)
        if config.compile:
            compile_network(diffusion.network)
        self.optimizer = torch.optim.AdamW(
            diffusion.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.batches = batches
        self.step = 0
        self.elapsed = 0.0
        self.valid: float | None = None
        self.pace = Pace()

    @property
    def lr(self) -> float:
        """Learning rate of step ``self.step`` (counted from 1).

        It depends on the step and on what the last checkpoint holds, so that a resumed run has the same: in a run that
        ends by time, the time of a step is predicted from the pace before the last checkpoint.
        """
        config, before = self.config, self.step - 1
        done = before / config.steps
        if config.max_minutes is not None:
            done = max(done, self.pace.elapsed_at(before) / (60 * config.max_minutes))
        factor = learning_rate_factor(config.lr_schedule, min(1.0, done), final=config.lr_final, decay=config.lr_decay)
        return config.lr * min(1.0, self.step / max(config.warmup, 1)) * factor

    def train_step(self) -> Tensor:
        """Takes one optimiser step on ``accumulate`` batches.

        Returns:
            Loss in nats per token, and norm of the gradient before clipping: [2], float32, on the device.
        """
        config = self.config
        self.diffusion.train()
        total = self._backward()
        norm = torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), config.clip)
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(list(self.ema.parameters()), list(self.diffusion.parameters()), None)
        self.valid = None
        return torch.stack((total, norm.detach()))

    def _backward(self) -> Tensor:
        """Accumulates the gradients of one step; returns its loss."""
        config = self.config
        count = config.batch_size * config.accumulate
        times = sample_times(
            count, self.diffusion.objective.earliest_time, antithetic=config.antithetic, generator=self.generator
        )
        total = torch.zeros((), device=self.device)
        for part in range(config.accumulate):
            tokens = next(self.batches).to(self.device)
            part_times = times[part :: config.accumulate]  # every part sees times from all over (0, 1]
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                losses = self.diffusion(
                    tokens,
                    part_times,
                    scale=1 / (count * tokens[0].numel()),
                    fused=config.fused_head,
                    generator=self.generator,
                )
            loss = losses.sum()
            loss.backward()
            total += loss.detach()
        return total

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint: dictionaries of tensors, and plain values.

        ``model``, ``ema``, ``optimizer`` and ``rng`` are dictionaries of tensors by name. The rest is JSON-ready.
        """
        rng = {"cpu": torch.get_rng_state(), "generator": self.generator.get_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        moments = {
            f"{stored_name(name)}/{key}": value
            for name, parameter in self.diffusion.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {
            "model": {stored_name(name): value for name, value in self.diffusion.state_dict().items()},
            "ema": {stored_name(name): value for name, value in self.ema.state_dict().items()},
            "optimizer": moments,
            "rng": rng,
            "step": self.step,
            "valid": self.valid,
            "elapsed": self.elapsed,
            "seconds_per_step": self.pace.seconds_per_step,
            "device": self.device.type,
            "data": self.batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], path: Path) -> bool:
        """Continues from :meth:`state_dict`.

        Args:
            state: what :meth:`state_dict` returned.
            path: the checkpoint folder, for error messages.

        Returns:
            False if the state is of another kind of device: generators of different devices have nothing in common, so
            training continues with other random numbers.

        Raises:
            ValueError: tensors or data are not those of this run.
        """
        for module, name in ((self.diffusion, "model"), (self.ema, "ema")):
            load_weights(module, state[name], path / f"{name}.safetensors")
        indices = {stored_name(name): i for i, (name, _) in enumerate(self.diffusion.named_parameters())}
        by_index: dict[int, dict[str, Tensor]] = {}
        for key, value in state["optimizer"].items():
            name, _, moment = key.rpartition("/")
            by_index.setdefault(indices[name], {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})
        rng = state["rng"]
        torch.set_rng_state(rng["cpu"])
        same_device: bool = state["device"] == self.device.type
        if same_device:
            self.generator.set_state(rng["generator"])
            if "cuda" in rng:
                torch.cuda.set_rng_state(rng["cuda"], self.device)
        else:
            self.generator.manual_seed(self.config.seed + state["step"])
        try:
            self.batches.load_state_dict(state["data"])
        except ValueError as error:
            raise ValueError(f"{path / 'state.json'}: data: {error}") from error
        self.step, self.elapsed, self.valid = state["step"], state["elapsed"], state["valid"]
        self.pace = Pace(self.step, self.elapsed, state.get("seconds_per_step", 0.0))
        return same_device
