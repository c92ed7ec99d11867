"""The text and the class of tokens, in the three families of tokenizers, and robust z-scores."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from attnrb.analysis import (
    TOKEN_CLASSES,
    describe_tokens,
    expected_attention,
    outlier_scores,
    robust_z_scores,
    token_texts,
)
from attnrb.text.function_words import FUNCTION_WORDS
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_tiny_model import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The cat sat on the mat, and it didn't begin to rain.",
    "In 2024 they counted 17 stones; none of them was heavy!",
    "begin beginning within into the therefore however",
    "数字 42 和 \N{FULLWIDTH DIGIT TWO} — «été» naïve Straße жизнь в доме",
] * 6
SPECIAL = ["<unk>", "<s>", "</s>"]


def _byte_level() -> Any:
    return tiny_tokenizer()


def _sentencepiece() -> Any:
    """As Llama 2 has it: metaspaces, byte fallback, and a decoder that drops the first space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    # Words as pieces, so that merges stop at spaces as SentencePiece's do.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(CORPUS, trainer)
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _wordpiece() -> Any:
    """As BERT has it, lower case included."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


FAMILIES = {"byte-level BPE": _byte_level, "SentencePiece": _sentencepiece, "WordPiece": _wordpiece}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


def classes_of_letters(tokenizer: Any, text: str) -> list[tuple[str, str]]:
    """Every visible character of the text with the class of its token."""
    tokens = describe_tokens(tokenizer, tokenizer(text)["input_ids"])
    return [
        (character, token.token_class)
        for token in tokens
        if token.token_class != "special"
        for character in token.text
        if not character.isspace()
    ]


def test_words_have_the_class_of_the_whole_word_however_they_are_cut(tokenizer: Any) -> None:
    text = "the cat didn't begin in 2024, it is within 17 stones!"
    function, digits, punctuation = {"the", "didn't", "in", "it", "is", "within"}, {"2024", "17"}, {",", "!"}
    expected = []
    for word in text.replace(",", " ,").replace("!", " !").split():
        kind = "function_word" if word in function else "digit" if word in digits else "content"
        expected += [(character, "punctuation" if word in punctuation else kind) for character in word]
    assert classes_of_letters(tokenizer, text) == expected


def test_special_tokens_are_special_and_named(tokenizer: Any) -> None:
    special = [id_ for id_ in tokenizer.all_special_ids if id_ != tokenizer.unk_token_id]
    tokens = describe_tokens(tokenizer, [special[0], *tokenizer("cat", add_special_tokens=False)["input_ids"]])
    assert tokens[0].token_class == "special"
    assert tokens[0].text == tokenizer.convert_ids_to_tokens(special[0])
    assert {token.token_class for token in tokens[1:]} == {"content"}


@pytest.mark.parametrize("make", [_byte_level, _sentencepiece])
def test_texts_join_to_the_text(make: Any) -> None:
    tokenizer = make()
    text = "The cat\n\n  sat — 数字 ² été, “x” \N{GRINNING FACE} e\N{COMBINING ACUTE ACCENT}\tend "
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)).removeprefix(" ") == text


@settings(max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=40))
def test_any_text_joins_in_byte_level_bpe(text: str) -> None:
    ids = BYTE_LEVEL(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(BYTE_LEVEL, ids)) == text
    assert {token.token_class for token in describe_tokens(BYTE_LEVEL, ids)} <= set(TOKEN_CLASSES)


BYTE_LEVEL = tiny_tokenizer()


def test_a_character_of_several_tokens_has_one_class_and_one_text() -> None:
    ids = BYTE_LEVEL("数", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    tokens = describe_tokens(BYTE_LEVEL, ids)
    assert [token.text for token in tokens] == ["数", "", ""]
    assert {token.token_class for token in tokens} == {"content"}


def test_half_a_character_is_told_as_such() -> None:
    ids = BYTE_LEVEL("数", add_special_tokens=False)["input_ids"][:2]
    assert [token.text for token in describe_tokens(BYTE_LEVEL, ids)] == ["\N{REPLACEMENT CHARACTER}"] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n", "whitespace"),
        ("\t \N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}", "whitespace"),
        ("\N{ZERO WIDTH SPACE}", "whitespace"),
        ("...", "punctuation"),
        ("。", "punctuation"),
        ("$", "punctuation"),
        ("\N{GRINNING FACE}", "punctuation"),
        ("7", "digit"),
        ("½", "digit"),
        ("٣", "digit"),
        ("Ⅳ", "digit"),
        ("mp3", "content"),
        ("naïve", "content"),
        ("жизнь", "content"),
        ("हिन्दी", "content"),
        ("The", "function_word"),
        ("DON\N{RIGHT SINGLE QUOTATION MARK}T", "function_word"),
        ("isn't", "function_word"),
        ("thesis", "content"),
        ("_", "punctuation"),
    ],
)
def test_classes_are_unicode_aware(text: str, expected: str) -> None:
    tokens = describe_tokens(BYTE_LEVEL, BYTE_LEVEL(text, add_special_tokens=False)["input_ids"])
    letters = {token.token_class for token in tokens if not (expected == "content" and token.text.isdigit())}
    assert letters == {expected}


def test_function_words_of_another_language() -> None:
    ids = BYTE_LEVEL("der Stein und the", add_special_tokens=False)["input_ids"]
    tokens = describe_tokens(BYTE_LEVEL, ids, function_words=["der", "UND"])
    function = "".join(token.text for token in tokens if token.token_class == "function_word")
    assert function.replace(" ", "") == "derund"


def test_function_words_are_lower_case_words() -> None:
    assert all(word == word.casefold() and word.replace("'", "").isalpha() for word in FUNCTION_WORDS)


def test_robust_z_scores_are_those_of_the_book() -> None:
    x = np.array([2.0, 3.0, 3.5, 4.0, 9.0])
    # Median 3.5, deviations 1.5, 0.5, 0, 0.5, 5.5, MAD 0.5; the book's factor 0.6745 is 1 / 1.4826.
    expected = 0.6745 * (x - 3.5) / 0.5
    np.testing.assert_allclose(robust_z_scores(np.exp(x)), expected, rtol=1e-4)
    np.testing.assert_allclose(robust_z_scores(np.exp([x, x])), [expected, expected], rtol=1e-4)


def test_robust_z_scores_without_spread() -> None:
    assert robust_z_scores(np.full(9, 0.25)).tolist() == [0.0] * 9
    scores = robust_z_scores(np.array([1.0] * 9 + [np.e]))  # MAD 0, mean deviation 0.1
    np.testing.assert_allclose(scores, [0.0] * 9 + [1 / 0.125331], rtol=1e-4)
    assert np.isfinite(robust_z_scores(np.array([0.0, 0.5, 0.25]))).all()


def near(length: int, heads: int, seed: int) -> Any:
    """What tokens receive from attention that depends on nearness alone, with some noise: ``[heads, length]``.

    Every row is a distribution over the keys before it that falls with the distance as d^-1.
    """
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    scores = np.where(distance >= 0, -np.log(1.0 + np.maximum(distance, 0)), -np.inf)
    noise = 0.3 * np.random.default_rng(seed).standard_normal((heads, 1, length))
    weights = np.exp(scores + noise)
    weights /= weights.sum(2, keepdims=True)
    return weights.sum(1) / np.arange(length, 0, -1)


@pytest.mark.parametrize("seed", range(3))
def test_the_end_of_a_text_has_no_more_outliers_than_its_share(seed: int) -> None:
    received = near(700, 6, seed)
    received[:, 250] *= 40  # a sink
    marked = outlier_scores(received) > 3.5
    assert marked[:, 250].all()
    last = marked[:, 630:].sum() / max(1, marked.sum())
    # Without the expectation nearly all marks are there.
    blind = robust_z_scores(received) > 3.5
    assert last <= 2 * 0.1 < blind[:, 630:].sum() / blind.sum()


def resistant_line(seen_by: Any, x: Any, at: float) -> float:
    """Tukey's resistant line through ``x`` over ln ``seen_by``, read at ln ``at``."""
    t, third = np.log(seen_by), len(x) // 3
    slope = (np.median(x[-third:]) - np.median(x[:third])) / (np.median(t[-third:]) - np.median(t[:third]))
    return float(slope * np.log(at) + np.median(x - slope * t))


