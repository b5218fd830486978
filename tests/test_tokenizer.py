"""Tokenisers: round trips, placeholders, byte counts, errors."""

import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sedd.tokenizer import EOT_TEXT, GPT2, MASK_TEXT, TOKENIZERS, count_bytes, get_tokenizer

SAMPLES = ["", "Hello, world!\n", "naïve Σ 日本語 🙂", "a\r\n\tb", f"not the token: {EOT_TEXT}"]


@pytest.fixture(scope="module")
def gpt2():
    try:
        return get_tokenizer("gpt2")
    except RuntimeError as error:
        pytest.skip(f"needs the network once, or TIKTOKEN_CACHE_DIR: {error}")


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = get_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert count_bytes(np.array(ids, np.int64), tokenizer) == len(text.encode("utf-8"))


@given(st.lists(st.integers(0, 257)))
def test_bytes_decodes_any_ids(ids):
    text = get_tokenizer("bytes").decode(ids)
    assert text.count(MASK_TEXT) >= ids.count(257)
    assert text.count(EOT_TEXT) >= ids.count(256)


def test_bytes_placeholders_and_broken_utf8():
    tokenizer = get_tokenizer("bytes")
    omega = list("Ω".encode())
    assert tokenizer.decode([104, 257, 105, 256]) == f"h{MASK_TEXT}i{EOT_TEXT}"
    assert tokenizer.decode([omega[0], 257, omega[1]]) == f"\ufffd{MASK_TEXT}\ufffd"
    assert tokenizer.decode(torch.tensor(omega)) == "Ω"


@given(st.lists(st.integers(0, 255)))
def test_bytes_that_are_not_utf8_decode_as_python_does(ids):
    assert get_tokenizer("bytes").decode(ids) == bytes(ids).decode("utf-8", errors="replace")


def test_pieces_of_characters_stand_where_they_are_complete():
    tokenizer = get_tokenizer("bytes")
    omega, mask = list("Ω".encode()), tokenizer.vocab_size
    assert tokenizer.pieces([104, *omega, 105]) == ["h", "", "Ω", "i"]
    assert tokenizer.pieces([mask, omega[1], omega[0], mask]) == [MASK_TEXT, "\ufffd", "\ufffd", MASK_TEXT]
    assert tokenizer.pieces([omega[0], 256, omega[0]]) == ["\ufffd", EOT_TEXT, "\ufffd"]
    assert tokenizer.pieces([omega[0], 105]) == ["", "\ufffdi"]
    assert tokenizer.pieces([]) == []


def test_bytes_of_a_lone_surrogate():
    assert get_tokenizer("bytes").encode("a\udcffb") == [97, 63, 98]


@given(st.text(alphabet=" abcdefghijklmnopqrstuvwxyz"))
def test_text8_round_trip(text):
    tokenizer = get_tokenizer("text8")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert count_bytes(np.array(ids, np.int64), tokenizer) == len(text)


def test_text8_symbols():
    tokenizer = get_tokenizer("text8")
    assert tokenizer.encode(" az") == [0, 1, 26]
    assert tokenizer.decode([1, 27, 2]) == f"a{MASK_TEXT}b"
    assert (tokenizer.vocab_size, tokenizer.eot) == (27, None)


@pytest.mark.parametrize(
    ("text", "bad", "position"), [("ab Cd", "C", 3), ("a\n", "\\n", 1), ("é", "é", 0), ("x9", "9", 1)]
)
def test_text8_names_the_first_bad_character(text, bad, position):
    with pytest.raises(ValueError, match="27 symbols") as caught:
        get_tokenizer("text8").encode(text)
    assert f"'{bad}'" in str(caught.value)
    assert f"at character {position}," in str(caught.value)


@pytest.mark.parametrize("text", SAMPLES)
def test_gpt2_round_trip(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert gpt2.eot not in ids
    assert count_bytes(torch.tensor(ids, dtype=torch.int64), gpt2) == len(text.encode("utf-8"))


def test_gpt2_known_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode([15496, 50256, 995, 50257]) == f"Hello{EOT_TEXT} world{MASK_TEXT}"


def test_gpt2_half_a_character(gpt2):
    ids = gpt2.encode("🙂")
    assert len(ids) > 1
    assert set(gpt2.decode(ids[:1])) == {"\ufffd"}
    assert "".join(gpt2.pieces(ids)) == gpt2.decode(ids)
    assert gpt2.pieces(ids)[0] == ""


def test_gpt2_without_ranks_says_what_to_do(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def fail(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(RuntimeError, match=r"TIKTOKEN_CACHE_DIR.*'bytes'") as caught:
        GPT2()
    assert "no route to host" in str(caught.value)


def test_gpt2_without_tiktoken_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match=r'pip install "sedd_ext\[train\]"'):
        GPT2()


@pytest.mark.parametrize("name", ["bytes", "text8"])
def test_out_of_range_ids(name):
    tokenizer = get_tokenizer(name)
    for token in (-1, tokenizer.vocab_size + 1):
        with pytest.raises(ValueError, match=f"token {token} is out of range"):
            tokenizer.decode([0, token])


def test_count_bytes():
    tokenizer = get_tokenizer("bytes")
    assert count_bytes(torch.tensor([[97, 256], [98, 99]]), tokenizer) == 3
    assert count_bytes(torch.empty(0, dtype=torch.int64), tokenizer) == 0
    for token in (-1, 257):
        with pytest.raises(ValueError, match="bytes has 0 to 256"):
            count_bytes(torch.tensor([97, token]), tokenizer)


def test_registry():
    assert set(TOKENIZERS) == {"gpt2", "bytes", "text8"}
    with pytest.raises(ValueError, match=r"'gtp2'.*'gpt2', 'bytes', 'text8'"):
        get_tokenizer("gtp2")


@pytest.mark.parametrize("name", ["bytes", "text8"])
def test_pickles_by_name(name):
    assert pickle.loads(pickle.dumps(get_tokenizer(name))) is get_tokenizer(name)
