"""Tokens to text: no character is ever split, and no cut into calls changes what comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from countersign.services.engine.errors import CheckpointError
from countersign.services.engine.text import MAX_OPEN_TOKENS, Released, StopMatcher, Tokenizer

END = "<|endoftext|>"
CORPUS = [
    "def quicksort(items):\n    return items\n",
    "the quick brown fox jumps over the lazy dog, 中文字符中文字符, 😀😃😄😀😃😄, naïve café, naïve café\r\n",
] * 4


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen: tokens are runs of bytes, some across and some inside characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral: a space is U+2581, one is put before the text, unknown characters go by byte tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    # The trainer marks all of them special; in a real file only the first few are.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:2]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def metaspace() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", END], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


FAMILIES = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, make in FAMILIES.items():
        made[name] = tmp_path_factory.mktemp(name)
        make().save(str(made[name] / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def byte(folders: dict[str, Path]) -> Tokenizer:
    return Tokenizer(folders["byte_level"])


@pytest.fixture(scope="module", params=list(FAMILIES))
def any_family(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    folder = folders[request.param]
    return Tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token a byte, whatever the bytes."""
    table = {
        tokenizer._bytes.of(i, True): i
        for i in range(tokenizer.vocabulary_size)
        if len(tokenizer._bytes.of(i, True)) == 1
    }
    return [table[bytes([value])] for value in data]


def id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer._tokenizer.token_to_id(token)
    assert found is not None
    return found


def decode_in_calls(tokenizer: Tokenizer, ids: Sequence[int], sizes: Sequence[int], context: int) -> list[str]:
    """As the router does it: what is not consumed is sent again with what follows; only the last few as context."""
    pieces: list[str] = []
    given = 0
    for size in (*sizes, len(ids)):
        given = min(len(ids), given + size)
        done = len(pieces)
        pieces += tokenizer.decode_pieces(ids[max(0, done - context) : done], ids[done:given], given == len(ids))
        if given == len(ids):
            return pieces
    raise AssertionError("the last call is final")


cuts = st.lists(st.integers(0, 6), max_size=12)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=cuts)
def test_the_pieces_of_any_ids_do_not_depend_on_how_they_are_cut(
    any_family: tuple[Tokenizer, tokenizers.Tokenizer], data: st.DataObject, sizes: list[int]
) -> None:
    tokenizer, _ = any_family
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1), max_size=25))
    whole = tokenizer.decode_pieces((), ids, final=True)
    assert len(whole) == len(ids)
    assert decode_in_calls(tokenizer, ids, sizes, context=len(ids)) == whole


def test_each_token_has_the_text_that_the_library_gives_it(
    any_family: tuple[Tokenizer, tokenizers.Tokenizer],
) -> None:
    tokenizer, library = any_family
    before = tokenizer.encode("the", plain=True)
    for token in range(tokenizer.vocabulary_size):
        assert tokenizer.decode([token]) == library.decode([token])
        assert tokenizer.decode([*before, token]) == library.decode([*before, token])


def test_an_added_token_outside_the_byte_alphabet_is_plain_text(tmp_path: Path) -> None:
    library = byte_level()
    library.add_tokens(["  <sep> 中"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("a  <sep> 中b", plain=True)
    assert len(ids) == 3
    assert tokenizer.decode(ids) == library.decode(ids) == "a  <sep> 中b"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=cuts)
def test_the_last_few_tokens_are_context_enough(byte: Tokenizer, data: st.DataObject, sizes: list[int]) -> None:
    raw = data.draw(
        st.lists(st.sampled_from([b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xe4\xb8", b"\xad", b"a", b"\xff"]))
    )
    ids = byte_ids(byte, b"".join(raw))
    assert decode_in_calls(byte, ids, sizes, context=MAX_OPEN_TOKENS + 1) == byte.decode_pieces((), ids, final=True)


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=24))
def test_malformed_bytes_decode_as_the_library_decodes_them(
    byte: Tokenizer, folders: dict[str, Path], raw: bytes
) -> None:
    library = tokenizers.Tokenizer.from_file(str(folders["byte_level"] / "tokenizer.json"))
    ids = byte_ids(byte, raw)
    assert byte.decode(ids) == library.decode(ids) == raw.decode("utf-8", "replace")


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(
        st.sampled_from("ab ▁\n\r\t\0é中文😀\u0301\u200d🏽") | st.characters(exclude_categories=["Cs"]), max_size=20
    )
)
def test_unicode_text_comes_back_as_it_was(any_family: tuple[Tokenizer, tokenizers.Tokenizer], text: str) -> None:
    tokenizer, library = any_family
    ids = tokenizer.encode(text, plain=True)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == library.decode(ids)
    if library.decoder is not None and "ByteLevel" in repr(library.decoder):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["😀", "中文", "e\u0301", "a\r\nb", "\0", "👩‍👩‍👧‍👦", "\ufffd"])
def test_every_piece_ends_at_a_character(byte: Tokenizer, text: str) -> None:
    ids = byte_ids(byte, text.encode())
    pieces = byte.decode_pieces((), ids, final=False)
    assert "".join(pieces) == text
    expected = [
        character if i == last else ""
        for character in text
        for last in [len(character.encode()) - 1]
        for i in range(last + 1)
    ]
    assert pieces == expected


def test_an_open_character_is_not_consumed_until_it_is_complete(byte: Tokenizer) -> None:
    ids = byte_ids(byte, "a😀b".encode())
    assert byte.decode_pieces((), ids[:3], final=False) == ["a"]
    assert byte.decode_pieces(ids[:1], ids[1:4], final=False) == []
    assert byte.decode_pieces(ids[:1], ids[1:], final=False) == ["", "", "", "😀", "b"]


