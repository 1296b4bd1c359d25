"""Three tiny tokenizers, one per way of turning tokens into text, trained in a blink on a few lines."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "the quick brown fox jumps over the lazy dog, again and again and again",
    "Füße, naïve café, coöperate; Ελληνικά и русский; 日本語のテキスト 한국어",
    "a family: 👩‍👩‍👧‍👦, a flag: 🇳🇿, hearts: ❤️🧡💛",
    "def f(x):\n    return x  +  1\n",
]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's, Llama-3's, Qwen's: a token may end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece's way, as Llama-2's and Gemma's: words carry their space, rare characters are spelt in bytes."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = special + [f"<0x{b:02X}>" for b in range(256)]
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz,.:;é", "▁the", "▁a", "th", "he", "▁t"]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *words])}
    merges = [("t", "h"), ("h", "e"), ("▁", "a"), ("▁", "t"), ("▁t", "he")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """Word pieces, as BERT's: `##` joins, a plain piece gets a space."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=160, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")
