"""Samples from a model whose vocabulary two processes share; started by torchrun from test_parallel.py.

The first process prints, for each sampler, the tokens of one process without randomness, those of each of the two
processes, and the tokens that each of the two processes draws.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sedd.diffusion import Diffusion, get_schedule, sample
from sedd.diffusion.objectives import get_objective
from sedd.diffusion.orders import ConfidenceSampler
from sedd.diffusion.reverse_steps import AncestralSampler
from sedd.network import DiffusionTransformer, ModelConfig
from sedd.training.vocabulary import split_vocabulary
from sedd_ext import Absorbing

SAMPLERS = [ConfidenceSampler(4), AncestralSampler(4)]


def samples(diffusion: Diffusion, temperature: float) -> list[torch.Tensor]:
    # of a text of MASK alone, all positions are alike, and rounding would choose among them
    given = torch.arange(10, 18), torch.arange(8) % 3 == 0
    options = {"batch": 3, "length": 8, "temperature": temperature, "fixed": given}
    return [
        sample(diffusion, sampler=sampler, generator=torch.Generator().manual_seed(0), **options)
        for sampler in SAMPLERS
    ]


def of_all(tokens: torch.Tensor) -> list[list[list[int]]]:
    """The tokens of each process."""
    gathered = [torch.empty_like(tokens) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tokens)
    return [one.tolist() for one in gathered]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    network = DiffusionTransformer(ModelConfig(16, 1, 2, 8, 8, 0.0), 41)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.3)
    diffusion = Diffusion(network, Absorbing(40), get_schedule("loglinear"), get_objective("md4")).eval()
    alone = samples(diffusion, 0.0)
    split_vocabulary(network, init_device_mesh("cpu", (2,)))
    for one, greedy, drawn in zip(alone, samples(diffusion, 0.0), samples(diffusion, 1.0), strict=True):
        line = json.dumps([one.tolist(), of_all(greedy), of_all(drawn)])
        if dist.get_rank() == 0:
            print(line)
    dist.destroy_process_group()
