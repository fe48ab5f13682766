"""A Tekken vocabulary written as Hugging Face's `tokenizer.json`."""

from __future__ import annotations

import json

from transformers.convert_slow_tokenizer import bytes_to_unicode

from backend.checkpoint.vocabulary import Vocabulary


def ids_and_merges(vocabulary: Vocabulary) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE: the ids of tokens as text, and every split of every token as a merge, in the order of ids."""
    alphabet = bytes_to_unicode()
    texts = ["".join(alphabet[byte] for byte in token) for token in vocabulary.token_bytes]
    ids = {text: token_id for token_id, text in enumerate(texts) if text}
    merges = [
        (text[:cut], text[cut:])
        for text in ids
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return ids, merges


def tokenizer_json_of(vocabulary: Vocabulary) -> str:
    """The file's text."""
    ids, merges = ids_and_merges(vocabulary)
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": token_id, "content": name, "special": True}
                for token_id, name in enumerate(vocabulary.special_tokens)
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "model": {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": True},
        }
    )
