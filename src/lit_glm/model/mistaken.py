"""What a file is that is no checkpoint, by its first bytes: what people get instead of one, and what to do then."""

from pathlib import Path
from typing import Optional

_UNPACK = "unpack it (tar xf, unzip, ...) and give the file or folder that comes out"
_STARTS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: git lfs pull, or download the file"),
    (b"BZh", f"is a bzip2 archive: {_UNPACK}"),
    (b"\x1f\x8b", f"is a gzip archive: {_UNPACK}"),
    (b"\xfd7zXZ\0", f"is an xz archive: {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive: {_UNPACK}"),
    (b"(\xb5/\xfd", f"is a zstd archive: {_UNPACK}"),
    (b"Rar!", f"is a rar archive: {_UNPACK}"),
    (b"\x89HDF", "is an HDF5 file: data goes to data.train_file or data.eval_file"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")
_HEAD = 512
_TAR = slice(257, 262)


def mistaken_for(path: Path) -> Optional[str]:
    """What a file is and what to do about it; None if it may be a torch file."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "is empty: copy or download it again"
    for start, said in _STARTS:
        if head.startswith(start):
            return said
    if head[_TAR] == b"ustar":
        return f"is a tar archive: {_UNPACK}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith(_PAGES):
        return "is a web page: the download gave an error or a login page; download it again, and compare the size"
    if text.startswith((b"{", b"[")):
        return "is a JSON text, not a file of weights"
    if len(head) > 1 and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "is a text, not a file of weights"
    return None
