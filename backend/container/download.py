"""A checkpoint from a hub into the model store: only what is needed, with progress, resumed where it stopped.

huggingface_hub does the transfer. A folder that was filled carries a receipt, so that a restart asks nobody; with
HF_HUB_OFFLINE=1 nobody is ever asked.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from backend.container.environment import hub_name, store_folder
from backend.errors import ConfigError

log = logging.getLogger("nemo.download")
disable_progress_bars()
RECEIPT = ".download.json"
PROGRESS_PERIOD_S = 5.0
_PLAIN_FILES = (
    "config.json",
    "params.json",
    "generation_config.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def download(source: str, store: Path) -> Path:
    """Bring a model into the store and return its folder; ConfigError with the remedy when that cannot be."""
    repository, revision = hub_name(source)
    folder = store_folder(source, store)
    if _is_complete(folder, source):
        log.info("%s is complete in %s", source, folder)
        return folder
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{folder} is not complete and HF_HUB_OFFLINE=1 forbids to fetch it: run `download` without it"
        )
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        names = wanted_files(list(sizes))
        needed = sum(sizes[name] for name in names)
        _check_room(folder, needed)
        log.info("fetching %d files, %.1f GB, of %s at %s", len(names), needed / 1e9, repository, info.sha)
        with _progress(folder, needed):
            # The exact commit, so that all files belong together also when the branch moves meanwhile.
            snapshot_download(repository, revision=info.sha, local_dir=folder, allow_patterns=names)
    except GatedRepoError as error:
        raise ConfigError(f"{repository} is gated: accept its terms at the hub, and set HF_TOKEN ({error})") from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(f"{source}: not at the hub, or private and HF_TOKEN is not set ({error})") from None
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"{source}: {error}; what has arrived stays, run `download` again to go on") from error
    receipt = {"source": source, "commit": info.sha, "files": {name: sizes[name] for name in names}}
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=1))
    log.info("%s is complete in %s", source, folder)
    return folder


def wanted_files(names: Sequence[str]) -> list[str]:
    """The files the server reads. Repositories that carry the weights twice are fetched once, in Hugging Face's layout.

    >>> wanted_files(["config.json", "params.json", "model-1.safetensors", "consolidated.safetensors", "README.md"])
    ['config.json', 'params.json', 'model-1.safetensors']
    """
    top = [name for name in names if "/" not in name]
    shards = [name for name in top if name.endswith(".safetensors")]
    in_hugging_face = [name for name in shards if not name.startswith("consolidated")]
    if not shards:
        raise ConfigError("the repository has no *.safetensors; other formats are not read")
    weights = set(in_hugging_face if "config.json" in top and in_hugging_face else shards)
    weights |= {name for name in top if name.endswith(".safetensors.index.json")}
    return [name for name in top if name in weights or name in _PLAIN_FILES]


def _is_complete(folder: Path, source: str) -> bool:
    try:
        receipt = json.loads((folder / RECEIPT).read_text())
        files = receipt["files"]
        return receipt["source"] == source and all(
            (folder / name).stat().st_size == size for name, size in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _check_room(folder: Path, needed_bytes: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(folder).free + _bytes_in(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: {error.strerror}; the model store must be a mount that user {os.getuid()} can write to"
        ) from None
    if room < needed_bytes:
        raise ConfigError(
            f"{folder}: {needed_bytes / 1e9:.1f} GB are needed and {room / 1e9:.1f} GB are free; enlarge the model store"
        )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@contextmanager
def _progress(folder: Path, total_bytes: int) -> Iterator[None]:
    """Log what lies on the disk every few seconds: a bar is of no use in a container's log."""
    is_done = threading.Event()
    started_s, started_bytes = time.monotonic(), _bytes_in(folder)

    def tell() -> None:
        while not is_done.wait(PROGRESS_PERIOD_S):
            present = _bytes_in(folder)
            rate = (present - started_bytes) / (time.monotonic() - started_s)
            share = min(100.0, 100 * present / max(1, total_bytes))
            log.info("%.1f of %.1f GB (%.0f %%), %.0f MB/s", present / 1e9, total_bytes / 1e9, share, rate / 1e6)

    thread = threading.Thread(target=tell, name="download-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
