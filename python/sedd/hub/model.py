"""The model class for the Hugging Face hub: saves and loads network, process, schedule and tokeniser together."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sedd.adapted import AdaptedTransformer
from sedd.data.tokenizer import Tokenizer
from sedd.diffusion.diffusion import Mean, Score
from sedd.diffusion.objectives import OBJECTIVES, get_objective
from sedd.diffusion.schedule import Schedule
from sedd.files import TEMPORARY, flush_folder, move_all, naming, save_tensors, write_json
from sedd.hints import pip_install
from sedd.hub.card import model_card
from sedd.hub.configuration import SCHEDULE, StoredModel, to_config
from sedd.hub.formats import read_model
from sedd.network import DiffusionTransformer, ModelConfig
from sedd.training.weights import load_weights
from sedd_ext import RankOne, reference

if TYPE_CHECKING:
    from huggingface_hub import PyTorchModelHubMixin
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin
    except ImportError:  # the model itself needs only torch

        class PyTorchModelHubMixin:
            """Replaces the mixin if huggingface_hub is not installed."""

            def __init_subclass__(cls, **kwargs):
                """Accepts the arguments of the mixin."""


__all__ = ["SEDD"]

CODE = "modeling_sedd.py"
"""The file of this package that is saved with models, for programs without it."""
AUTO = {
    "model_type": "sedd",
    "architectures": ["SEDDModel"],
    "auto_map": {"AutoConfig": "modeling_sedd.SEDDConfig", "AutoModel": "modeling_sedd.SEDDModel"},
}
"""Entries of ``config.json`` with which ``transformers.AutoModel`` finds the classes of that file."""


class SEDD(
    DiffusionTransformer,
    PyTorchModelHubMixin,
    library_name="sedd",
):
    """A diffusion transformer that estimates the ratios p_t(y) / p_t(x_t), with process, schedule and tokeniser.

    Args:
        config: the dimensions of the network, or the name of a preset in :data:`sedd.network.PRESETS`.
        process: the noise process; its ``dim`` is the size of the embedding and of the head.
        schedule: the noise schedule of the training; the network does not use it, but it is saved with the model. If
            the objective makes its own, ``model.schedule`` is that one: pass it to :class:`sedd.diffusion.Diffusion`.
        tokenizer: the tokeniser of the text, or the name of a registered one; saved with the model.
        objective: the loss of the training, a key of :data:`sedd.diffusion.OBJECTIVES`. It says how the output of the
            head is read: as log-scores, or as logits of the clean token.
        objective_params: parameters of the objective; its defaults where left out.

    Attributes:
        source: where the model was loaded from; None for a new model. The model card tells of its training.

    Raises:
        ValueError: there is no preset or objective of that name, or the schedule does not suit the objective.
        TypeError: the objective has no parameter of that name.

    Source: SEDD (Lou, Meng & Ermon 2024), section 5 and appendix C.2.
    """

    def __init__(
        self,
        config: ModelConfig | str,
        process: RankOne,
        schedule: Schedule | None = None,
        tokenizer: str | Tokenizer | None = None,
        objective: str = "score_entropy",
        objective_params: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(config, process.dim)
        self.source: Path | None = None
        self.process = process
        self.objective, self.objective_params = objective, dict(objective_params or {})
        made = get_objective(objective, **self.objective_params)
        self.schedule: Schedule | None
        # not a submodule: its parameters are not the network's
        object.__setattr__(self, "schedule", None if schedule is None else made.schedule(schedule, process))
        # tokenisers without files are stored by name and loaded on use
        if isinstance(tokenizer, Tokenizer) and not tokenizer.files():
            tokenizer = tokenizer.name
        self.tokenizer = tokenizer
        self.parameterization = made.parameterization(self.config)
        if isinstance(self.parameterization, Score):
            self.parameterization.initialize(self.output_layer.linear.bias, process, schedule)

    @classmethod
    def from_stored(cls, stored: StoredModel, device: torch.device | str = "cpu") -> SEDD:
        """Builds a model from the result of :func:`sedd.hub.formats.read_model`, in evaluation mode.

        Raises:
            ValueError: the sizes do not fit together, or the tensors do not fit the model; the message lists missing,
                unexpected and misshapen ones.
        """
        kind = AdaptedSEDD if stored.sizes.trunk else cls
        make = partial(
            kind,
            stored.sizes,
            stored.process,
            stored.schedule,
            stored.tokenizer,
            stored.objective,
            stored.objective_params,
        )
        # names and shapes of the tensors are compared before memory is allocated
        try:
            with torch.device("meta"):
                model = make()
        except ValueError as error:
            raise ValueError(f"{stored.file}: invalid configuration: {error}") from error
        load_weights(model, stored.tensors, stored.file)
        if stored.sizes.trunk:  # its buffers are not stored, and are made with the initial weights
            model = make()
            load_weights(model, stored.tensors, stored.file)
        model.source = stored.path
        if isinstance(stored.schedule, nn.Module):
            stored.schedule.to(device)
        return model.to(device).eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        **hub: Any,
    ) -> SEDD:
        """Loads a trained model from a run, folder, file or Hugging Face repository.

        Args:
            pretrained_model_name_or_path: see :func:`sedd.hub.formats.read_model`, also for ``config`` and ``**hub``.
            config: entries that take precedence over those of ``config.json``.
            device: the device of the model.
            **hub: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

        Returns:
            The model in evaluation mode and float32, with the averaged weights, and with ``process``, ``schedule`` and
            ``tokenizer`` (a name, the tokeniser saved with the model, or None if it is unknown) as attributes.

        Raises:
            FileNotFoundError, ConnectionError: as :func:`sedd.hub.formats.read_model`.
            ValueError: as there, or the tensors do not fit the model.
            ImportError: a package of the extra ``train`` is not installed.
        """
        return cls.from_stored(read_model(pretrained_model_name_or_path, config=config, **hub), device)

    def to_config(self) -> dict[str, Any]:
        """The content of ``config.json``, see :func:`sedd.hub.configuration.to_config`."""
        # the tokeniser of a run of images is that of its options, and has no meaning
        tokenizer = None if self.config.shape else self.tokenizer
        return to_config(self.config, self.process, self.schedule, tokenizer, self.objective, self.objective_params)

    def facts(self) -> str:
        """A one-line summary: parameters, noise, schedule and tokens.

        Raises:
            ValueError: as :func:`sedd.hub.configuration.to_config`.
        """
        config, sizes = self.to_config(), self.config
        count = sum(parameter.numel() for parameter in self.parameters())
        noise = ", ".join(f"{key} {value:g}" for key, value in config["noise"].items() if key != "type")
        shape = " x ".join(map(str, sizes.shape))
        tokens = (
            f"{config['tokens']:,} values in images of {shape}"
            if shape
            else (f"{config['tokenizer'] or 'unnamed'} tokens ({config['tokens']:,}) in blocks of {sizes.length}")
        )
        network = f"{sizes.trunk['model_type']}: " if sizes.trunk else ""
        return (
            f"{count / 1e6:.1f} M parameters ({network}{sizes.n_blocks} blocks of width {sizes.hidden_size}, "
            f"{sizes.n_heads} heads), {config['graph']['type']} noise, {config['noise']['type']} schedule ({noise}), "
            f"{tokens}"
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Writes the model to a folder: all of its files or none.

        The files are ``config.json``, ``model.safetensors``, a model card ``README.md``, and those of the tokeniser,
        unless it is a registered one. ``modeling_sedd.py`` lets ``transformers.AutoModel`` load the folder without
        this package; it is left out if the schedule or the objective is a class of your own, and for networks adapted
        from models of ``transformers``. The metadata of ``model.safetensors`` contains a digest of its content, which
        is verified on loading.

        The model card has the training and the measured figures of the run that the model was loaded from. If it was
        loaded from a model folder, the card that this package wrote there is copied. Neither is done if the weights
        have changed. An existing model card in ``save_directory`` is not changed; :meth:`push_to_hub` replaces the one
        on the hub.

        Args:
            save_directory: the folder; created if it does not exist.
            push_to_hub: whether to upload the files after writing them.
            repo_id: the repository on the hub; None: the name of the folder.
            model_card_kwargs: ``name`` in the model card (default: that of the folder), and ``text`` to add at its end.
            **kwargs: arguments of :meth:`push_to_hub`.

        Returns:
            The URL of the commit with ``push_to_hub=True``, else None.

        Raises:
            ValueError: the model is autoregressive or has no schedule, or its process has no name; the folder is a run
                or a checkpoint of ``sedd train``, whose files have the same names; or a file in the folder ``eval`` of
                the model's run is damaged.
            OSError: the files cannot be written; existing files are not changed.
            ImportError: ``huggingface_hub`` is not installed.
        """
        _need_hub(super())
        if self.causal:
            raise ValueError(
                "save_pretrained: expected a diffusion model, got an autoregressive one, a baseline that has no model "
                "card; keep its run"
            )
        folder = Path(save_directory)
        if any((folder / name).exists() for name in ("checkpoints", "state.json", ".lock")):
            raise ValueError(
                f"{folder}: expected no run of sedd train there, which would be overwritten; give another folder"
            )
        with naming(folder, "could not be written; existing files are unchanged"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=TEMPORARY, dir=folder.parent) as temporary:
                new = Path(temporary, "new")
                new.mkdir()
                super().save_pretrained(new, model_card_kwargs={"name": folder.name, **(model_card_kwargs or {})})
                if (folder / "README.md").exists():
                    (new / "README.md").unlink()
                flush_folder(new)
                move_all(new, folder, last="model.safetensors")
        if push_to_hub:
            address: str = self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **kwargs)
            return address
        return None

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> str:
        """Uploads the files of :meth:`save_pretrained` to a repository on the Hugging Face hub.

        A new model card replaces ``README.md`` on the hub, unless ``ignore_patterns="README.md"`` is given.

        Args:
            repo_id: the repository; created if it does not exist.
            model_card_kwargs: as of :meth:`save_pretrained`; ``name`` is the repository by default.
            **kwargs: arguments of ``PyTorchModelHubMixin.push_to_hub`` of huggingface_hub, such as ``private``.

        Returns:
            The URL of the commit.
        """
        _need_hub(super())
        given = {"name": repo_id, **(model_card_kwargs or {})}
        address: str = super().push_to_hub(repo_id, model_card_kwargs=given, **kwargs)
        return address

    def _save_pretrained(self, save_directory: Path) -> None:
        auto = AUTO if self._has_code() else {}
        write_json(save_directory / "config.json", {**auto, **self.to_config()})
        if auto:
            shutil.copyfile(Path(__file__).with_name(CODE), save_directory / CODE)
        if isinstance(self.tokenizer, Tokenizer) and not self.config.shape:
            for name, text in self.tokenizer.files().items():
                (save_directory / name).write_text(text, encoding="utf-8")
        schedule: Any = self.schedule
        learned = schedule.state_dict(prefix=SCHEDULE) if isinstance(schedule, nn.Module) else {}
        save_tensors(save_directory / "model.safetensors", {**self.state_dict(), **learned}, {"format": "pt"})

    def _has_code(self) -> bool:
        """Whether the saved file has the network, the schedule and the objective: they are classes of this package."""
        if self.config.trunk:
            return False
        kinds = (type(self.schedule), OBJECTIVES[self.objective])
        return all(kind.__module__.startswith("sedd.") for kind in kinds)

    def generate_model_card(self, *, name: str, text: str = "") -> Any:
        """Makes the model card; see :meth:`save_pretrained`.

        Args:
            name: the name of the repository or folder.
            text: Markdown to add at the end.
        """
        stored = self._stored()
        if stored is not None and stored.config is None:
            card = _own_card(stored.file.with_name("README.md"))
            if card is not None and not text:
                return card
        return model_card(name, self.facts(), self.to_config(), stored, text, auto=self._has_code())

    def _stored(self) -> StoredModel | None:
        """The model as it is stored at its source; None if it was changed or is no longer there."""
        if self.source is None:
            return None
        try:
            stored = read_model(self.source)
            other = SEDD.from_stored(stored)
        except (OSError, ValueError):
            return None
        theirs, mine = other.state_dict(), self.state_dict()
        same = other.to_config() == self.to_config() and theirs.keys() == mine.keys()
        return stored if same and all(torch.equal(mine[name].cpu(), theirs[name]) for name in mine) else None

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Returns the log-scores of all tokens at all positions, in the convention of the released models.

        Args:
            x_t: tokens [B, L], int64.
            sigma: total noise σ̄ of each sequence [B], floating point, > 0.

        Returns:
            log_score [B, L, N], float32 even under autocast (float64 for a float64 model). Shifted by
            :meth:`sedd.diffusion.Score.log_score_shift`, or those that the model's prediction of the clean token
            implies; the entry y = x_t is zero.

        Raises:
            TypeError: ``x_t`` is not int64 or ``sigma`` not floating point.
            ValueError: wrong shapes, a token that is not in [0, N), or a σ̄ that is not positive and finite (values
                are checked only on the CPU, because a check on another device would synchronise with it); or the
                model is autoregressive or has a schedule for each token.
        """
        if self.causal:
            raise ValueError("forward: expected a diffusion model, got an autoregressive one, which has no log-scores")
        if isinstance(self.parameterization, Mean) and self.parameterization.per_token:
            raise ValueError(
                f"forward: expected one noise schedule for all tokens, got the learned ones of {self.objective}, which "
                "σ̄ does not determine; call head(hidden(x_t, sigma)) for the logits of the clean token"
            )
        log_score = self.head(self.hidden(x_t, sigma))
        log_score = log_score if log_score.dtype == torch.float64 else log_score.float()
        if isinstance(self.parameterization, Score):
            shift = self.parameterization.log_score_shift(self.process, sigma.unsqueeze(-1), x_t)
            if shift is not None:
                log_score = log_score - shift.to(log_score.dtype).unsqueeze(-1)
        else:
            log_score = reference.implied_log_score(log_score, x_t, sigma.unsqueeze(-1), self.process)
        return log_score.scatter(-1, x_t.unsqueeze(-1), 0.0)


def _own_card(file: Path) -> Any:
    """The model card in a file; None if it is not one of this package."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        card = ModelCard.load(file) if file.is_file() else None
    except (ValueError, YAMLError):
        return None
    return card if card is not None and "discrete-diffusion" in (card.data.tags or ()) else None


def _need_hub(mixin: Any) -> None:
    if not hasattr(mixin, "save_pretrained"):
        raise ImportError(f"saving models needs huggingface_hub: {pip_install('train', 'huggingface_hub')}")


class AdaptedSEDD(SEDD, AdaptedTransformer):
    """A :class:`SEDD` whose network is adapted from a model of ``transformers``."""
