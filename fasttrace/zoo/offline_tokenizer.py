"""Tokenizers that need no download, made on the spot from common prompt words: CLIP's kind, and T5's.

CLIP's is byte-level byte-pair encoding that ignores case; T5's is SentencePiece's unigram model, which does not, and
whose pieces carry the space before a word instead of the end after it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# Words that should stay whole; anything else splits into shorter pieces, down to single bytes.
COMMON_WORDS = """a an the of in on at with and by to from
photo image picture painting drawing sketch art style portrait view
red orange yellow green blue purple pink brown black white gray golden dark light bright colorful
cat dog horse bird fish apple car house tree flower ball chair table book boat train bus bicycle person man woman child
mountain river sea sky sun moon star city street forest beach snow grass field garden room kitchen
one two three four small large tiny old new young happy sad running sitting standing jumping sleeping eating playing
van gogh monet picasso dali impressionist watercolor oil pencil cartoon realistic abstract high quality detailed
eiffel tower castle bridge church lamp clock phone cup bottle cake pizza banana grape strawberry lemon"""


def offline_tokenizer(vocabulary: int, max_length: int = 77, pad_token: str = EOS, words: str = COMMON_WORDS) -> Any:
    """A ``CLIPTokenizer`` with CLIP's rules (lower case, ``</w>``, start and end of text) and its own merges.

    Args:
        vocabulary: ids in all. The start and end of text take the last two, ``"!"`` takes 0, as in CLIP; ids between
            the learnt tokens and the last two stay unused.
        max_length: the limit, with start and end of text.
        pad_token: the end of text (SD1.x), or ``"!"`` (OpenCLIP's encoders).
        words: what to learn merges from, separated by spaces.
    """
    from transformers import CLIPTokenizer

    tokens, merges = _learn(words.split(), vocabulary - 2)
    table = {token: index for index, token in enumerate(tokens)} | {BOS: vocabulary - 2, EOS: vocabulary - 1}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(table))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
        special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token}
        config = {**special, "model_max_length": max_length, "do_lower_case": True}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        return CLIPTokenizer.from_pretrained(folder)


def offline_sentencepiece(vocabulary: int, max_length: int = 512, words: str = COMMON_WORDS) -> Any:
    """A ``T5Tokenizer`` with T5's rules (``▁`` before words, end of text and no start, padding 0) and its own pieces.

    Args:
        vocabulary: ids in all; those between the pieces and T5's last hundred stay unused.
        max_length: the limit, with the end of text.
        words: that stay whole, separated by spaces; others are split into halves of these and single characters.
    """
    from transformers import T5Tokenizer

    whole = list(dict.fromkeys(words.split()))
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    # A word's score beats that of its parts, and an inner part's that of its characters.
    inner = {word[cut:] for word in whole for cut in (len(word) // 2,) if len(word) >= 6}
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, **{f"▁{word}": -8.0 for word in whole}}
    scores |= {"▁": -9.0, **dict.fromkeys(sorted(inner), -10.0), **dict.fromkeys(characters, -11.0)}
    pieces = list(scores.items())[: vocabulary - 100]
    unused = [(f"<unused_{index}>", -100.0) for index in range(vocabulary - 100 - len(pieces))]
    extra = [(f"<extra_id_{index}>", 0.0) for index in range(99, -1, -1)]
    return T5Tokenizer([*pieces, *unused, *extra], model_max_length=max_length)


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and CLIP's byte-level BPE, ``"!"`` first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    remapped = [chr(256 + n) for n in range(256 - len(printable))]
    return [*map(chr, printable), *remapped]


def _learn(words: Sequence[str], limit: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Byte-pair encoding: merge the most frequent adjacent pair until every word is one token, or ``limit`` is full."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while len(tokens) < limit:
        counts: dict[tuple[str, str], int] = {}
        for piece in pieces:
            for pair in pairwise(piece):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        merged = "".join(best)
        if merged not in tokens:
            tokens.append(merged)
        pieces = [_merge(piece, best, merged) for piece in pieces]
    return tokens, merges


def _merge(piece: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    result: list[str] = []
    for token in piece:
        if result and (result[-1], token) == pair:
            result[-1] = merged
        else:
            result.append(token)
    return result
