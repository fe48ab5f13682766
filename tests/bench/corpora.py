"""Real text to count and time tokens on, by kind: source code, and manuals and sayings in several languages.

    python -m tests.bench.corpora          # fetches, and says how many characters there are of each

Manuals and sayings come from Debian packages, fetched with `apt-get download` and unpacked into build/corpora: nothing is
installed, and nothing of them is in this repository, as they are large and have licences of their own (debian-handbook: GPL-2+
or CC-BY-SA-3.0). Code is what the environment has: Python's own library, torch's C++ headers. Paragraphs that a translation
still has in English are left out.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from tests.bench.conditions import PROJECT

FOLDER = PROJECT / "build" / "corpora"
MAX_CHARACTERS = 1_000_000
_LEAST_PARAGRAPH = 40
_HANDBOOK, _GUIDE, _HELP = "debian-handbook", "installation-guide-amd64", "gnome-user-docs"
_NO_TEXT = frozenset(("pre", "head", "script", "style", "screen", "info"))
_INLINE = frozenset(
    [
        "a",
        "abbr",
        "acronym",
        "app",
        "b",
        "cmd",
        "code",
        "em",
        "gui",
        "guiseq",
        "i",
        "key",
        "link",
        "q",
        "span",
        "strong",
        "sys",
        "tt",
    ]
)
_ENGLISH = re.compile(r"\b(the|and|of)\b")  # words that none of the other languages written in Latin letters has
# Unicode names of the letters of languages that are not written in Latin ones.
_SCRIPTS = {"Chinese": "CJK", "Russian": "CYRILLIC", "Korean": "HANGUL", "Arabic": "ARABIC"}
_HANDBOOK_FOLDERS = {
    "Chinese": "zh-CN",
    "Italian": "it-IT",
    "French": "fr-FR",
    "German": "de-DE",
    "Spanish": "es-ES",
    "Russian": "ru-RU",
    "Korean": "ko-KR",
    "Arabic": "ar-MA",
}
_CODES = {
    "Chinese": "zh_CN",
    "Italian": "it",
    "French": "fr",
    "German": "de",
    "Spanish": "es",
    "Russian": "ru",
    "Korean": "ko",
}
_SAYINGS = {
    "Chinese": ("fortunes-zh", ("chinese", "tang300", "song100")),
    "German": ("fortunes-de", ("de",)),
    "Spanish": ("fortunes-es", ("es",)),
    "Russian": ("fortunes-ru", ("ru",)),
}


@dataclass(frozen=True)
class Corpus:
    """`kind` is source code or a language; `source` says where its `text` (at most MAX_CHARACTERS) is from."""

    kind: str
    source: str
    text: str


def corpora() -> list[Corpus]:
    """All of them; RuntimeError when a package can neither be found unpacked nor be fetched."""
    return [*code(), *(corpus for kind in _HANDBOOK_FOLDERS for corpus in _of_language(kind))]


def code() -> Iterator[Corpus]:
    """Source code that the environment has."""
    library = Path(sysconfig.get_path("stdlib"))
    yield Corpus("source code", "Python: its own library", _joined(map(_read, sorted(library.glob("*.py")))))
    headers = Path(sysconfig.get_path("purelib"), "torch", "include", "ATen")
    yield Corpus("source code", "C++: torch's ATen headers", _joined(map(_read, sorted(headers.glob("*.h")))))
    sources = unpacked("libjs-jquery") / "usr/share/javascript/jquery/jquery.js"
    yield Corpus("source code", "JavaScript: libjs-jquery", _read(sources)[:MAX_CHARACTERS])


def _of_language(kind: str) -> Iterator[Corpus]:
    folder = unpacked(_HANDBOOK) / "usr/share/doc/debian-handbook/html"
    yield Corpus(kind, _HANDBOOK, _translated(kind, folder / _HANDBOOK_FOLDERS[kind], folder / "en-US", "*.html"))
    if kind in _CODES:
        folder = unpacked(_GUIDE) / "usr/share/doc/installation-guide-amd64"
        yield Corpus(kind, _GUIDE, _translated(kind, folder / _CODES[kind], folder / "en", "*.html"))
        folder = unpacked(_HELP) / "usr/share/help"
        yield Corpus(kind, _HELP, _translated(kind, folder / _CODES[kind], folder / "C", "*/*.page"))
    if kind in _SAYINGS:
        package, names = _SAYINGS[kind]
        yield Corpus(kind, package, _sayings(unpacked(package) / "usr/share/games/fortunes", names))


def unpacked(package: str) -> Path:
    """The folder that a Debian package is unpacked in, fetched when it is not there yet."""
    folder = FOLDER / package
    if not folder.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        _run("apt-get", "download", "--quiet", package)
        (archive,) = FOLDER.glob(f"{package}_*.deb")
        _run("dpkg-deb", "--extract", archive.name, package)
        archive.unlink()
    return folder


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: {done.stderr.strip()}; after `apt-get update` there may be more packages"
        )


class _Paragraphs(HTMLParser):
    """The paragraphs of an HTML or Mallard page, blanks made one, without listings."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._text: list[str] = []
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._depth += tag in _NO_TEXT
        if tag not in _INLINE:
            self._end()

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag in _NO_TEXT and self._depth > 0
        if tag not in _INLINE:
            self._end()

    def handle_data(self, data: str) -> None:
        if not self._depth:
            self._text.append(data)

    def _end(self) -> None:
        if text := " ".join("".join(self._text).split()):
            self.found.append(text)
        self._text.clear()


def paragraphs(pages: Iterable[str]) -> list[str]:
    """The paragraphs of several pages that are long enough to be sentences, each once.

    >>> paragraphs(["<p>A sentence with <b>bold</b> words,\\n long enough.</p><pre>no listing, however long that may be</pre>"])
    ['A sentence with bold words, long enough.']
    """
    parser = _Paragraphs()
    for page in pages:
        parser.feed(page)
    return [text for text in dict.fromkeys(parser.found) if len(text) >= _LEAST_PARAGRAPH]


def is_in_script(text: str, script: str) -> bool:
    """Whether most letters of `text` have a Unicode name that begins with `script`.

    >>> is_in_script("Привет, world", "CYRILLIC"), is_in_script("Hello, мир", "CYRILLIC")
    (True, False)
    """
    letters = [character for character in text if character.isalpha()]
    return sum(unicodedata.name(letter, "").startswith(script) for letter in letters) * 2 > len(letters)


def _translated(kind: str, folder: Path, english: Path, pattern: str) -> str:
    untranslated = set(paragraphs(map(_read, sorted(english.glob(pattern)))))
    script = _SCRIPTS.get(kind)
    return _joined(
        text
        for text in paragraphs(map(_read, sorted(folder.glob(pattern))))
        if text not in untranslated and (is_in_script(text, script) if script else not _ENGLISH.search(text))
    )


def _sayings(folder: Path, names: Iterable[str]) -> str:
    files = [path for name in names for path in _files(folder / name)]
    # Some are coloured by a terminal's escape sequences; a line of % ends each.
    return _joined(re.sub(r"\x1b\[[0-9;]*m|^%$\n", "", _read(path), flags=re.MULTILINE) for path in files)


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else sorted(path.iterdir())
    return [file for file in found if file.is_file() and not file.is_symlink() and file.suffix not in (".dat", ".u8")]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def _joined(texts: Iterable[str]) -> str:
    return "\n".join(texts)[:MAX_CHARACTERS]


if __name__ == "__main__":
    for corpus in corpora():
        print(f"{corpus.kind:12} {corpus.source:28} {len(corpus.text):>9,} characters: {corpus.text[1000:1080]!r}")
