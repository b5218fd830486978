"""Loads models from runs, files and the Hugging Face hub, without executing code from them."""

from sedd.hub.init import read_init
from sedd.hub.model import SEDD
from sedd.hub.pretrained import LoadedModel, load_model

__all__ = ["SEDD", "LoadedModel", "load_model", "read_init"]
