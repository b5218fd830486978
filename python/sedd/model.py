"""The score network: a diffusion transformer (DDiT) with adaLN-zero conditioning on the total noise σ̄.

Parameter names and shapes are those of the released SEDD models, so that their weights load as they are. Attention is
torch's own ``scaled_dot_product_attention``. The network is written for mixed precision by autocast: matrix products
run in the autocast dtype; the residual stream, layer norms and the conditioning stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sedd.hints import pip_install
from sedd.schedule import LogLinear, Schedule
from sedd.tokenizer import Tokenizer
from sedd_ext import RankOne

if TYPE_CHECKING:
    from huggingface_hub import PyTorchModelHubMixin
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ImportError:  # the network by itself needs torch alone

        class PyTorchModelHubMixin:
            """Stands in for the mixin of a package that is not installed."""

            def __init_subclass__(cls, **kwargs):
                """Takes what the mixin takes."""


__all__ = ["PRESETS", "SEDD", "ModelConfig", "ScoreModel", "compile_network", "device_of"]


@dataclass
class ModelConfig:
    """The size of a :class:`SEDD` network.

    Attributes:
        hidden_size: d, the width of the residual stream.
        n_blocks: number of transformer blocks.
        n_heads: number of attention heads; d / n_heads must be even (rotary positions turn pairs).
        cond_dim: width of the conditioning vector made from σ̄.
        length: number of tokens the network is trained on and samples by default. No parameter depends on it.
        dropout: probability of dropping an output of attention or MLP before it joins the residual stream.
        scale_by_sigma: for absorbing processes, subtract ``log expm1(σ̄) + log(N-1)`` from the head's output, which
            centres the log-scores whatever σ̄ is. It has no effect on other processes.
        hybrid_shift: the same for hybrid processes: see :meth:`SEDD.log_score_shift`. It has no effect on other
            processes. Hybrid models that were saved before this option existed load without it.
        time_conditioning: whether the network is told σ̄. Without, it sees the tokens alone (its conditioning is that of
            σ̄ = 0), and a sampler need not call it again while they stay as they are.

    Raises:
        ValueError: a size is not positive, sizes do not fit together, or dropout is not in [0, 1).
    """

    hidden_size: int = 768
    n_blocks: int = 12
    n_heads: int = 12
    cond_dim: int = 128
    length: int = 1024
    dropout: float = 0.1
    scale_by_sigma: bool = True
    time_conditioning: bool = True
    hybrid_shift: bool = True

    def __post_init__(self) -> None:
        """Checks the sizes."""
        for name in ("hidden_size", "n_blocks", "n_heads", "cond_dim", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive int, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.n_heads):
            raise ValueError(
                f"hidden_size: expected a multiple of 2 * n_heads = {2 * self.n_heads}, got {self.hidden_size}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(hidden_size=128, n_blocks=4, n_heads=2, length=128, dropout=0.0),
    "small": ModelConfig(),
    "medium": ModelConfig(hidden_size=1024, n_blocks=24, n_heads=16),
}
"""Sizes by name: ``tiny`` learns on two CPU cores in minutes, ``small`` and ``medium`` are the paper's."""


