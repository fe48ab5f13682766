"""Speed of tokenizers with Mistral NeMo's vocabulary, on real text: ours, tiktoken, mistral-common and Hugging Face's tokenizers.

    make bench-tokenizers, or python -m tests.bench.bench_tokenizers [--repeats 5]

Text of corpora.py is cut into documents of about 4,000 characters. Before anything is timed, the ids of each are compared with
ours; the table says on how many documents they differ. Single: one document after the other on one thread. Batched: all at once
by the library's own batch call where it has one, else by a pool of as many threads as cores. Decoding: the ids back to text, one
after the other. Best of the repeats, in megabytes (10^6 bytes) of UTF-8 a second. Writes results/tokenizers.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import tiktoken
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

from backend.text.tokenizer import Tokenizer
from tests.bench.conditions import conditions, write_results
from tests.bench.corpora import corpora
from tests.bench.tables import tokenizers_table
from tests.bench.tekken_folder import tekken_folder

_DOCUMENT_CHARACTERS = 4_000
_MAX_DOCUMENTS = 250
_NUM_THREADS = os.cpu_count() or 1
Ids = list[int]


@dataclass(frozen=True)
class Way:
    """One library: a document to ids and back, and many documents at once."""

    name: str
    encode: Callable[[str], Ids]
    encode_all: Callable[[Sequence[str]], list[Ids]]
    decode: Callable[[Ids], str]


def ways(folder: Path) -> list[Way]:
    """Every library with the vocabulary of the checkpoint in `folder`; ours is first."""
    pool = ThreadPoolExecutor(_NUM_THREADS)
    ours = Tokenizer.from_checkpoint(folder)
    first = ours.vocabulary.num_special_tokens
    encoding = tiktoken.Encoding(
        "tekken",
        pat_str=ours.vocabulary.pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(ours.vocabulary.token_bytes[first:])},
        special_tokens={},
    )
    mistral = Tekkenizer.from_file(folder / "tekken.json")
    hugging_face = convert_tekken_tokenizer(str(folder / "tekken.json")).backend_tokenizer

    def encode(text: str) -> Ids:
        return ours.encode(text, add_bos=False)

    def encode_mistral(text: str) -> Ids:
        ids: Ids = mistral.encode(text, bos=False, eos=False)
        return ids

    return [
        Way("ours", encode, lambda texts: list(pool.map(encode, texts)), ours.decode),
        Way(
            "tiktoken (ranks, without NeMo's ids)",
            encoding.encode_ordinary,
            lambda texts: encoding.encode_ordinary_batch(list(texts), num_threads=_NUM_THREADS),
            encoding.decode,
        ),
        Way(
            "mistral-common",
            encode_mistral,
            lambda texts: list(pool.map(encode_mistral, texts)),
            lambda ids: mistral.decode(ids, special_token_policy=SpecialTokenPolicy.IGNORE),
        ),
        Way(
            "tokenizers",
            lambda text: hugging_face.encode(text, add_special_tokens=False).ids,
            lambda texts: [found.ids for found in hugging_face.encode_batch(list(texts), add_special_tokens=False)],
            lambda ids: hugging_face.decode(ids, skip_special_tokens=False),
        ),
    ]


def megabytes_per_second(action: Callable[[], object], num_bytes: int, repeats: int) -> float:
    """Of the fastest of several runs."""
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return num_bytes / min(taken) / 1e6


def documents() -> dict[str, list[str]]:
    """Documents of each kind of text."""
    found = {}
    for kind, group in groupby(corpora(), key=lambda corpus: corpus.kind):
        text = "\n".join(corpus.text[:400_000] for corpus in group)
        found[kind] = [text[at : at + _DOCUMENT_CHARACTERS] for at in range(0, len(text), _DOCUMENT_CHARACTERS)][
            :_MAX_DOCUMENTS
        ]
    return found


def measure(kinds: dict[str, list[str]], repeats: int) -> list[dict[str, Any]]:
    """A cell for each kind of text and library."""
    cells = []
    with tekken_folder() as folder:
        all_ways = ways(folder)
    for kind, texts in kinds.items():
        num_bytes = sum(len(text.encode()) for text in texts)
        right = [all_ways[0].encode(text) for text in texts]
        for way in all_ways:
            ids = way.encode_all(texts)
            shift = right[0][0] - ids[0][0]
            different = sum([token + shift for token in a] != b for a, b in zip(ids, right, strict=True))
            assert different or [way.decode(each) for each in ids] == texts, f"{way.name} loses text"
            cell: dict[str, Any] = {"kind": kind, "way": way.name, "num_bytes": num_bytes, "num_different": different}
            for name, action in _actions(way, texts, ids).items():
                cell[f"{name}_mb_per_s"] = megabytes_per_second(action, num_bytes, repeats)
            cells.append(cell)
            print(f"{kind}, {way.name}: {cell['single_mb_per_s']:.1f} MB/s, {different} different", file=sys.stderr)
    return cells


def _actions(way: Way, texts: Sequence[str], ids: Sequence[Ids]) -> dict[str, Callable[[], object]]:
    return {
        "single": lambda: [way.encode(text) for text in texts],
        "batched": lambda: way.encode_all(texts),
        "decode": lambda: [way.decode(each) for each in ids],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_tokenizers", allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement; the best counts")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    about = conditions("tests.bench.bench_tokenizers", sys.argv[1:] if argv is None else argv)
    results = about | {"num_threads": _NUM_THREADS, "cells": measure(documents(), arguments.repeats)}
    print(tokenizers_table(results))
    if not arguments.no_results:
        write_results("tokenizers", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
