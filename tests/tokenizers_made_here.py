"""Tokenisers of the Hugging Face library, one of each kind, made from a few words: nothing is downloaded."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = ["the cat sat on the mat", "naïve cats, 7 mats"] * 5


def byte_level() -> Tokenizer:
    """Byte-pair encoding as GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<pad>"]
    made.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def metaspace() -> Tokenizer:
    """Pieces with spaces as ▁ and bytes where there is no piece, as Llama's."""
    letters = ["▁", *"acehmnost", "▁the", "▁cat"]
    vocab = {
        piece: i for i, piece in enumerate(["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters])
    }
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("▁c", "a"), ("▁ca", "t")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def word_piece() -> Tokenizer:
    """Lower-case words and their pieces, as BERT's."""
    vocab = {piece: i for i, piece in enumerate(["[UNK]", "[SEP]", "the", "cat", "##s", "mat", ","])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    made.add_special_tokens(["[UNK]", "[SEP]"])
    return made


def wide(size: int = 70_000) -> Tokenizer:
    """A word for each number: more tokens than uint16 has values."""
    made = Tokenizer(models.WordLevel({"</s>": 0} | {f"w{i}": i for i in range(1, size)}, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made