class ScoreModel(Protocol):
    """What training, sampling and evaluation ask of a model: :class:`SEDD`, or any module with these methods.

    The log-scores of a state come in three parts, so that the head runs only on the rows that need it and the shift is
    applied inside the kernels: ``log_score = head(hidden(x_t, sigma)) - log_score_shift(sigma, x_t)``.
    """

    training: bool
    time_conditioning: bool
    """Whether :meth:`hidden` depends on sigma."""

    def hidden(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """States before the head, [B, L, d], for tokens x_t [B, L] (int64) and total noise sigma, [B] or [1]."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Log-scores [*, N], not yet shifted, of states [*, d]."""
        ...

    def head_parameters(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight [N, d] and bias [N] or None of a head that is linear, to be fused with loss and sampler; else None."""
        ...

    def log_score_shift(self, sigma: Tensor, x_t: Tensor) -> Tensor | None:
        """What is subtracted from every log-score of a position, or None for nothing.

        Args:
            sigma: total noise, broadcasts to the shape of x_t.
            x_t: the tokens of the positions [*B], int64.

        Returns:
            A tensor that broadcasts to [*B].
        """
        ...

    def train(self, mode: bool = True) -> Any:
        """Switches between training and evaluation behaviour (dropout), as in :class:`torch.nn.Module`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, as in :class:`torch.nn.Module`; there may be none."""
        ...


def device_of(model: ScoreModel) -> torch.device:
    """The device of a model's first parameter; the CPU if it has none."""
    parameter = next(iter(model.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


def compile_network(model: SEDD) -> None:
    """Runs :meth:`SEDD.hidden` of this model through torch.compile from now on, whatever the batch."""
    model.hidden = torch.compile(model.hidden, dynamic=True)  # type: ignore[method-assign]


class _Embedding(nn.Module):
    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocabulary, dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.embedding)


class _SigmaEmbedding(nn.Module):
    """Conditioning vector of the total noise: silu(MLP(cosines and sines of σ̄ at 128 frequencies))."""

    FREQUENCIES = 128
    MAX_PERIOD = 10_000

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        exponents = torch.arange(self.FREQUENCIES, dtype=torch.float32, device=sigma.device) / self.FREQUENCIES
        angles = sigma.float()[:, None] * torch.exp(-math.log(self.MAX_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        dtype = next(self.mlp.parameters()).dtype
        return F.silu(self.mlp(waves.to(dtype)))


class _Rotary(nn.Module):
    """Rotary positions: the angles position / 10000^(2i / d_head), as cosines and sines [L, d_head / 2]."""

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length, device=self.inv_freq.device, dtype=torch.float32), self.inv_freq)
        return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + d/2}) of [..., L, d_head]; float32 for a bfloat16 x."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Attention of every position to every other, [B, head, L, d_head], in v's dtype or float32."""
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    # On the CPU attention is done in float32: torch's bfloat16 backward there takes twice as long as its float32 one.
    dtype = q.dtype if q.device.type == "cpu" else v.dtype
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype))


