"""Tokenisers: text to token ids and back.

Three are known by name: ``gpt2`` (byte-pair encoding of GPT-2, 50,257 tokens), ``bytes`` (UTF-8 bytes and end-of-text)
and ``text8`` (the 27 symbols of the text8 benchmark). Any other is read from a ``tokenizer.json`` of the Hugging Face
``tokenizers`` library: a file, a folder or a repository on the hub. Such a file is data; nothing in it or beside it is
executed or imported. Ids are 0 ≤ id < ``vocab_size``; the id ``vocab_size``, MASK of an absorbing process, belongs to
no tokeniser and decodes to a visible placeholder.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sedd.hints import pip_install

if TYPE_CHECKING:
    import tiktoken

MASK_TEXT = "█"
EOT_TEXT = "<|endoftext|>"

Tokens = NDArray[np.unsignedinteger[Any]]


class Tokenizer(ABC):
    """What every tokeniser offers.

    Attributes:
        name: What identifies it: a name `get_tokenizer` knows, or one made from a digest of its files.
        vocab_size: Number of token ids, end-of-text included and MASK not.
        eot: Id of the end-of-text token, or None where the vocabulary has none.
    """

    name: str
    vocab_size: int
    eot: int | None

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The type of `encode_array`: uint16 for up to 65,536 tokens, else uint32."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def files(self) -> dict[str, str]:
        """The text of each file that a model must keep to have this tokeniser; none for those known by name."""
        return {}

    @abstractmethod
    def encode_array(self, text: str) -> Tokens:
        """Token ids of `text` as an array, [n] of `dtype`. Never gives `eot`: text that spells it is ordinary text.

        Raises:
            ValueError: If `text` has characters outside the vocabulary.
        """

    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes of text each token stands for, [vocab_size] int64; 0 for end-of-text, which is not text."""

    @abstractmethod
    def _token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of an ordinary token, which need not be whole characters."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as a list; see `encode_array`."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids.

        Any sequence of ids decodes, half-finished ones too: bytes that are not UTF-8 show as U+FFFD, MASK as ``█`` and
        end-of-text as ``<|endoftext|>``.

        Args:
            ids: Token ids, 0 ≤ id ≤ vocab_size: a list, an array or a one-dimensional tensor.

        Raises:
            ValueError: If an id is out of range.
        """
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each token adds to the text of `decode`: a character of several tokens stands at the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces: list[str] = []
        for token in map(int, ids):
            if token != self.eot and 0 <= token < self.vocab_size:
                pieces.append(decoder.decode(self._token_bytes(token)))
                continue
            if token not in (self.eot, self.vocab_size):
                raise ValueError(
                    f"ids: token {token} is out of range; {self.name} has the tokens 0 to {self.vocab_size - 1}, "
                    f"and {self.vocab_size} for MASK"
                )
            if pieces:  # no character goes on beyond this token
                pieces[-1] += decoder.decode(b"", final=True)
            pieces.append(EOT_TEXT if token == self.eot else MASK_TEXT)
        if pieces:
            pieces[-1] += decoder.decode(b"", final=True)
        return pieces

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[str | None, ...]]:
        # A worker process and the cache of `datasets` need the name alone, not the tables.
        return get_tokenizer, (self.name,)


class Bytes(Tokenizer):
    """UTF-8 bytes, 0 to 255, and end-of-text, 256."""

    name = "bytes"
    vocab_size = 257
    eot: int | None = 256

    def encode_array(self, text: str) -> Tokens:  # noqa: D102
        # A lone surrogate (a broken command line, broken JSON) is no text and has no UTF-8: it becomes "?".
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.uint16)

    def byte_lengths(self) -> NDArray[np.int64]:  # noqa: D102
        lengths = np.ones(self.vocab_size, np.int64)
        lengths[256] = 0
        return lengths

    def _token_bytes(self, token: int) -> bytes:
        return bytes([token])


class Text8(Tokenizer):
    """The 27 symbols of text8: 0 is the space, 1 to 26 are a to z. There is no end-of-text."""

    name = "text8"
    symbols = " abcdefghijklmnopqrstuvwxyz"
    vocab_size = len(symbols)
    eot: int | None = None

    def encode_array(self, text: str) -> Tokens:  # noqa: D102
        bad = re.search("[^ a-z]", text)
        if bad:
            near = text[max(0, bad.start() - 20) : bad.start() + 20]
            raise ValueError(
                f"text: {bad[0]!r} (U+{ord(bad[0]):04X}) at character {bad.start()}, in {near!r}, is not one of the 27 "
                "symbols of text8: a to z and the space. Convert the text (lower case, digits spelled out, everything "
                "else a space), or use the tokeniser 'bytes'"
            )
        codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.uint16)
        ids: NDArray[np.uint16] = np.where(codes == ord(" "), np.uint16(0), codes - np.uint16(ord("a") - 1))
        return ids

    def byte_lengths(self) -> NDArray[np.int64]:  # noqa: D102
        return np.ones(self.vocab_size, np.int64)

    def _token_bytes(self, token: int) -> bytes:
        return self.symbols[token].encode("ascii")


class GPT2(Tokenizer):
    """GPT-2's byte-pair encoding through tiktoken: 50,256 ranks and end-of-text, 50256."""

    name = "gpt2"
    vocab_size = 50257
    eot: int | None = 50256

    def __init__(self) -> None:
        """Load the ranks, from tiktoken's cache or from the network.

        Raises:
            ImportError: If tiktoken is not installed.
            RuntimeError: If the ranks are neither cached nor to be had.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(
                f"the tokeniser 'gpt2' needs tiktoken: {pip_install('train', 'tiktoken')} (or use 'bytes')"
            ) from error
        try:
            # r50k_base has the ranks of "gpt2" in one file, which a copied cache folder can hold.
            self._encoding: tiktoken.Encoding = tiktoken.get_encoding("r50k_base")
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"the ranks of the tokeniser 'gpt2' could not be loaded ({type(error).__name__}: {error}). tiktoken "
                "downloads them once, so connect to the network; or set TIKTOKEN_CACHE_DIR to a folder that holds "
                "them, copied from a machine that has them; or use the tokeniser 'bytes', which needs no file"
            ) from error

    def encode_array(self, text: str) -> Tokens:  # noqa: D102
        ids: list[int] = self._encoding.encode_ordinary(text)
        return np.array(ids, np.uint16)

    def byte_lengths(self) -> NDArray[np.int64]:  # noqa: D102
        lengths = [len(self._encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size - 1)]
        return np.array([*lengths, 0], np.int64)

    def _token_bytes(self, token: int) -> bytes:
        found: bytes = self._encoding.decode_single_token_bytes(token)
        return found


class JsonTokenizer(Tokenizer):
    """A tokeniser of the Hugging Face ``tokenizers`` library, from the text of its ``tokenizer.json``.

    Special tokens stand for no text: text that spells one is encoded as ordinary text, and `byte_lengths` counts them,
    and the token for unknown characters, as 0. Of a tokeniser that drops or changes characters (lower case, for
    example), `byte_lengths` counts the bytes of what it keeps, and where it drops the spaces between words, none of
    them: a figure per byte errs upwards. A tokeniser that puts a space before the first word of a text has one byte
    more for each document.

    Args:
        text: Content of ``tokenizer.json``.
        eot_text: The token that ends a document. None: the first of `ENDS` that the vocabulary has.

    Raises:
        ImportError: If ``tokenizers`` is not installed.
        ValueError: If the text is not a tokeniser, or one whose tokens cannot be spelled; if `eot_text` is not in its
            vocabulary, or nothing in it can end a document.
    """

    ENDS = (EOT_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")

    def __init__(self, text: str, eot_text: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Parsed
        except ImportError as error:
            raise ImportError(
                f"reading a tokenizer.json needs tokenizers: {pip_install('train', 'tokenizers')}"
            ) from error
        try:
            self._parsed = Parsed.from_str(text)
            parts = json.loads(text)
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"tokenizer: expected a tokenizer.json of the tokenizers library, got: {error}") from error
        self._parsed.no_truncation()
        self._parsed.no_padding()
        self._parsed.encode_special_tokens = True
        ids: dict[str, int] = self._parsed.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if eot_text is None:
            eot_text = next((end for end in self.ENDS if end in ids), None)
        elif eot_text not in ids:
            raise ValueError(f"tokenizer: its eos_token {eot_text!r} is not in its vocabulary")
        self.eot = None if eot_text is None else ids[eot_text]
        if eot_text is None and not len(self.encode_array(" ")):
            raise ValueError(
                f"tokenizer: expected a token that ends a document, one of {', '.join(self.ENDS)} or the eos_token of "
                "a tokenizer_config.json beside tokenizer.json; it has none, and no token for a space"
            )
        self._text, self._eot_text = text, eot_text
        self.name = "json-" + hashlib.sha256(json.dumps([text, eot_text]).encode()).hexdigest()[:16]
        spell = _speller(parts.get("decoder"))
        added = self._parsed.get_added_tokens_decoder()
        unknown = parts["model"].get("unk_token")
        if parts["model"].get("unk_id") is not None:
            unknown = self._parsed.id_to_token(parts["model"]["unk_id"])
        self._bytes = [b""] * self.vocab_size
        self._lengths = np.zeros(self.vocab_size, np.int64)
        for token, number in ids.items():
            ordinary = number not in added
            self._bytes[number], length = spell(token) if ordinary else (token.encode(), len(token.encode()))
            is_text = token != unknown and number != self.eot and (ordinary or not added[number].special)
            self._lengths[number] = length if is_text else 0

    def encode_array(self, text: str) -> Tokens:  # noqa: D102
        plain = text.encode("utf-8", errors="replace").decode()  # a lone surrogate has no UTF-8
        ids: list[int] = self._parsed.encode(plain, add_special_tokens=False).ids
        return np.array([token for token in ids if token != self.eot], self.dtype)

    def byte_lengths(self) -> NDArray[np.int64]:  # noqa: D102
        return self._lengths

    def _token_bytes(self, token: int) -> bytes:
        return self._bytes[token]

    def files(self) -> dict[str, str]:
        """``tokenizer.json`` as it was read, and a ``tokenizer_config.json`` with which transformers reads it too."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eot_text}
        return {TOKENIZER_FILES[0]: self._text, TOKENIZER_FILES[1]: json.dumps(config, indent=2) + "\n"}

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[str | None, ...]]:
        # What the cache of `datasets` hashes: the content, wherever it was read from.
        return _json_tokenizer, (self._text, self._eot_text)


