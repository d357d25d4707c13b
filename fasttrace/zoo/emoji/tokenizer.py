"""A CLIP tokenizer made for the captions: every caption word is one token, anything else falls back to byte pieces.

The merges are learnt from the captions' own words by plain byte-pair encoding, run until each word is whole, so the
result is an ordinary ``vocab.json`` and ``merges.txt`` that ``CLIPTokenizer`` reads.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from .data import corpus

MAX_LENGTH = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_END = "</w>"


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (ties by spelling), until every word is one piece."""
    split = [[*word[:-1], word[-1] + _END] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in split):
        pairs = Counter(pair for pieces in split for pair in itertools.pairwise(pieces))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_merge(pieces, best) for pieces in split]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def build_tokenizer(folder: Path) -> Any:
    """Write ``vocab.json`` and ``merges.txt`` to ``folder``; returns the ``CLIPTokenizer`` made of them."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    words = [word for text in corpus() for word in re.findall(r"\w+|[^\w\s]", text)]
    merges = learn_merges(words)
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + _END for letter in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH}
    settings |= {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