def test_expected_attention_is_a_line_through_tokens_alike() -> None:
    length = 400
    received = np.exp(np.random.default_rng(1).standard_normal((2, 3, length)))
    expected = expected_attention(received)
    assert expected.shape == received.shape
    seen_by = np.arange(length, 0, -1)
    for at, alike in ((1, slice(-32, None)), (400, slice(0, length - 282))):  # the ends are not read in between
        for row, found in zip(received.reshape(6, -1), expected.reshape(6, -1), strict=True):
            value = resistant_line(seen_by[alike], np.log(row[alike]), at)
            np.testing.assert_allclose(np.log(found[length - at]), value, rtol=1e-9, atol=1e-12)
    # What follows a power of the number of queries is expected exactly, but for tokens that are outliers.
    power = np.arange(length, 0, -1.0) ** -0.7
    power[100] = 5
    np.testing.assert_allclose(np.delete(expected_attention(power) / power, 100), 1, rtol=0.02)
    assert outlier_scores(power)[100] > 3.5
    # A factor on all tokens is a factor on what is expected, and no score changes.
    np.testing.assert_allclose(expected_attention(7 * received), 7 * expected, rtol=1e-12)
    np.testing.assert_allclose(outlier_scores(7 * received), outlier_scores(received), rtol=1e-9, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_expected_attention_of_any_length(length: int, seed: int) -> None:
    received = np.random.default_rng(seed).random((2, length)) * (np.arange(length) != length // 2)
    expected = expected_attention(received)
    assert expected.shape == received.shape and (expected > 0).all() and np.isfinite(expected).all()
    assert np.isfinite(outlier_scores(received)).all()
    if length < 12:
        floor = np.finfo(np.float32).tiny
        median = np.exp(np.median(np.log(np.maximum(received, floor)), axis=1, keepdims=True))
        np.testing.assert_allclose(expected, np.broadcast_to(median, received.shape), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_folder")
def test_marks_on_the_licence_do_not_pile_up_at_its_end() -> None:
    from attnrb.analysis import analyze
    from attnrb.models import load

    model, tokenizer = load()
    text = (REPOSITORY / "LICENSE").read_text("utf-8")
    report = analyze(model, tokenizer, text, max_tokens=1024)
    received = report.before.received[0].astype(np.float64)
    for rows in (received, received.mean(axis=1)):  # single heads, and the means that the page shows first
        marked = outlier_scores(rows) > report.z_threshold
        assert marked[..., int(0.9 * marked.shape[-1]) :].sum() <= 2 * 0.1 * marked.sum()
    assert (outlier_scores(received.mean(axis=1))[12:, 0] > report.z_threshold).all()  # the sink is still one
