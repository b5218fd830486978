"""Tokenisers: text to token ids and back.

Three tokenisers have names: ``gpt2`` (byte-pair encoding of GPT-2, 50,257 tokens), ``bytes`` (UTF-8 bytes and
end-of-text) and ``text8`` (the 27 symbols of the text8 benchmark). Any other is read from a ``tokenizer.json`` of the
Hugging Face ``tokenizers`` library: a file, a folder or a repository on the hub. Such a file is data; no code in it or
in its folder is executed or imported. Token ids are in [0, ``vocab_size``). The id ``vocab_size`` is MASK of an
absorbing process; it is not part of the vocabulary and decodes to a visible placeholder.
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
from sedd.options import outside_hint

if TYPE_CHECKING:
    import tiktoken

MASK_TEXT = "█"
EOT_TEXT = "<|endoftext|>"

Tokens = NDArray[np.unsignedinteger[Any]]


class Tokenizer(ABC):
    """Base class of tokenisers.

    Attributes:
        name: Identifier: a name that `get_tokenizer` accepts, or a digest of the tokeniser's files.
        vocab_size: Number of token ids, including end-of-text, without MASK.
        eot: Id of the end-of-text token, or None if the vocabulary has none.
    """

    name: str
    vocab_size: int
    eot: int | None

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The dtype of `encode_array`: uint16 for up to 65,536 tokens, else uint32."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def files(self) -> dict[str, str]:
        """Content of the files to save with a model, by file name; empty for tokenisers that have a name."""
        return {}

    @abstractmethod
    def encode_array(self, text: str) -> Tokens:
        """Token ids of `text` as an array, [n] of `dtype`. Never contains `eot`: its spelling is ordinary text.

        Raises:
            ValueError: If `text` has characters outside the vocabulary.
        """

    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """Number of UTF-8 bytes of text per token, [vocab_size] int64; 0 for end-of-text, which is not text."""

    @abstractmethod
    def _token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of an ordinary token; they may end within a character."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as a list; see `encode_array`."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids.

        Decodes any sequence of ids, also an intermediate sample: bytes that are not UTF-8 become U+FFFD, MASK becomes
        ``█`` and end-of-text becomes ``<|endoftext|>``.

        Args:
            ids: Token ids, 0 ≤ id ≤ vocab_size: a list, an array or a one-dimensional tensor.

        Raises:
            ValueError: If an id is out of range.
        """
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Text that each token adds to `decode`; a character of several tokens belongs to the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces: list[str] = []
        for token in map(int, ids):
            if token != self.eot and 0 <= token < self.vocab_size:
                pieces.append(decoder.decode(self._token_bytes(token)))
                continue
            if token not in (self.eot, self.vocab_size):
                raise ValueError(
                    f"ids: expected tokens of {self.name}, 0 to {self.vocab_size - 1}, or {self.vocab_size} for MASK; "
                    f"got {token}"
                )
            if pieces:  # no character continues after this token
                pieces[-1] += decoder.decode(b"", final=True)
            pieces.append(EOT_TEXT if token == self.eot else MASK_TEXT)
        if pieces:
            pieces[-1] += decoder.decode(b"", final=True)
        return pieces

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[str | None, ...]]:
        # Worker processes and the cache of `datasets` need only the name, not the tables.
        return get_tokenizer, (self.name,)


