"""Counts tokens by a SentencePiece model; executed by the Python of .venv-peers, which has `sentencepiece`.

    .venv-peers/bin/python tests/bench/count_sentencepiece.py MODEL < texts.json

Standard input is a JSON list of texts, standard output the list of their numbers of tokens, without beginning and end.
"""

from __future__ import annotations

import json
import sys

from sentencepiece import SentencePieceProcessor

if __name__ == "__main__":
    processor = SentencePieceProcessor(model_file=sys.argv[1])
    print(json.dumps([len(processor.encode(text)) for text in json.load(sys.stdin)]))
