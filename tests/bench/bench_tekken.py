"""Tekken's tokens per text against the SentencePiece of Mistral's models before it: what was claimed, and what is measured.

    make bench-tokenizers, or python -m tests.bench.bench_tekken

Claim: Mistral AI's announcement <https://mistral.ai/news/mistral-nemo> says that Tekken is about 30 % more efficient for source
code and seven languages, 2 times for Korean, 3 times for Arabic, against "the SentencePiece tokenizer used in previous Mistral
models". Measured: tokens of that SentencePiece (v3, 32,768 ids, as mistral-common ships it) to one token of Tekken, on the text
of corpora.py. Writes results/tekken.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mistral_common

from backend.text.tokenizer import Tokenizer
from tests.bench.conditions import PROJECT, conditions, write_results
from tests.bench.corpora import Corpus, corpora
from tests.bench.tables import tekken_table
from tests.bench.tekken_folder import tekken_folder

CLAIMS = {"Korean": 2.0, "Arabic": 3.0}
OTHER_CLAIM = 1.3
_SENTENCE_PIECE = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


def sentence_piece_counts(texts: Sequence[str], python: Path) -> list[int]:
    """Tokens of each text by Mistral's v3 SentencePiece."""
    command = [str(python), str(Path(__file__).with_name("count_sentencepiece.py")), str(_SENTENCE_PIECE)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    counts: list[int] = json.loads(done.stdout)
    return counts


def measure(found: Sequence[Corpus], python: Path) -> list[dict[str, Any]]:
    """A cell for each corpus."""
    with tekken_folder() as folder:
        tokenizer = Tokenizer.from_checkpoint(folder)
    counts = sentence_piece_counts([corpus.text for corpus in found], python)
    return [
        {
            "kind": corpus.kind,
            "source": corpus.source,
            "num_bytes": len(corpus.text.encode()),
            "num_tekken": len(tokenizer.encode(corpus.text, add_bos=False)),
            "num_sentence_piece": count,
            "claim": CLAIMS.get(corpus.kind, OTHER_CLAIM),
        }
        for corpus, count in zip(found, counts, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, and keep the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_tekken", allow_abbrev=False)
    parser.add_argument("--peers-python", type=Path, default=PROJECT / ".venv-peers/bin/python")
    parser.add_argument("--no-results", action="store_true", help="only print")
    arguments = parser.parse_args(argv)
    about = conditions("tests.bench.bench_tekken", sys.argv[1:] if argv is None else argv)
    results = about | {"cells": measure(corpora(), arguments.peers_python)}
    print(tekken_table(results))
    if not arguments.no_results:
        write_results("tekken", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
