"""One parser under libFuzzer, which looks for inputs that reach new lines of the project's code (atheris).

    python -m tests.fuzz.guided config.json --folder /tmp/fuzz --runs 2000

Ends with status 0 after so many runs; otherwise with what broke, and the case in a file. What compiled code does is not seen, so
that this is for what Python itself reads.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["backend", "client"]):
    from tests.fuzz.checkpoint_parsers import checkpoint_parsers
    from tests.fuzz.request_parsers import request_parsers
    from tests.fuzz.watch import refusal_of

_OURS = ["backend", "client"]
_TIMEOUT_S = 120
_MAX_MEMORY_MB = 4096


def main() -> None:
    """Fuzz until the runs are over; does not return."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", allow_abbrev=False)
    parser.add_argument("name", help="as checkpoint_parsers and request_parsers call it")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for files and what is found")
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; 0: another one every time")
    arguments = parser.parse_args()
    tempfile.tempdir = str(arguments.folder)
    corpus = arguments.folder / "corpus"
    corpus.mkdir()
    with ExitStack() as stack:
        with atheris.instrument_imports(include=_OURS):  # the adapter is imported when it is needed
            parsers = stack.enter_context(request_parsers(arguments.folder))
        found = (parsers | checkpoint_parsers(arguments.folder)).get(arguments.name)
        if found is None:
            parser.error(f"there is no parser {arguments.name!r}")
        for number, sample in enumerate(found.samples):
            (corpus / str(number)).write_bytes(sample)
        options = [
            f"-runs={arguments.runs}",
            f"-seed={arguments.seed}",
            f"-timeout={_TIMEOUT_S}",
            f"-rss_limit_mb={_MAX_MEMORY_MB}",
        ]
        options += [f"-artifact_prefix={arguments.folder}/", "-print_final_stats=1", f"-max_len={1 << 18}"]
        atheris.Setup([sys.argv[0], *options, os.fspath(corpus)], lambda content: refusal_of(found.parse, content))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
