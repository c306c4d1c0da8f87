"""Tokenizer and StreamDecoder: the same bytes whichever way they are asked for."""

from __future__ import annotations

import json
import time

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.errors import ModelError, RequestError
from engine.tokenizer import StreamDecoder, Tokenizer
from tests.fakes import CORPUS, byte_level_folder, sentencepiece_folder

IM_TOKENS = ("<|im_start|>", "<|im_end|>")
PIECES = [
    "a",
    " ",
    "  ",
    "\n",
    "the",
    " quick",
    "你",
    "好",
    "🙂",
    "👩‍💻",
    "e\u0301",
    "ä",
    "<",
    "|",
    "stop",
    "\0",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "bytes": byte_level_folder(root / "bytes", special=IM_TOKENS),
        "prefix": sentencepiece_folder(root / "prefix"),
        "no_prefix": sentencepiece_folder(
            root / "no_prefix", dummy_prefix=False, reserved=IM_TOKENS
        ),
    }


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: Tokenizer.load(folder) for name, folder in folders.items()}


KINDS = ("bytes", "prefix", "no_prefix")
texts = st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=30).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_decoding_an_encoded_text_gives_it_back(loaded, kind, text):
    tokenizer = loaded[kind]
    if kind != "bytes":
        text = text.replace("▁", " ")  # sentencepiece's own sign for a space
    if kind == "prefix":
        text = text.lstrip(" ")  # one space at the start is taken for the one it adds itself
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    joined = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert tokenizer.strip_start(joined.decode()) == text


@pytest.mark.parametrize("kind", ["prefix", "no_prefix"])
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_sentencepiece_file_is_read_as_sentencepiece_reads_it(loaded, folders, kind, text):
    reference = sentencepiece.SentencePieceProcessor(str(folders[kind] / "tokenizer.model"))
    if "\0" in text or "▁" in text:  # sentencepiece itself treats these two apart
        return
    if kind == "prefix":
        text = text.lstrip(" ")  # transformers adds no second space there
    assert loaded[kind].encode(text) == reference.encode(text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_equals_whole_decode_cut_at_the_first_complete_stop(loaded, kind, data):
    tokenizer = loaded[kind]
    ids = data.draw(
        texts.map(tokenizer.encode)
        | st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40)
    )
    whole = tokenizer.decode(ids)
    cuts = st.tuples(st.integers(0, max(0, len(whole) - 1)), st.integers(1, 6))
    inside = cuts.map(lambda cut: whole[cut[0] : cut[0] + cut[1]] or "x")
    stop = tuple(data.draw(st.lists(inside | st.text(min_size=1, max_size=4), max_size=4)))
    decoder = StreamDecoder(tokenizer, stop=stop)
    shown, matched = "", None
    for token_id in ids:
        text, matched = decoder.push(token_id)
        shown += text
        if matched is not None:
            break
    shown += decoder.flush()
    ends = [(whole.find(s) + len(s), -len(s)) for s in stop if s in whole]
    expected = whole if not ends else whole[: min(ends)[0] + min(ends)[1]]
    assert shown == expected


def test_stream_never_shows_part_of_a_character_or_of_a_stop_string(loaded):
    tokenizer = loaded["bytes"]
    ids = tokenizer.encode("hi 👩‍💻 sto stops")
    decoder = StreamDecoder(tokenizer, stop=("stops",))
    chunks = [decoder.push(i) for i in ids]
    assert all("\ufffd" not in text for text, _ in chunks)
    assert "".join(text for text, _ in chunks) == "hi 👩‍💻 sto "
    assert chunks[-1][1] == "stops"
    assert decoder.flush() == ""


def test_stop_string_complete_below_min_new_tokens_is_text_and_a_straddling_one_still_stops(loaded):
    tokenizer = loaded["bytes"]
    decoder = StreamDecoder(tokenizer, stop=("ab",))
    a, b = tokenizer.token_id("a"), tokenizer.token_id("b")
    assert decoder.push(a, may_stop=False) == ("", None)
    assert decoder.push(b, may_stop=False) == ("ab", None)
    assert decoder.push(a, may_stop=False) == ("", None)
    assert decoder.push(b) == ("", "ab")


def test_held_text_is_released_when_the_stop_string_does_not_come(loaded):
    decoder = StreamDecoder(loaded["bytes"], stop=("abcd",))
    pushed = [decoder.push(loaded["bytes"].token_id(c))[0] for c in "abcab"]
    assert "".join(pushed) == "abc"
    assert decoder.flush() == "ab"


def test_stop_string_that_names_a_control_token_matches_the_hidden_token(loaded):
    tokenizer = loaded["bytes"]
    decoder = StreamDecoder(tokenizer, stop=("<|im_end|>", "x<"))
    assert decoder.push(tokenizer.token_id("x")) == ("", None)
    assert decoder.push(tokenizer.control_id("<|im_end|>")) == ("x", "<|im_end|>")


