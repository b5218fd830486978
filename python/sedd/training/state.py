"""What training changes: model, moving average, optimiser, random numbers, position in the data and step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sedd.adapted import visible_pairs
from sedd.config import TrainConfig
from sedd.data.batches import Batches
from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.objectives import sample_times
from sedd.network import compile_network
from sedd.runtime import autocast_dtype
from sedd.training.checkpoint import stored_at
from sedd.training.learning_rate import learning_rate_factor
from sedd.training.parallel import World, by_mesh, clear_gradients, clip_gradients, divided, local
from sedd.training.weights import load_weights, stored_name

__all__ = ["Pace", "TrainState"]

ANNEALING = 2**32 - 1
"""Distinguishes the random numbers of attention from those of the sequences, which are numbered from 0."""


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

    With several processes, all of them call the same methods at the same time.

    Attributes:
        diffusion: the model that is trained.
        ema: the moving average of its parameters, in evaluation mode.
        optimizer: AdamW.
        model: the module whose call computes the training loss: ``diffusion``, or a wrapper that averages gradients.
        generator: random numbers of times and noise; they depend on the seed, the step, and the place of a sequence in
            the batch of the step, and on nothing before.
        batches: the training data, and the position in it.
        step: optimiser steps taken.
        elapsed: seconds of training, those before a resumption included.
        valid: the validation bound at this step, None if it was not computed.
        pace: see :class:`Pace`.

    Args:
        config: options of the run.
        diffusion: a new model on its device, the same in all processes.
        batches: training batches of ``config.batch_size`` sequences for each process.
        world: the processes.
    """

    def __init__(self, config: TrainConfig, diffusion: Diffusion, batches: Batches, world: World) -> None:
        self.config = config
        self.diffusion = diffusion
        self.world = world
        self.device = diffusion.device
        self.autocast_dtype = autocast_dtype(config.precision, self.device)
        self.generator = torch.Generator(self.device)
        self.ema = copy.deepcopy(diffusion).eval().requires_grad_(False)
        network: Any = diffusion.network
        network.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            compile_network(network)
        for module in (diffusion, self.ema):
            world.shard(module, self.autocast_dtype)
        self.model = world.wrap(diffusion)
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in by_mesh(diffusion.parameters())],
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
            Loss of this process in nats per token, and norm of the gradient before clipping: [2], float32, on the
            device. The mean of the loss over the processes is the loss of the step.
        """
        config = self.config
        self.diffusion.train()
        if config.init_anneal:
            self._anneal()
        total = self._backward()
        norm = clip_gradients(self.diffusion.parameters(), config.clip)
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        clear_gradients(self.model)
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(local(self.ema.parameters()), local(self.diffusion.parameters()), None)
        self.valid = None
        return torch.stack((total, norm))

    @property
    def sequences_per_step(self) -> int:
        """Sequences that all processes together take in an optimiser step."""
        return self.config.batch_size * self.config.accumulate * self.world.data_size

    def _anneal(self) -> None:
        """Sets what attention sees in this step, the same for all sequences and in all processes."""
        network: Any = self.diffusion.network
        network.visible = None
        if self.step < self.config.init_anneal:
            numbers = np.random.SeedSequence([self.config.seed, self.step, ANNEALING]).generate_state(1, np.uint64)
            generator = torch.Generator(self.device).manual_seed(int(numbers[0] >> np.uint64(1)))
            length = network.config.length + network.config.shift
            network.visible = visible_pairs(length, self.step / self.config.init_anneal, generator)

    def _backward(self) -> Tensor:
        """Accumulates the gradients of one step; returns its loss."""
        config, world, size = self.config, self.world, self.config.batch_size
        count = self.sequences_per_step
        total = torch.zeros((), device=self.device)
        for part in range(config.accumulate):
            first = (part * world.data_size + world.data_rank) * size  # place in the batch of the step
            batch = next(self.batches)
            tokens, labels = batch if isinstance(batch, tuple) else (batch, None)
            tokens = self._mine(tokens)
            self._seed(first)
            times = sample_times(
                count,
                self.diffusion.objective.earliest_time,
                antithetic=config.antithetic,
                generator=self.generator,
                device=self.device,
            )
            if labels is not None:
                labels = self._with_dropout(self._mine(labels), count, first)
            autocast = torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)
            with world.synchronize(self.model, last=part == config.accumulate - 1):
                with autocast:
                    losses = self.model(
                        tokens,
                        times[first : first + size],
                        # gradients are averaged over the processes
                        scale=world.data_size / (count * tokens[0].numel()),
                        fused=config.fused_head,
                        capacity=config.head_capacity,
                        generator=self.generator,
                        first=first,
                        count=count,
                        labels=labels,
                    )
                    loss = losses.sum()
                loss.backward()
            total += loss.detach()
        return total

    def _mine(self, batch: Tensor) -> Tensor:
        """The part of this process of a batch of all processes, on the device."""
        size = self.config.batch_size
        batch = batch[self.world.data_rank * size :][:size]
        if self.device.type != "cpu":
            batch = batch.pin_memory()  # the copy of pinned memory waits for nothing
        return batch.to(self.device, non_blocking=True)

    def _with_dropout(self, labels: Tensor, count: int, first: int) -> Tensor:
        """The labels, some of them replaced by that of no class.

        Args:
            labels: classes [B] of the sequences from the place ``first`` on in the batch of the step.
            count: the number of sequences in that batch.
            first: see above.
        """
        network: Any = self.diffusion.network
        drawn = torch.rand(count, generator=self.generator, dtype=torch.float64, device=self.device)
        is_dropped = drawn[first : first + len(labels)] < self.config.label_dropout
        return labels.masked_fill(is_dropped, network.config.classes)

    def _seed(self, first: int) -> None:
        """Seeds times and noise by the step, and dropout by the step and the place of the sequences in its batch."""
        numbers = np.random.SeedSequence([self.config.seed, self.step, first]).generate_state(1, np.uint64)
        torch.manual_seed(int(numbers[0] >> np.uint64(1)))
        numbers = np.random.SeedSequence([self.config.seed, self.step]).generate_state(1, np.uint64)
        self.generator.manual_seed(int(numbers[0] >> np.uint64(1)))

    def state_dict(self) -> dict[str, Any]:
        """The content of a checkpoint: dictionaries of tensors, and plain values.

        ``model``, ``ema`` and ``optimizer`` are dictionaries of tensors by name. They are those of this run, not
        copies: the next step changes them. With FSDP they are divided. The rest is JSON-ready.
        """
        return {
            "model": _by_name(self.diffusion),
            "ema": _by_name(self.ema),
            "optimizer": {
                f"{stored_name(name)}/{key}": value
                for name, parameter in self.diffusion.named_parameters()
                for key, value in self.optimizer.state[parameter].items()
            },
            "step": self.step,
            "sequences_per_step": self.sequences_per_step,
            "valid": self.valid,
            "elapsed": self.elapsed,
            "seconds_per_step": self.pace.seconds_per_step,
            "device": self.device.type,
            "data": self.batches.state_dict(),
        }

    def like(self, name: str) -> dict[str, Tensor]:
        """Tensors that are divided as those of ``model``, ``ema`` or ``optimizer`` must be, by the names there."""
        tensors = _by_name(self.ema if name == "ema" else self.diffusion)
        if name != "optimizer":
            return tensors
        return {f"{key}/{moment}": value for key, value in tensors.items() for moment in ("exp_avg", "exp_avg_sq")}

    def load_state_dict(self, state: dict[str, Any], path: Path) -> bool:
        """Continues from :meth:`state_dict`.

        Args:
            state: what :meth:`state_dict` returned. Its tensors may be whole, or divided as :meth:`like`.
            path: the checkpoint folder, for error messages.

        Returns:
            False if the state is of another kind of device: generators of different devices have nothing in common, so
            training continues with other random numbers.

        Raises:
            ValueError: tensors or data are not those of this run, or a step would take another number of sequences.
        """
        saved = state["sequences_per_step"]
        if saved != self.sequences_per_step:
            raise ValueError(
                f"batch_size: expected {saved} sequences per optimiser step as before, got {self.sequences_per_step}: "
                f"batch_size {self.config.batch_size} * accumulate {self.config.accumulate} * {self.world.data_size} "
                "processes; set --batch_size or --accumulate"
            )
        for module, name in ((self.diffusion, "model"), (self.ema, "ema")):
            like = self.like(name)
            tensors = {key: divided(value, like[key]) if key in like else value for key, value in state[name].items()}
            load_weights(module, tensors, stored_at(path, name))
        parameters = {stored_name(name): value for name, value in self.diffusion.named_parameters()}
        ordered = [id(value) for group in self.optimizer.param_groups for value in group["params"]]
        indices = {name: ordered.index(id(value)) for name, value in parameters.items()}
        by_index: dict[int, dict[str, Tensor]] = {}
        for key, value in state["optimizer"].items():
            name, _, moment = key.rpartition("/")
            value = divided(value, parameters[name]) if value.dim() else value
            by_index.setdefault(indices[name], {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})
        try:
            self.batches.load_state_dict(state["data"])
        except ValueError as error:
            raise ValueError(f"{path / 'state.json'}: data: {error}") from error
        self.step, self.elapsed, self.valid = state["step"], state["elapsed"], state["valid"]
        self.pace = Pace(self.step, self.elapsed, state.get("seconds_per_step", 0.0))
        same_device: bool = state["device"] == self.device.type
        return same_device


def _by_name(module: torch.nn.Module) -> dict[str, Tensor]:
    return {stored_name(name): value for name, value in module.state_dict().items()}
