"""Networks adapted from language models of ``transformers``: GPT-2, LLaMA, Qwen2, BERT and ModernBERT.

The network of the model is used unchanged, with its embeddings, blocks, final norm and head. Its vocabulary gets a row
for MASK. A causal model gets full attention, and the output of a position is read from the state of the position
before it, where a causal model predicts it. The noise level is not an input: under absorbing noise, the clean token
does not depend on it, given the other tokens.

The classes are those of ``transformers`` itself. A configuration chooses one of :data:`FAMILIES` and the numbers in it;
it cannot name code.

Source: Gong et al. 2024, "Scaling Diffusion Language Models via Adaptation from Autoregressive Models" (DiffuGPT and
DiffuLLaMA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sedd.hints import pip_install
from sedd.network import DiffusionTransformer, KeyValueCache, ModelConfig
from sedd.options import check_one_of

__all__ = [
    "FAMILIES",
    "AdaptedTransformer",
    "Family",
    "Trunk",
    "make_network",
    "sizes_of",
    "trunk_class",
    "trunk_config",
    "visible_pairs",
]


@dataclass(frozen=True)
class Family:
    """A kind of model of ``transformers``.

    Attributes:
        model: the class with the head.
        blocks: the attribute of the model without its head that contains the transformer blocks.
        dropout: the entries of the configuration that are probabilities of dropout.
        causal: whether each position sees only those before it and predicts the next token.
        transform: the attribute of the model that comes between the final norm and a linear head; empty if none does.
    """

    model: str
    blocks: str
    dropout: tuple[str, ...]
    causal: bool = True
    transform: str = ""


FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", "h", ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
    "llama": Family("LlamaForCausalLM", "layers", ("attention_dropout",)),
    "qwen2": Family("Qwen2ForCausalLM", "layers", ("attention_dropout",)),
    "bert": Family(
        "BertForMaskedLM",
        "encoder.layer",
        ("hidden_dropout_prob", "attention_probs_dropout_prob"),
        causal=False,
        transform="cls.predictions.transform",
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        "layers",
        ("mlp_dropout", "attention_dropout", "embedding_dropout"),
        causal=False,
        transform="head",
    ),
}
"""The supported models by the ``model_type`` of their configuration."""
FIXED = {"use_cache": False, "is_decoder": False, "add_cross_attention": False, "pad_token_id": None}
"""Entries of the configuration that have these values whatever the checkpoint says."""
PADDING = 128
"""Vocabularies are padded by fewer rows than this."""
MOST_TOKENS = 1024
"""The largest default length. Models with more positions can be given a larger one."""


def make_network(config: ModelConfig, dim: int) -> DiffusionTransformer:
    """Makes the network of a configuration, with random weights.

    Args:
        config: the sizes.
        dim: N, the size of the vocabulary, MASK included.

    Raises:
        ImportError: the network needs ``transformers``, which is not installed.
        ValueError: the configuration is not that of a model of :data:`FAMILIES`.
    """
    return AdaptedTransformer(config, dim) if config.trunk else DiffusionTransformer(config, dim)


def trunk_class(trunk: Mapping[str, Any]) -> Any:
    """The class of ``transformers`` for a configuration.

    Raises:
        ImportError: ``transformers`` is not installed.
        ValueError: its ``model_type`` is not one of :data:`FAMILIES`.
    """
    kind = str(trunk.get("model_type"))
    check_one_of("model_type", kind, FAMILIES)
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"a network adapted from {kind} needs transformers: {pip_install('eval', 'transformers')}"
        ) from error
    return getattr(transformers, FAMILIES[kind].model)


def trunk_config(trunk: Mapping[str, Any], **changes: Any) -> Any:
    """The configuration object of ``transformers`` for the entries of a configuration.

    Args:
        trunk: ``model_type``, and entries that the class of the configuration defines. The values in :data:`FIXED` are
            replaced.
        **changes: entries that take precedence.

    Raises:
        ImportError: ``transformers`` is not installed.
        ValueError: an entry is unknown or has a value that the class refuses.
    """
    kind = trunk_class(trunk).config_class
    defaults = kind().to_dict()
    values = {**{name: value for name, value in trunk.items() if name != "model_type"}, **changes}
    if unknown := values.keys() - _entries(kind):
        raise ValueError(f"trunk.{min(unknown)}: expected an entry of {kind.__name__} that describes the network")
    values.update({name: value for name, value in FIXED.items() if name in defaults})
    try:
        return kind(**values)
    except Exception as error:  # the checks of the library raise errors of their own
        raise ValueError(f"trunk: expected a configuration of {trunk['model_type']}, got: {error}") from error


def sizes_of(config: Any, model_type: str) -> ModelConfig:
    """The configuration of the network adapted from a model of ``transformers``.

    Args:
        config: the configuration object of the model.
        model_type: a key of :data:`FAMILIES`.
    """
    family, entries = FAMILIES[model_type], config.to_dict()
    trunk = {name: entries[name] for name in sorted(_entries(type(config)) & entries.keys() - {"vocab_size"})}
    return ModelConfig(
        hidden_size=config.hidden_size,
        n_blocks=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        length=min(config.max_position_embeddings - family.causal, MOST_TOKENS),
        dropout=entries[family.dropout[0]],
        time_conditioning=False,
        trunk={"model_type": model_type, **trunk},
        shift=family.causal,
    )


def _entries(kind: Any) -> set[str]:
    """The entries of a class of configurations that describe the network, without those that all classes have."""
    from transformers import PreTrainedConfig

    return set(kind().to_dict().keys() - PreTrainedConfig().to_dict().keys())


def visible_pairs(length: int, share: float, generator: torch.Generator) -> Tensor:
    """Draws which positions attention sees while it grows from causal to full.

    Args:
        length: number of positions L.
        share: the probability that a position sees one after it.
        generator: random number generator; its device is that of the result.

    Returns:
        [L, L], bool: whether the position of the row sees that of the column. Positions always see themselves and those
        before them.

    Source: Gong et al. 2024, section 3.2 (attention mask annealing).
    """
    drawn = torch.rand(length, length, generator=generator, device=generator.device) < share
    return drawn | torch.ones_like(drawn).tril()


class Trunk(nn.Module):
    """The parts of a model of ``transformers``: its body, what follows it, and its linear head.

    Attributes:
        body: embeddings, blocks and final norm.
        transform: what comes between body and head, or nothing.
        head_weight: the weight of the head [N, d]; None if it is that of the embedding.
        head_bias: the bias of the head [N], or None.

    Args:
        model: the model with its head, of one of :data:`FAMILIES`.
        model_type: a key of :data:`FAMILIES`.
    """

    def __init__(self, model: Any, model_type: str) -> None:
        super().__init__()
        path = FAMILIES[model_type].transform
        self.body = model.base_model
        self.transform = reduce(getattr, path.split("."), model) if path else nn.Identity()
        head = model.get_output_embeddings()
        self.head_weight: nn.Parameter | None = head.weight
        if head.weight is self.embedding:
            self.head_weight = None
        self.head_bias: nn.Parameter | None = head.bias

    @property
    def embedding(self) -> nn.Parameter:
        """The embedding of the tokens [N, d]."""
        weight: nn.Parameter = self.body.get_input_embeddings().weight
        return weight

    def vocabulary(self) -> list[str]:
        """The names of the parameters with a row for each token."""
        own = [value for value in (self.embedding, self.head_weight, self.head_bias) if value is not None]
        return [name for name, value in self.named_parameters() if any(value is one for one in own)]

    def forward(self, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """States before the head [B, L, d].

        Args:
            tokens: [B, L], int64.
            visible: which positions attention sees [L, L], bool; None for what the model does.
        """
        mask = None if visible is None else visible[None, None]
        hidden: Tensor = self.transform(self.body(input_ids=tokens, attention_mask=mask).last_hidden_state)
        return hidden


class AdaptedTransformer(DiffusionTransformer):
    """A network of ``transformers`` as the network of a diffusion model.

    Attributes:
        visible: for a causal model: which positions attention sees [L, L], bool, see :func:`visible_pairs`; L includes
            the first token that is read before the text. None for all positions.

    Args:
        config: the sizes, with the configuration of the model in ``config.trunk``.
        dim: N, the size of the vocabulary, MASK included: rows of embedding and head.

    Raises:
        ImportError: ``transformers`` is not installed.
        ValueError: the configuration is not that of a model of :data:`FAMILIES`.
    """

    visible: Tensor | None

    def _build(self, config: ModelConfig, dim: int) -> None:
        kind = config.trunk.get("model_type", "")
        model_class = trunk_class(config.trunk)
        self.family = FAMILIES[kind]
        changes: dict[str, Any] = {"vocab_size": dim}
        if config.dropout != config.trunk.get(self.family.dropout[0]):
            changes.update(dict.fromkeys(self.family.dropout, config.dropout))
        inner = trunk_config(config.trunk, **changes)
        own = {"hidden_size": inner.hidden_size, "n_blocks": inner.num_hidden_layers, "time_conditioning": False}
        for name, value in {**own, "n_heads": inner.num_attention_heads}.items():
            if getattr(config, name) != value:
                raise ValueError(f"{name}: expected {value}, as in trunk, got {getattr(config, name)}")
        try:
            model = model_class._from_config(inner, attn_implementation="sdpa")
        except Exception as error:  # whatever the library raises for values that do not fit together
            raise ValueError(f"trunk: expected a configuration of {kind}, got: {error}") from error
        self.trunk = Trunk(model, kind)
        start = config.trunk.get("bos_token_id")
        self.start = start if isinstance(start, int) and 0 <= start < dim - 1 else dim - 1
        self.visible = None
        if config.length > self.most_tokens:
            raise ValueError(
                f"length: expected at most {self.most_tokens}, the positions of the model, got {config.length}"
            )

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The transformer blocks."""
        found: nn.ModuleList = reduce(getattr, self.family.blocks.split("."), self.trunk.body)
        return found

    @property
    def activation_checkpointing(self) -> bool:
        """Compute the activations of the blocks again in the backward pass, instead of storing them."""
        return self._again

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        changed = value != getattr(self, "_again", False)
        self._again = value
        if changed:
            body: Any = self.trunk.body
            kind = "activation" if hasattr(body, "activation_checkpointing_enable") else "gradient"  # the older name
            if value:
                getattr(body, f"{kind}_checkpointing_enable")({"use_reentrant": False})
            else:
                getattr(body, f"{kind}_checkpointing_disable")()

    @property
    def most_tokens(self) -> int:
        """The largest length: the positions of the model, without that of the token that is read before the text."""
        return int(self.trunk.body.config.max_position_embeddings) - self.config.shift

    def hidden(
        self, x_t: Tensor, sigma: Tensor, cache: KeyValueCache | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """States before the head.

        Args:
            x_t: tokens [B, L], int64.
            sigma: total noise, which the network ignores.
            cache: None.
            labels: None.

        Returns:
            States [B, L, d]. With ``config.shift``, that of a position is the state of the position before it; before
            the first one, the network reads the model's first token of a text, or MASK if it has none.

        Raises:
            TypeError, ValueError: as :meth:`sedd.network.DiffusionTransformer.hidden`.
        """
        self._check(x_t, sigma)
        if cache is not None:
            raise ValueError("cache: expected none for a network whose positions see those after them, got one")
        if labels is not None:
            raise ValueError("labels: expected none for a network without classes, got some")
        if x_t.shape[1] > self.most_tokens:
            raise ValueError(
                f"x_t: expected at most {self.most_tokens} tokens, the positions of the model, got {x_t.shape[1]}"
            )
        tokens = F.pad(x_t, (1, 0), value=self.start) if self.config.shift else x_t
        visible = self.visible
        if visible is None and self.family.causal:  # without a mask, the model would be causal
            visible = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=x_t.device)
        hidden: Tensor = self.trunk(tokens, visible)
        return hidden[:, :-1] if self.config.shift else hidden

    def head(self, hidden: Tensor) -> Tensor:
        """The output projection: [*, N] for states [*, d], in the autocast dtype."""
        return F.linear(hidden, *self.head_parameters())

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [N, d], which may be that of the embedding, and bias ([N] or None) of :meth:`head`."""
        trunk = self.trunk
        return trunk.embedding if trunk.head_weight is None else trunk.head_weight, trunk.head_bias

    def with_vocabulary(self, tensors: Mapping[str, Tensor], *, known: bool) -> dict[str, Tensor]:
        """The tensors of a checkpoint with the rows of this network: those of its first n tokens, and MASK.

        Args:
            tensors: tensors by the names of this network. Those of the vocabulary have a row for each token of the
                checkpoint, and a last one for MASK.
            known: whether the tokeniser is known to be that of the checkpoint. Otherwise the checkpoint must not have
                :data:`PADDING` tokens more.

        Raises:
            ValueError: the checkpoint has fewer tokens, or too many more.
        """
        result = dict(tensors)
        for name in (f"trunk.{name}" for name in self.trunk.vocabulary()):
            if name not in result:
                continue  # reported by load_weights
            rows, n = len(result[name]) - 1, self.dim - 1
            if n > rows:
                raise ValueError(f"tokenizer: expected at most the {rows} tokens of the model in init, got {n}")
            if not known and rows - n >= PADDING:
                raise ValueError(
                    f"tokenizer: expected the tokeniser of the model in init, which has {rows} tokens and no "
                    f"tokenizer.json, got the default with {n}; give it by --tokenizer"
                )
            result[name] = torch.cat([result[name][:n], result[name][-1:]])
        return result