class Bytes(Tokenizer):
    """UTF-8 bytes, 0 to 255, and end-of-text, 256."""

    name = "bytes"
    vocab_size = 257
    eot: int | None = 256

    def encode_array(self, text: str) -> Tokens:  # noqa: D102
        # A lone surrogate (from an invalid command line or JSON) cannot be encoded as UTF-8: it becomes "?".
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
                f"text: expected the 27 symbols of text8 (a to z and the space), got {bad[0]!r} (U+{ord(bad[0]):04X}) "
                f"at character {bad.start()}, in {near!r}. Convert the text (lower case, digits spelled out, spaces "
                "for all other characters), or use the tokeniser 'bytes'"
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
        """Load the ranks from the cache of tiktoken or from the network.

        Raises:
            ImportError: If tiktoken is not installed.
            RuntimeError: If the ranks are not cached and cannot be downloaded.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(
                f"the tokeniser 'gpt2' needs tiktoken: {pip_install('train', 'tiktoken')} (or use 'bytes')"
            ) from error
        try:
            # r50k_base has the ranks of "gpt2" in a single file, so that a cache folder can be copied.
            self._encoding: tiktoken.Encoding = tiktoken.get_encoding("r50k_base")
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"could not load the ranks of the tokeniser 'gpt2' ({type(error).__name__}: {error}). Connect to the "
                "network, so that tiktoken can download them once; or set TIKTOKEN_CACHE_DIR to a copy of the cache "
                "folder of another machine; or use the tokeniser 'bytes', which needs no file"
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
    """A tokeniser of the Hugging Face ``tokenizers`` library, from the content of its ``tokenizer.json``.

    Special tokens do not represent text: text that spells one is encoded as ordinary text, and `byte_lengths` is 0 for
    special tokens and for the token of unknown characters. If a tokeniser drops or changes characters (for example to
    lower case), `byte_lengths` counts the bytes that remain; spaces between words that it drops are not counted. Bits
    per byte are then too high, never too low. If a tokeniser inserts a space before the first word of a text, each
    document counts one byte more.

    Args:
        text: Content of ``tokenizer.json``.
        eot_text: The token that ends a document. None: the first of `ENDS` that is in the vocabulary.

    Raises:
        ImportError: If ``tokenizers`` is not installed.
        ValueError: If the text is not a tokeniser, or its decoder is not supported; if `eot_text` is not in the
            vocabulary, or the vocabulary has no token that can end a document.
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
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f"tokenizer: expected a tokenizer.json of the tokenizers library, got: {error}") from error
        self._parsed.no_truncation()
        self._parsed.no_padding()
        self._parsed.encode_special_tokens = True
        ids: dict[str, int] = self._parsed.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if eot_text is None:
            eot_text = next((end for end in self.ENDS if end in ids), None)
        elif eot_text not in ids:
            raise ValueError(f"tokenizer: expected an eos_token of the vocabulary, got {eot_text!r}")
        self.eot = None if eot_text is None else ids[eot_text]
        if eot_text is None and not len(self.encode_array(" ")):
            raise ValueError(
                f"tokenizer: expected a token that ends a document ({', '.join(self.ENDS)}, or the eos_token of a "
                "tokenizer_config.json in the same folder) or a token for a space, got neither"
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
        """``tokenizer.json`` unchanged, and a ``tokenizer_config.json``, so that transformers can load both."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eot_text}
        return {TOKENIZER_FILES[0]: self._text, TOKENIZER_FILES[1]: json.dumps(config, indent=2) + "\n"}

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[str | None, ...]]:
        # The cache of `datasets` hashes the content, so that the location of the file does not matter.
        return _json_tokenizer, (self._text, self._eot_text)


@cache
def _json_tokenizer(text: str, eot_text: str | None) -> Tokenizer:
    return JsonTokenizer(text, eot_text)


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _speller(decoder: dict[str, Any] | None) -> Callable[[str], tuple[bytes, int]]:
    """Function from a token to its bytes and the number of bytes that count, for a ``tokenizer.json`` decoder."""
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
    """Returns a tokeniser by name, or reads one of the Hugging Face ``tokenizers`` library.

    Args:
        source: "gpt2", "bytes" or "text8"; or a ``tokenizer.json``, a folder that contains one, or a repository on the
            Hugging Face hub that contains one. If a ``tokenizer_config.json`` is in the same folder, its ``eos_token``
            is end-of-text.

    Raises:
        FileNotFoundError: If there is no such file, folder or repository, or it contains no tokenizer.json.
        ConnectionError: If there is no such file or folder, and the hub cannot be reached.
        ValueError: If a file is damaged or its tokeniser is not supported.
        ImportError: For "gpt2" without tiktoken; for a tokenizer.json without ``tokenizers``.
        RuntimeError: For "gpt2", if its ranks are not in the cache of tiktoken and cannot be downloaded.
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
            raise ValueError(f"eos_token: expected a string, got {end!r}")
    except (AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"tokenizer: {path.parent}: {error}") from error
    try:
        return _json_tokenizer(text, end)
    except ValueError as error:
        raise ValueError(f"{error} (in {path})") from error


def _tokenizer_file(source: str) -> Path:
    """Path of the ``tokenizer.json`` of a source, downloaded if the source is a repository on the hub."""
    path = Path(source).expanduser()
    known = f"{', '.join(TOKENIZERS)}, a tokenizer.json, a folder with one, or a repository on the Hugging Face hub"
    if not path.exists():
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) or path.suffix == ".json":
            missing = outside_hint(source) or ", but there is no such file or folder"
            raise FileNotFoundError(f"tokenizer: expected {known}; got {source!r}{missing}")
        path = _download(source, known)
    if path.is_dir():
        path = path / TOKENIZER_FILES[0]
        if not path.is_file():
            raise FileNotFoundError(
                f"tokenizer: expected a tokenizer.json in {source}, got none. To convert another format: "
                f"transformers.AutoTokenizer.from_pretrained({source!r}).save_pretrained('FOLDER')"
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
        raise FileNotFoundError(f"tokenizer: expected {known}; got {name!r}, but the hub has none: {error}") from error
    except OSError as error:
        raise ConnectionError(
            f"tokenizer: expected {known}; got {name!r}, but there is no such file or folder, and the hub cannot be "
            f"reached ({type(error).__name__}: {error})"
        ) from error


def count_bytes(tokens: Any, tokenizer: Tokenizer) -> int:
    """Number of UTF-8 bytes of the text that `tokens` represent: the denominator of bits per byte.

    End-of-text counts as 0 bytes, but its likelihood is included in the numerator: bits per byte are too high rather
    than too low. For text8 a byte is a character.

    Args:
        tokens: Ids of ordinary tokens and end-of-text, an integer tensor or array of any shape.
        tokenizer: Their tokeniser.

    Raises:
        ValueError: If a token is out of range (MASK does not represent text).
    """
    ids = np.asarray(tokens)
    if ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        raise ValueError(
            f"tokens: expected ids of {tokenizer.name}, 0 to {tokenizer.vocab_size - 1}, got {ids.min()} to {ids.max()}"
        )
    return int(tokenizer.byte_lengths()[ids].sum())
