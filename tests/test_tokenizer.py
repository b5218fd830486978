"""Tokenisers: round trips, placeholders, byte counts, errors."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("datasets")

import tokenizers_made_here
import torch
from datasets.fingerprint import Hasher
from hypothesis import given
from hypothesis import strategies as st

from sedd.data.tokenizer import EOT_TEXT, GPT2, MASK_TEXT, TOKENIZERS, count_bytes, get_tokenizer

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
        with pytest.raises(ValueError, match=f"ids: expected tokens of {name}, .* got {token}"):
            tokenizer.decode([0, token])


def test_count_bytes():
    tokenizer = get_tokenizer("bytes")
    assert count_bytes(torch.tensor([[97, 256], [98, 99]]), tokenizer) == 3
    assert count_bytes(torch.empty(0, dtype=torch.int64), tokenizer) == 0
    for token in (-1, 257):
        with pytest.raises(ValueError, match=f"tokens: expected ids of bytes, 0 to 256, got .*{token}"):
            count_bytes(torch.tensor([97, token]), tokenizer)


def test_registry():
    assert set(TOKENIZERS) == {"gpt2", "bytes", "text8"}


@pytest.mark.parametrize("name", ["bytes", "text8"])
def test_pickles_by_name(name):
    assert pickle.loads(pickle.dumps(get_tokenizer(name))) is get_tokenizer(name)


# -- tokenizer.json ----------------------------------------------------------------------------------------------------


def saved(made, folder, **config):
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("text", [*SAMPLES, "the cat sat on the mats", "<pad>x"])
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_json_round_trip(kind, text, tmp_path):
    """Equal to the library's own decoding, and bytes are counted as the text has them."""
    made = getattr(tokenizers_made_here, kind)()
    tokenizer = get_tokenizer(str(saved(made, tmp_path / "t")))
    ids = tokenizer.encode(text)
    space = " " if kind == "metaspace" and text else ""  # it puts one before the first word
    assert tokenizer.decode(ids) == space + text
    assert made.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.eot not in ids
    assert count_bytes(np.array(ids, np.int64), tokenizer) == len((space + text).encode())
    assert "".join(tokenizer.pieces([*ids, tokenizer.eot, tokenizer.vocab_size])) == space + text + EOT_TEXT + MASK_TEXT


def test_json_word_pieces_lose_spaces_and_unknown_words(tmp_path):
    tokenizer = get_tokenizer(str(saved(tokenizers_made_here.word_piece(), tmp_path / "t")))
    ids = tokenizer.encode("The cats, the dog")
    assert tokenizer.decode(ids) == " the cats , the[UNK]"
    assert count_bytes(np.array(ids), tokenizer) == len("thecats,the"), "never more than there were"
    assert (tokenizer.eot, tokenizer.vocab_size) == (1, 7)


def test_json_end_of_text_is_that_of_the_configuration(tmp_path):
    made = tokenizers_made_here.byte_level()
    plain = get_tokenizer(str(saved(made, tmp_path / "t")))
    other = get_tokenizer(str(saved(made, tmp_path / "t", eos_token={"content": "<pad>"})))
    assert (plain.eot, other.eot) == (0, 1)
    assert plain.name != other.name
    with pytest.raises(ValueError, match=r"expected an eos_token of the vocabulary, got 'nowhere' .*tokenizer.json"):
        get_tokenizer(str(saved(made, tmp_path / "t", eos_token="nowhere")))


def test_json_is_the_same_wherever_it_lies(tmp_path):
    made = tokenizers_made_here.byte_level()
    one, two = (get_tokenizer(str(saved(made, tmp_path / name))) for name in ("a", "b"))
    file = get_tokenizer(str(tmp_path / "a" / "tokenizer.json"))
    assert one.name == two.name == file.name
    assert Hasher.hash(one) == Hasher.hash(two), "the cache of datasets knows it by its content"
    assert Hasher.hash(one) != Hasher.hash(get_tokenizer(str(saved(tokenizers_made_here.metaspace(), tmp_path / "c"))))
    shutil.rmtree(tmp_path / "a")
    assert pickle.loads(pickle.dumps(one)).name == one.name
    assert one.encode("the cat") == two.encode("the cat")


def test_json_of_more_than_65536_tokens(tmp_path):
    tokenizer = get_tokenizer(str(saved(tokenizers_made_here.wide(), tmp_path / "t")))
    assert tokenizer.encode_array("w69999 w1").dtype == np.uint32
    assert tokenizer.encode("w69999 w1") == [69_999, 1]
    assert get_tokenizer(str(saved(tokenizers_made_here.wide(65_536), tmp_path / "u"))).dtype == np.uint16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a tokenizer.json"),
        ("[" * 100_000, "expected a tokenizer.json"),
        (
            '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "decoder": {"type": "CTC", '
            '"pad_token": "a", "word_delimiter_token": "|", "cleanup": true}}',
            "got CTC",
        ),
    ],
    ids=["cut off", "nested", "decoder"],
)
def test_json_that_will_not_do(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        get_tokenizer(str(tmp_path))


def test_a_tokenizer_folder_cannot_execute_code(tmp_path):
    """What transformers would import for trust_remote_code, and pickles, are not looked at."""
    folder = saved(
        tokenizers_made_here.byte_level(),
        tmp_path / "t",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        eos_token="<|endoftext|>",
    )
    canary = f"open({str(tmp_path / 'executed')!r}, 'w')"
    (folder / "evil.py").write_text(canary)
    (folder / "tokenizer.pkl").write_bytes(b"cbuiltins\nexec\n(V" + canary.encode() + b"\ntR.")
    assert get_tokenizer(str(folder)).encode("cat")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer.json in .*AutoTokenizer.*save_pretrained"):
        get_tokenizer(str(folder))
    assert not (tmp_path / "executed").exists()
    assert "evil" not in sys.modules


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"expected gpt2, bytes, text8, a tokenizer.json.*no such file"):
        get_tokenizer(str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"got 'gtp2', but there is no such file or folder"):
        get_tokenizer("gtp2")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path / "hub"))
    saved(tokenizers_made_here.byte_level(), tmp_path / "hub")
    assert get_tokenizer("someone/tokens").eot == 0