@cache
def _json_tokenizer(text: str, eot_text: str | None) -> Tokenizer:
    return JsonTokenizer(text, eot_text)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: GPT-2's table."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _speller(decoder: dict[str, Any] | None) -> Callable[[str], tuple[bytes, int]]:
    """A function from a token to its bytes and how many of them count, by the decoder of a ``tokenizer.json``."""
    parts = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = {part["type"]: part for part in parts}
    known = {"ByteLevel", "WordPiece", "BPEDecoder", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    if not kinds.keys() <= known:
        raise ValueError(f"tokenizer: expected a decoder of {', '.join(sorted(known))}; got {', '.join(sorted(kinds))}")
    alphabet = _byte_alphabet()
    spaces = {part.get("replacement", "▁"): " " for part in parts if part["type"] == "Metaspace"}
    for part in parts:
        if part["type"] == "Replace" and "String" in part["pattern"]:
            spaces[part["pattern"]["String"]] = part["content"]

    def spell(token: str) -> tuple[bytes, int]:
        if "ByteLevel" in kinds:
            spelled = b"".join(
                bytes([alphabet[character]]) if character in alphabet else character.encode() for character in token
            )
        elif not kinds or "WordPiece" in kinds:  # the spaces between words are lost
            prefix = kinds["WordPiece"]["prefix"] if kinds else None
            inner = prefix is not None and token.startswith(prefix)
            spelled = token.removeprefix(prefix).encode() if inner and prefix else token.encode()
            return (spelled if inner else b" " + spelled), len(spelled)
        elif "BPEDecoder" in kinds:
            suffix = kinds["BPEDecoder"]["suffix"]
            spelled = token.removesuffix(suffix).encode()
            return (spelled + b" " if token.endswith(suffix) else spelled), len(spelled)
        elif "ByteFallback" in kinds and (match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            spelled = bytes.fromhex(match[1])
        else:
            for mark, text in spaces.items():
                token = token.replace(mark, text)
            spelled = token.encode()
        return spelled, len(spelled)

    return spell


TOKENIZERS: dict[str, type[Tokenizer]] = {"gpt2": GPT2, "bytes": Bytes, "text8": Text8}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def get_tokenizer(source: str) -> Tokenizer:
    """The tokeniser of that name, or one of the Hugging Face ``tokenizers`` library.

    Args:
        source: "gpt2", "bytes", "text8"; or a ``tokenizer.json``, a folder with one, or the name of a repository of
            the Hugging Face hub with one. The ``eos_token`` of a ``tokenizer_config.json`` beside it is end-of-text.

    Raises:
        FileNotFoundError: If there is no such file, folder or repository, or no tokenizer.json in it.
        ConnectionError: If it must be a repository, and the hub cannot be reached.
        ValueError: If a file is damaged, or not of a kind that can be used.
        ImportError: For "gpt2" without tiktoken; for a tokenizer.json without ``tokenizers``.
        RuntimeError: For "gpt2" if its ranks can neither be read from tiktoken's cache nor downloaded.
    """
    return _named_tokenizer(source) if source in TOKENIZERS else _read_tokenizer(_tokenizer_file(source))


@cache
def _named_tokenizer(name: str) -> Tokenizer:
    return TOKENIZERS[name]()


def _read_tokenizer(path: Path) -> Tokenizer:
    beside = path.with_name(TOKENIZER_FILES[1])
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        end = config.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        if not isinstance(end, str | None):
            raise ValueError(f"eos_token: expected a text, got {end!r}")
    except (AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"tokenizer: {path.parent}: {error}") from error
    try:
        return _json_tokenizer(text, end)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from error


def _tokenizer_file(source: str) -> Path:
    """The ``tokenizer.json`` that a source means, downloaded if it is a repository of the hub."""
    path = Path(source).expanduser()
    known = f"{', '.join(TOKENIZERS)}, a tokenizer.json, a folder with one, or a repository of the Hugging Face hub"
    if not path.exists():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) or path.suffix == ".json":
            raise FileNotFoundError(f"tokenizer: expected {known}; got {source!r}, and there is no such file or folder")
        path = _download(source, known)
    if path.is_dir():
        path = path / TOKENIZER_FILES[0]
        if not path.is_file():
            raise FileNotFoundError(
                f"tokenizer: {source} has no tokenizer.json. Other formats can be converted: "
                f"transformers.AutoTokenizer.from_pretrained({source!r}).save_pretrained('FOLDER') writes one"
            )
    return path


def _download(name: str, known: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"tokenizer: downloading needs huggingface_hub: {pip_install('train', 'huggingface_hub')}"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"tokenizer: expected {known}; got {name!r}, and the hub has none: {error}") from error
    except OSError as error:
        raise ConnectionError(
            f"tokenizer: expected {known}; got {name!r}, which is no file or folder here, and the hub could not be "
            f"reached ({type(error).__name__}: {error})"
        ) from error


def count_bytes(tokens: Any, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that `tokens` stand for: the denominator of bits per byte.

    End-of-text counts nothing. Its bits are still paid for, so a figure per byte errs upwards, never downwards. A byte
    of text8 is a character.

    Args:
        tokens: Ids of ordinary tokens and end-of-text, an integer tensor or array of any shape.
        tokenizer: What made them.

    Raises:
        ValueError: If a token is out of range (MASK stands for no text).
    """
    ids = np.asarray(tokens)
    if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        raise ValueError(
            f"tokens: ids from {ids.min()} to {ids.max()} given; {tokenizer.name} has 0 to {tokenizer.vocab_size - 1}"
        )
    return int(tokenizer.byte_lengths()[ids].sum())