def _modulation(linear: nn.Linear, condition: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The shifts, scales and gates [B, 1, d] made from the conditioning vector, in float32 under autocast too."""
    with torch.autocast(condition.device.type, enabled=False):
        modulation: Tensor = linear(condition)
    return modulation.unsqueeze(1).chunk(parts, dim=-1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class _Block(nn.Module):
    """Attention, then MLP, each behind a modulated layer norm and gated into the residual stream (adaLN-zero)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.n_heads = config.n_heads
        self.norm1 = nn.LayerNorm(dim, bias=False)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(config.dropout)
        self.adaLN_modulation = _zero(nn.Linear(config.cond_dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(self.adaLN_modulation, condition, 6)
        qkv = self.attn_qkv(_modulate(self.norm1(x), shift1, scale1))
        # [B, L, (three, head, dim)] -> three tensors [B, head, L, dim]
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = self.attn_out(_attend(q, k, v, cos, sin).transpose(1, 2).flatten(-2))
        x = torch.addcmul(x, gate1, self.dropout(attention))
        mlp = self.mlp(_modulate(self.norm2(x), shift2, scale2))
        return torch.addcmul(x, gate2, self.dropout(mlp))


class _OutputLayer(nn.Module):
    """The last modulated layer norm (``forward``), and ``linear``, the head that :meth:`SEDD.head` runs by itself."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.hidden_size, bias=False)
        self.linear = _zero(nn.Linear(config.hidden_size, vocabulary))
        self.adaLN_modulation = _zero(nn.Linear(config.cond_dim, 2 * config.hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = _modulation(self.adaLN_modulation, condition, 2)
        return _modulate(self.norm_final(x), shift, scale)


def _uniform_fraction(process: RankOne) -> float | None:
    """The part λ of a hybrid process's noise that goes to tokens, uniformly; None for other processes."""
    if process.family != "rank_one" or process.mask_id != process.dim - 1:
        return None
    tokens, mask = process.stationary[:-1], float(process.stationary[-1])
    hybrid = mask > 0 and torch.allclose(tokens, tokens.mean().expand_as(tokens), rtol=1e-9, atol=0)
    return 1 - mask if hybrid else None


CARD = """---
{{ card_data }}
---

# A score-entropy diffusion language model

{{ facts }}.

Such a model writes all positions at once, in as many steps as one likes, and fills gaps anywhere in a text
([SEDD, Lou, Meng & Ermon 2024]({{ paper_url }})). With the `sedd` package, from the command line or from Python:

```sh
sedd sample NAME --steps 128        # NAME: this repository, or the folder it was downloaded to
sedd infill NAME 'Once upon a time{{ "{{60}}" }}The end.'
sedd eval perplexity NAME FILE
```

```python
from sedd import load_model
from sedd.sample import sample

loaded = load_model("NAME")
tokens = sample(loaded.model, loaded.process, loaded.schedule, batch=1, length={{ length }}, steps=128)
print(loaded.tokenizer.decode(tokens[0].tolist()))
```
{{ text | default("", true) }}
"""
"""Template of a model card; ``model_card_kwargs={"text": ...}`` of ``save_pretrained`` adds to its end."""


class SEDD(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sedd",
    paper_url="https://arxiv.org/abs/2310.16834",
    pipeline_tag="text-generation",
    tags=["discrete-diffusion", "sedd"],
    model_card_template=CARD,
):
    """Score-entropy discrete diffusion transformer: estimates the ratios p_t(y) / p_t(x_t) of every position.

    Args:
        config: the sizes, or the name of one of :data:`PRESETS`.
        process: the forward process the model belongs to; its ``dim`` is the size of embedding and head.
        schedule: the noise schedule it is trained with: not used by the network, but saved with it.
        tokenizer: the tokeniser of its text, or the name of one that is known by name; saved with it.

    Raises:
        ValueError: no preset of that name.

    Source: SEDD (Lou, Meng & Ermon 2024), section 5 and appendix C.2; adaLN-zero from DiT (Peebles & Xie 2023).
    """

    def __init__(
        self,
        config: ModelConfig | str,
        process: RankOne,
        schedule: Schedule | None = None,
        tokenizer: str | Tokenizer | None = None,
    ) -> None:
        super().__init__()
        if isinstance(config, str):
            if config not in PRESETS:
                raise ValueError(f"config: expected a ModelConfig or one of {', '.join(PRESETS)}, got {config!r}")
            config = PRESETS[config]
        self.config = config
        self.process = process
        self.schedule = schedule
        # those without files are known by name, and are loaded when they are needed
        if isinstance(tokenizer, Tokenizer) and not tokenizer.files():
            tokenizer = tokenizer.name
        self.tokenizer = tokenizer
        self.dim = process.dim
        self.scale_by_sigma = config.scale_by_sigma and process.family == "absorbing"
        self.uniform_fraction = _uniform_fraction(process) if config.hybrid_shift else None
        self.time_conditioning = config.time_conditioning
        self.vocab_embed = _Embedding(config.hidden_size, process.dim)
        self.sigma_map = _SigmaEmbedding(config.cond_dim)
        self.rotary_emb = _Rotary(config.hidden_size // config.n_heads)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_blocks))
        self.output_layer = _OutputLayer(config, process.dim)
        if self.uniform_fraction is not None:
            with torch.no_grad():
                self.output_layer.linear.bias[-1] = self._mask_log_score(self.uniform_fraction)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        **hub: Any,
    ) -> SEDD:
        """A trained model from a run, folder, file or Hugging Face repository: :func:`sedd.pretrained.load_pretrained`.

        Raises:
            FileNotFoundError, ConnectionError, ValueError: as there.
            ImportError: a package of the extra ``train`` is not installed.
        """
        try:
            from sedd.pretrained import load_pretrained
        except ImportError as error:
            raise ImportError(f"reading models needs {error.name}: {pip_install('train', str(error.name))}") from error
        return load_pretrained(pretrained_model_name_or_path, config=config, device=device, **hub)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Writes ``config.json``, ``model.safetensors`` and a model card into a folder, all of them or none.

        The files of its tokeniser are written too, unless that is one known by name. A model card that is there already
        stays as it is. The metadata of ``model.safetensors`` hold a digest of it, which is checked on loading.
        :meth:`push_to_hub` uploads the same files.

        Args:
            save_directory: the folder; made if it is not there.
            push_to_hub: upload them too, once they are there.
            repo_id: the repository on the hub; the folder's name if None.
            model_card_kwargs: what the model card says, such as ``text``.
            **kwargs: of :meth:`push_to_hub`.

        Returns:
            The address of the commit with ``push_to_hub=True``, else None.

        Raises:
            ValueError: the model was made without a schedule, or its process has no name; the folder is a run or a
                checkpoint of ``sedd train``, whose files have the same names.
            OSError: the files cannot be written; those that were there before stay.
            ImportError: ``huggingface_hub`` is not installed.
        """
        if not hasattr(super(), "save_pretrained"):
            raise ImportError(f"saving models needs huggingface_hub: {pip_install('train', 'huggingface_hub')}")
        from sedd.files import TEMPORARY, flush_folder, move_all, naming

        folder = Path(save_directory)
        if any((folder / name).exists() for name in ("checkpoints", "state.json", ".lock")):
            raise ValueError(f"{folder}: a run of sedd train is here, which this would destroy; give another folder")
        with naming(folder, "could not be written; what was there stays"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=TEMPORARY, dir=folder.parent) as temporary:
                new = Path(temporary, "new")
                new.mkdir()
                super().save_pretrained(new, model_card_kwargs=model_card_kwargs)
                if (folder / "README.md").exists():
                    (new / "README.md").unlink()
                flush_folder(new)
                move_all(new, folder, last="model.safetensors")
        if push_to_hub:
            address: str = self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **kwargs)
            return address
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        from sedd.files import save_tensors, write_json
        from sedd.pretrained import to_config

        write_json(save_directory / "config.json", to_config(self))
        if isinstance(self.tokenizer, Tokenizer):
            for name, text in self.tokenizer.files().items():
                (save_directory / name).write_text(text, encoding="utf-8")
        save_tensors(save_directory / "model.safetensors", self.state_dict(), {"format": "pt"})

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """The model card, from :data:`CARD` and :func:`sedd.pretrained.model_card`."""
        from sedd.pretrained import model_card

        return super().generate_model_card(*args, **{**model_card(self), **kwargs})

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Log-scores of every token at every position, in the convention of the released models.

        Args:
            x_t: tokens [B, L], int64.
            sigma: total noise σ̄ of each sequence [B], floating point, > 0.

        Returns:
            log_score [B, L, N], float32 also under autocast (float64 for a float64 model). Shifted by
            :meth:`log_score_shift`; the entry y = x_t is zero.

        Raises:
            TypeError: ``x_t`` is not int64 or ``sigma`` not floating point.
            ValueError: wrong shapes, a token that is not in [0, N), or a σ̄ that is not positive and finite (values
                are looked at on the CPU only: elsewhere it would wait for the device).
        """
        log_score = self.head(self.hidden(x_t, sigma))
        log_score = log_score if log_score.dtype == torch.float64 else log_score.float()
        shift = self.log_score_shift(sigma.unsqueeze(-1), x_t)
        if shift is not None:
            log_score = log_score - shift.to(log_score.dtype).unsqueeze(-1)
        return log_score.scatter(-1, x_t.unsqueeze(-1), 0.0)

    def hidden(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """States before the head: everything of :meth:`forward` that does not know the vocabulary axis.

        Args:
            x_t: tokens [B, L], int64.
            sigma: total noise σ̄ of each sequence [B], floating point, > 0; [1] if they share it, which then is looked
                at once.

        Returns:
            States [B, L, d]. Log-scores of any rows of them are ``head(states) - log_score_shift(sigma, x_t)``.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        self._check(x_t, sigma)
        with torch.autocast(x_t.device.type, enabled=False):
            condition = self.sigma_map(sigma if self.time_conditioning else torch.zeros_like(sigma[:1]))
        x = self.vocab_embed(x_t)
        cos, sin = self.rotary_emb(x_t.shape[1])
        for block in self.blocks:
            x = block(x, condition, cos, sin)
        hidden: Tensor = self.output_layer(x, condition)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """The output projection: log-scores [*, N], not yet shifted, of states [*, d], in the autocast dtype."""
        log_score: Tensor = self.output_layer.linear(hidden)
        return log_score

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [N, d] and bias [N] of :meth:`head`, for the operators that fuse it with what follows."""
        linear = self.output_layer.linear
        return linear.weight, linear.bias

    def log_score_shift(self, sigma: Tensor, x_t: Tensor) -> Tensor | None:
        """What the log-scores of a position are lowered by, so that the head need not know the size of σ̄.

        It is the log of p_t(MASK) / p_t(y) for a text of which nothing is known, p_0(y) = 1/n for each of n = N - 1
        tokens: with it, a head whose output is zero gives a masked position the scores of that text. With
        a = exp(-σ̄), b = 1 - a:

        * absorbing processes, where only masked positions have a loss: log(n b / a) = log expm1(σ̄) + log n at every
          position;
        * hybrid processes with uniform fraction λ: log(n b (1-λ) / (a + b λ)) at masked positions. At the others the
          shift is 0: the scores of that text are 1, except MASK's, for which the head has a bias to start with.

        Args:
            sigma: total noise σ̄, floating point, broadcasts to the shape of x_t.
            x_t: the tokens of the positions [*B], int64.

        Returns:
            A tensor in sigma's dtype that broadcasts to [*B]. None for uniform processes, and for models configured
            without ``scale_by_sigma`` (absorbing) or ``hybrid_shift`` (hybrid).
        """
        if self.scale_by_sigma:
            # log expm1(σ) = σ + log(1 - e^{-σ}): no overflow at large σ, no cancellation at small σ
            return sigma + torch.log(-torch.expm1(-sigma)) + math.log(self.dim - 1)
        if self.uniform_fraction is None:
            return None
        moved = -torch.expm1(-sigma)
        ratio = torch.log(moved / (torch.exp(-sigma) + moved * self.uniform_fraction))
        ratio = ratio + math.log((self.dim - 1) * (1 - self.uniform_fraction))
        return torch.where(x_t == self.dim - 1, ratio, torch.zeros_like(ratio))

    def _mask_log_score(self, uniform_fraction: float) -> float:
        """The first bias of MASK in a hybrid process: one log-score for every σ̄ from 0 to that of t = 1.

        The best constant for a text of which nothing is known is the log of n times the mean of p_t(MASK) = b (1-λ)
        over the mean of n p_t(y) = a + b λ; it costs 0.25 nats a token at λ = 0.1 with the log-linear schedule.
        """
        end = LogLinear() if self.schedule is None else self.schedule
        total = float(end.total(torch.ones((), dtype=torch.float64, device="cpu")))
        kept = -math.expm1(-total)  # the integrals over σ̄ of a, and of b:
        moved = total - kept
        ratio = (1 - uniform_fraction) * moved / (kept + uniform_fraction * moved)
        return math.log((self.dim - 1) * ratio)

    def _check(self, x_t: Tensor, sigma: Tensor) -> None:
        if x_t.dtype != torch.int64:
            raise TypeError(f"x_t: expected an int64 tensor [B, L], got {x_t.dtype}")
        if x_t.dim() != 2 or x_t.numel() == 0:
            raise ValueError(f"x_t: expected a non-empty tensor [B, L], got shape {list(x_t.shape)}")
        if not sigma.is_floating_point():
            raise TypeError(f"sigma: expected a floating-point tensor [B], got {sigma.dtype}")
        if sigma.shape not in (x_t.shape[:1], (1,)):
            raise ValueError(
                f"sigma: expected shape [{x_t.shape[0]}], one value for each sequence of x_t, or [1], "
                f"got {list(sigma.shape)}"
            )
        if x_t.device.type != "cpu" or torch.compiler.is_compiling():
            return
        low, high = (int(value) for value in x_t.aminmax())
        if low < 0 or high >= self.dim:
            raise ValueError(f"x_t: expected tokens in [0, {self.dim}), got values from {low} to {high}")
        if not bool(((sigma > 0) & sigma.isfinite()).all()):
            raise ValueError(f"sigma: expected positive finite values, got {sigma.tolist()}")