def test_at_the_end_an_open_character_becomes_one_replacement_character(byte: Tokenizer) -> None:
    assert byte.decode_pieces((), byte_ids(byte, b"a\xf0\x9f\x98"), final=True) == ["a", "", "", "\ufffd"]


def test_an_end_of_text_token_has_no_text_and_does_not_close_a_character(byte: Tokenizer) -> None:
    end = byte.encode(END, plain=True)
    assert end == [0]
    first, *rest = byte_ids(byte, "é".encode())
    assert byte.decode_pieces((), [*end, first, *end, *rest, *end], final=False) == ["", "", "", "é", ""]


def test_a_character_that_never_closes_is_given_up(byte: Tokenizer) -> None:
    ids = [*byte_ids(byte, b"\xf0\x9f"), 0, 0, 0]
    assert byte.decode_pieces((), ids[:4], final=False) == []
    assert byte.decode_pieces((), ids, final=False) == ["", "", "", "", "\ufffd"]
    assert byte.decode_pieces(ids, byte_ids(byte, b"\x98b"), final=False) == ["\ufffd", "b"]


def test_a_long_run_of_tokens_across_characters_does_not_wait_for_its_end(tmp_path: Path) -> None:
    to_char = {byte: char for char, byte in _alphabet().items()}
    vocabulary = {END: 0} | {char: i + 1 for i, char in enumerate(sorted(_alphabet()))}
    vocabulary["".join(to_char[b] for b in b"\xb8\xad\xe4")] = straddle = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path)
    first, second, third = (vocabulary[to_char[byte]] for byte in "中".encode())
    run = [first, *[straddle] * 4]
    assert ours.decode_pieces((), [*run, second], final=False) == ["", "中", "中", "中", "中"]
    assert ours.decode_pieces(run, [second, third], final=False) == ["", "中"]


def _alphabet() -> dict[str, int]:
    """GPT-2's table once more, from its definition: the bytes in the order of their stand-ins' code points."""
    chars = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter(b for b in range(256) if chr(b) not in chars)
    return {char: ord(char) if ord(char) < 256 else next(others) for char in chars}


@pytest.mark.parametrize("family", ["sentencepiece", "metaspace"])
def test_only_the_first_token_of_a_text_loses_its_leading_space(folders: dict[str, Path], family: str) -> None:
    tokenizer = Tokenizer(folders[family])
    ids = tokenizer.encode("the", plain=True)
    assert "".join(tokenizer.decode_pieces((), [*ids, *ids], final=True)) == "the the"
    assert "".join(tokenizer.decode_pieces(ids, ids, final=True)) == " the"
    without_text = [id_of(tokenizer, END), tokenizer.vocabulary_size + 1]
    assert "".join(tokenizer.decode_pieces(without_text, ids, final=True)) == "the"


def test_byte_tokens_of_a_sentencepiece_vocabulary_make_one_character(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer(folders["sentencepiece"])
    ids = tokenizer.encode("a\U0001f9ff", plain=True)
    assert [tokenizer._tokenizer.id_to_token(i) for i in ids[-4:]] == ["<0xF0>", "<0x9F>", "<0xA7>", "<0xBF>"]
    assert tokenizer.decode_pieces((), ids, final=False)[-5:] == ["a", "", "", "", "\U0001f9ff"]
    assert tokenizer.decode_pieces(ids[:-4], ids[-4:-1], final=False) == []


def test_encode_adds_the_begin_of_text_token_unless_plain(byte: Tokenizer) -> None:
    assert byte.encode("def") == [0, *byte.encode("def", plain=True)]


def test_a_lone_surrogate_is_no_text(byte: Tokenizer) -> None:
    with pytest.raises(TypeError):
        byte.encode("a\ud800")


def test_canonical_ids_are_what_encode_gives(byte: Tokenizer) -> None:
    ids = byte.encode("the quick 中" + END, plain=True)
    assert byte.canonical(ids) == ids
    assert (
        byte.canonical(byte_ids(byte, b"the quick"))
        == byte.encode("the quick", plain=True)
        != byte_ids(byte, b"the quick")
    )


def test_ids_that_only_pad_the_model_have_no_text(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    alone = Tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 512}))
    padded = Tokenizer(tmp_path)
    assert (alone.vocabulary_size, padded.vocabulary_size) == (330, 512)
    assert padded.decode_pieces((), [*byte_ids(padded, b"a"), 511], final=True) == ["a", ""]


def test_truncation_saved_in_the_file_does_not_cut_a_prompt(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).decode(Tokenizer(tmp_path).encode("zxwvutsrq")) == "zxwvutsrq"


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"model": 1}', b"[]"])
def test_a_folder_without_a_valid_tokenizer_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_decoder_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.CTC()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="CTC"):
        Tokenizer(tmp_path)


def naive_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab中", max_size=4), max_size=12),
    stops=st.lists(st.text("ab中", min_size=1, max_size=4), max_size=4),
)
def test_the_first_stop_string_is_found_whatever_the_pieces(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    steps = [matcher.feed(piece) for piece in pieces]
    released = "".join(step.text for step in steps) + matcher.flush()
    assert (released, matcher.stopped) == naive_stop("".join(pieces), stops)


@settings(max_examples=150, deadline=None)
@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    released = ""
    for i, character in enumerate(text):
        released += matcher.feed(character).text
        if matcher.stopped:
            return
        held = text[len(released) : i + 1]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_the_token_that_completes_the_stop_string_is_the_one_that_stops() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.feed("x = 1") == Released("x = 1", stopped=False)
    assert matcher.feed("\n") == Released("", stopped=False)
    assert matcher.feed("  ") == Released("\n  ", stopped=False)
    assert matcher.feed("y\n\nz") == Released("y", stopped=True)
    assert matcher.feed("more") == Released("", stopped=True)
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
