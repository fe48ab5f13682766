"""Cut Mistral NeMo's Tekken vocabulary down to the demo checkpoint's 4,096 ids, in the same file format.

Byte-level BPE merges in the order of rank, so the first ranks are a complete, smaller tokenizer of the same kind: 256
single bytes first, then the most frequent merges. Control tokens keep their ids; the id of a rank is still rank + 1000.
The source is the file that ships with mistral-common (Apache-2.0).
"""

from __future__ import annotations

import json
from pathlib import Path

import mistral_common

from backend.errors import ConfigError

SOURCE = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
NUM_SPECIAL_TOKENS = 1000
VOCAB_SIZE = 4096


def cut_tekken(source: Path = SOURCE, vocab_size: int = VOCAB_SIZE) -> str:
    """The JSON text of a Tekken file with `vocab_size` ids, made from the first ranks of `source`.

    Raises ConfigError when `source` is not a v3 file with 1,000 special ids and enough ranks.
    """
    full = json.loads(source.read_text(encoding="utf-8"))
    config, num_ranks = full["config"], vocab_size - NUM_SPECIAL_TOKENS
    if (config["version"], config["default_num_special_tokens"]) != ("v3", NUM_SPECIAL_TOKENS):
        raise ConfigError(
            f"{source.name}: config must be version v3 with {NUM_SPECIAL_TOKENS} special tokens: {config}"
        )
    if not 256 <= num_ranks <= len(full["vocab"]):
        raise ConfigError(f"vocab_size: ranks must be 256..{len(full['vocab'])}, found {num_ranks}")
    config = {**config, "num_vocab_tokens": num_ranks, "default_vocab_size": vocab_size}
    # One entry per line: a diff stays readable, and the file small.
    entries = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in full["vocab"][:num_ranks])
    return f'{{"config": {json.dumps(config)},\n"vocab": [\n{entries}\n]}}\n'


def write_tekken(folder: Path) -> Path:
    """Write `tekken.json` into `folder` and return its path."""
    path = folder / "tekken.json"
    path.write_text(cut_tekken(), encoding="utf-8")
    return path


if __name__ == "__main__":
    write_tekken(Path(__file__).parent / "checkpoint")
