"""Small tokenizers of every kind, and texts that are hard on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from saved_tiny_model import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "The cat sat on the mat, and it didn't begin to rain.",
    "In 2024 they counted 17 stones (one by one): none of them was heavy!",
    "  Currently, the capital is B.\n\nThe capital is  ",
    "数字 42 和 — «été» naïve Straße жизнь в доме שלום עולם مرحبا",
] * 6
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SPECIAL_NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

HARD = (
    "aB e 7.,'\n\t\N{NO-BREAK SPACE}éßж数שםم😀👩🏽\u200d\N{COMBINING ACUTE ACCENT}"
    "\u1112\u1161\u11ab\N{LATIN SMALL LIGATURE FI}\N{FULLWIDTH LATIN CAPITAL LETTER A}½▁Ġ\u200b"
    "\N{REPLACEMENT CHARACTER}<s>"
)
"""Combining marks, right-to-left letters, emoji with modifiers, what NFKC changes, what tokenizers write themselves."""


def texts(alphabet: str = HARD, **options: Any) -> st.SearchStrategy[str]:
    """Short texts of these characters, words and white space often enough for tokens to straddle."""
    words = ["the cat", " capital", " is", "  ", "\n\n", "😀😀", "e\u0301"]
    pieces = st.one_of(st.sampled_from(alphabet), st.sampled_from([w for w in words if set(w) <= set(alphabet + w)]))
    return st.lists(pieces, **options).map("".join)


def _fast(tokenizer: Tokenizer, side: str = "left") -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=side, **SPECIAL_NAMES)


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level() -> Any:
    """As SmolLM2 has it."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "</s>"
    return tokenizer


def qwen_like() -> Any:
    """Byte-level behind NFC, which joins letters and marks."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.pad_token = "</s>"
    return tokenizer


def roberta_like() -> Any:
    """Byte-level, with a space put before the text and offsets without white space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=True)
    return _fast(tokenizer)


def _byte_fallback(normalizer: Any, pre_tokenizer: Any, decoder: Any) -> Any:
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    plain.normalizer, plain.pre_tokenizer = normalizer, pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False)
    plain.train_from_iterator(CORPUS[:3] * 6, trainer)
    state = json.loads(plain.to_str())["model"]
    vocabulary = dict(state["vocab"])
    for token in fallback:
        vocabulary[token] = len(vocabulary)
    tokenizer.model = models.BPE(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in state["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return _fast(_with_bos(tokenizer))


def llama_like() -> Any:
    """SentencePiece as Llama 2 has it: a space put before the text, bytes for unknown characters."""
    return _byte_fallback(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )


def gemma_like() -> Any:
    """SentencePiece as Gemma has it: no space before the text."""
    return _byte_fallback(
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )


def unigram_nfkc() -> Any:
    """SentencePiece as T5 has it: a unigram model behind NFKC, white space squeezed."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(_with_bos(tokenizer))


def word_piece() -> Any:
    """As BERT has it: lower case, accents stripped, control characters dropped."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return _fast(tokenizer, side="right")


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "Qwen": qwen_like,
    "RoBERTa": roberta_like,
    "Llama": llama_like,
    "Gemma": gemma_like,
    "Unigram with NFKC": unigram_nfkc,
    "WordPiece": word_piece,
}


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, without offsets: every two characters are a token, with ``<s>`` before them."""

    def __init__(self, lower: bool = False, **options: Any) -> None:
        self.lower = lower
        self.pieces: list[str] = list(SPECIAL)
        super().__init__(**{**SPECIAL_NAMES, **options})

    @property
    def vocab_size(self) -> int:
        """Grows with what is tokenised."""
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        """Every piece so far."""
        return {piece: index for index, piece in enumerate(self.pieces)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        text = text.lower() if self.lower else text
        return [text[place : place + 2] for place in range(0, len(text), 2)]

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self.pieces:
            self.pieces.append(token)
        return self.pieces.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joined as they are."""
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, ids: list[int], other: list[int] | None = None) -> list[int]:
        """``<s>`` first."""
        return [1, *ids, *(other or [])]

    def get_special_tokens_mask(
        self, ids: list[int], other: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for ``<s>``."""
        if already_has_special_tokens:
            return [int(token in self.all_special_ids) for token in ids]
        return [1, *[0] * len(ids), *[0] * len(other or [])]