def test_continuing_stream_keeps_the_space_of_its_first_word(loaded):
    tokenizer = loaded["prefix"]
    ids = tokenizer.encode("the dog")
    fresh, going_on = StreamDecoder(tokenizer), StreamDecoder(tokenizer, continues=True)
    assert "".join(fresh.push(i)[0] for i in ids) == "the dog"
    assert "".join(going_on.push(i)[0] for i in ids) == " the dog"


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_text_are_parsed_only_when_asked(loaded, kind):
    tokenizer = loaded[kind]
    for token in tokenizer._control:
        text = f"say {token} now"
        assert tokenizer.control_id(token) in tokenizer.encode(text, parse_special=True)
        plain = tokenizer.encode(text)
        assert not set(plain) & set(tokenizer._control.values())
        assert tokenizer.decode(plain) == text


@pytest.mark.parametrize("kind", KINDS)
def test_marked_text_has_no_seam_beside_plain_strings(loaded, kind):
    tokenizer = loaded[kind]
    eos = tokenizer.special_tokens["eos_token"]
    ids = tokenizer.encode_marked(f"{eos}the \ue000dog{eos}", {"\ue000": eos})
    assert ids.count(tokenizer.control_id(eos)) == 2
    assert tokenizer.decode(ids).strip() == f"the {eos}dog"


def test_marked_text_without_marks_encodes_as_the_backend_does(loaded):
    for tokenizer in loaded.values():
        eos = tokenizer.special_tokens["eos_token"]
        text = f"{eos}the quick{eos} dog"
        forced = tokenizer.encode_marked(text + "\ue000", {"\ue000": "x"})
        assert forced == tokenizer.encode(text + "x", parse_special=True)


def test_unigram_vocabulary_cannot_reach_a_control_token_from_text():
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "</s>ab ▁")]
    backend = Backend(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    from tokenizers import decoders

    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer = Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    )
    ids = tokenizer.encode("a</s>b")
    assert tokenizer.control_id("</s>") not in ids
    assert tokenizer.decode(ids) == "a</s>b"


def test_non_special_added_tokens_stay_ordinary_text(loaded):
    tokenizer = loaded["bytes"]
    think = tokenizer.token_id("<think>")
    assert think in tokenizer.encode("so <think> <|im_end|>")
    assert tokenizer.decode([think]) == "<think>"


def test_byte_fallback_tokens_are_bytes(loaded):
    tokenizer = loaded["prefix"]
    newline = tokenizer.token_id("<0x0A>")
    assert tokenizer.token_bytes(newline) == b"\n"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 100) == b""


def test_eos_ids_join_generation_config_and_tokenizer(tmp_path):
    folder = byte_level_folder(tmp_path, special=IM_TOKENS)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_ids == (7, 9, tokenizer.control_id("<|endoftext|>"))


def test_bos_is_added_once_by_the_tokenizer(loaded):
    tokenizer = loaded["prefix"]
    ids = tokenizer.encode("the dog", add_special_tokens=True)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids == tokenizer.encode_marked("the \ue000", {"\ue000": "dog"}, add_special_tokens=True)


def test_added_tokens_json_follows_the_sentencepiece_ids(tmp_path):
    folder = sentencepiece_folder(tmp_path)
    size = Tokenizer.load(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": size}))
    assert Tokenizer.load(folder).control_id("<image>") == size
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": size + 5}))
    with pytest.raises(ModelError, match="does not follow"):
        Tokenizer.load(folder)


def test_unigram_sentencepiece_file_is_refused_by_kind(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            vocab_size=200,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    with pytest.raises(ModelError, match="not a BPE sentencepiece model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\x00garbage", b'{"version": 1}'])
def test_broken_tokenizer_files_are_named_model_errors(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"\.$"):
        Tokenizer.load(tmp_path)


def test_missing_tokenizer_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="has no tokenizer"):
        Tokenizer.load(tmp_path)


def test_lone_surrogate_is_refused(loaded):
    with pytest.raises(RequestError, match=r"U\+D83D"):
        loaded["bytes"].encode("a\ud83d")


def test_streaming_costs_little_per_token(loaded):
    tokenizer = loaded["bytes"]
    ids = tokenizer.encode("the quick brown fox 你好 " * 400)
    stop = ("\n\nUSER:", "</s>", "quicker than", "browner" * 100)
    decoder = StreamDecoder(tokenizer, stop=stop)
    start = time.thread_time()
    for token_id in ids:
        decoder.push(token_id)
    micros = (time.thread_time() - start) / len(ids) * 1e6
    assert micros < 30, f"{micros:.1f} us a token"
