"""Opens a file of prompts: undoes its compression and names what is no file of prompts, by its first bytes."""

import bz2
import dataclasses
import gzip
import io
import lzma
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from etils import epath

from tiue_jax import files

HEAD = 2**18  # bytes at the start of a file by which its kind is known
_BUFFER = 2**20
# What reading a damaged file raises, beside OSError and ValueError. pyarrow's own errors are both.
DAMAGE = (EOFError, zlib.error, lzma.LZMAError)

_SPECIAL = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


@dataclasses.dataclass(frozen=True)
class Refused:
    """A kind of file that holds no prompts, or none that are read: its first bytes and what to do instead."""

    magic: bytes
    name: str
    remedy: str
    at: int = 0


_CAPTIONS = "give the file of its captions instead"
_AS_TABLE = "export its texts as CSV, JSON Lines or parquet"
REFUSED = (
    Refused(b"\x89PNG", "a PNG image", _CAPTIONS),
    Refused(b"\xff\xd8\xff", "a JPEG image", _CAPTIONS),
    Refused(b"GIF8", "a GIF image", _CAPTIONS),
    Refused(b"WEBP", "a WebP image", _CAPTIONS, 8),
    Refused(b"II*\0", "a TIFF image", _CAPTIONS),
    Refused(b"MM\0*", "a TIFF image", _CAPTIONS),
    Refused(b"ftyp", "a video or an AVIF image", _CAPTIONS, 4),
    Refused(b"%PDF", "a PDF document", "save its prompts as text, one a line"),
    Refused(b"\xd0\xcf\x11\xe0", "an old Office document", "save the sheet as CSV"),
    Refused(b"PK\3\4", "a ZIP archive (or .xlsx, .docx, .npz, .pt)", "unpack it, or save the sheet as CSV"),
    Refused(b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    Refused(b"Rar!", "a RAR archive", "unpack it"),
    Refused(b"SQLite format 3\0", "an SQLite database", "sqlite3 -csv -header FILE 'SELECT caption FROM ...' > p.csv"),
    Refused(b"\x89HDF", "an HDF5 file", _AS_TABLE),
    Refused(b"\x93NUMPY", "a NumPy array", _AS_TABLE),
    Refused(b"ORC", "an ORC file", _AS_TABLE),
    Refused(b"Obj\1", "an Avro file", _AS_TABLE),
    Refused(b"\x7fELF", "a program", _AS_TABLE),
    Refused(b"<!doctype html", "a web page", "download the file itself: this may be the page about it, or an error"),
    Refused(b"<html", "a web page", "download the file itself: this may be the page about it, or an error"),
    Refused(b"<?xml", "an XML file", _AS_TABLE),
    Refused(b"{\\rtf", "an RTF document", "save it as plain text"),
    Refused(b"version https://git-lfs", "a pointer of Git LFS, not the file", "git lfs pull"),
    Refused(b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE > p.txt"),
    Refused(b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE > p.txt"),
)
_PICKLES = (*(bytes([0x80, protocol]) for protocol in range(2, 6)), b"(lp0\n", b"(dp0\n", b"ccopy_reg\n")


@dataclasses.dataclass
class Opened:
    """An open file of prompts, without its compression.

    Attributes:
        stream: at the start of the content.
        head: the first HEAD bytes, or all if there are fewer.
        suffix: of the name without that of a compression, in lower case: ".csv" of captions.CSV.gz.
        seekable: False if the stream can only be read forwards.
    """

    stream: BinaryIO
    head: bytes
    suffix: str
    seekable: bool

    @property
    def is_whole(self) -> bool:
        """True if the head is the whole content."""
        return len(self.head) < HEAD

    def seekable_stream(self) -> BinaryIO:
        """Returns a stream that can be read in any order. Compressed content is copied to a temporary file."""
        if self.seekable:
            return self.stream
        copied = tempfile.TemporaryFile()  # noqa: SIM115
        with self.stream:
            shutil.copyfileobj(self.stream, copied, _BUFFER)
        copied.seek(0)
        self.stream, self.seekable = copied, True
        return copied

    def close(self) -> None:
        """Closes the file."""
        self.stream.close()


class _Rewound(io.RawIOBase):
    """A decompressed stream, which cannot go back, and of which the first bytes were read already."""

    def __init__(self, first: bytes, rest: Any, compressed: BinaryIO):
        self._first, self._rest, self._compressed = first, rest, compressed

    def close(self) -> None:
        if not self.closed:
            self._rest.close()
            self._compressed.close()
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        given = self._first[: len(buffer)] or self._rest.read(len(buffer))
        self._first = self._first[len(given) :]
        buffer[: len(given)] = given
        return len(given)


def _with_pyarrow(codec: str) -> Callable[[BinaryIO], Any]:
    def opened(stream: BinaryIO) -> Any:
        import pyarrow  # takes a tenth of a second

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), codec)

    return opened


COMPRESSIONS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\x28\xb5\x2f\xfd": _with_pyarrow("zstd"),
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x04\x22\x4d\x18": _with_pyarrow("lz4"),
}
_COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4")


def check_regular(path: epath.Path) -> None:
    """Checks that a path that exists is a file or a folder: a pipe or a device might never end.

    Raises:
        ValueError: it is something else.
    """
    if files.is_remote(path):
        return
    mode = os.stat(path).st_mode
    for is_special, name in _SPECIAL:
        if is_special(mode):
            raise ValueError(f"{path}: {name}, expected a file; write the prompts to a file first")


def open_file(path: epath.Path) -> Opened:
    """Opens a file and undoes its compression, which is known by its first bytes.

    Raises:
        ValueError: the file is of a kind that is not read, or its compression is damaged.
        OSError: as open().
    """
    check_regular(path)
    stream: Any = path.open("rb")
    try:
        head, seekable = stream.read(HEAD), True
        stream.seek(0)
        if opener := next((opener for magic, opener in COMPRESSIONS.items() if head.startswith(magic)), None):
            inner = opener(stream)
            head, seekable = _read(inner, HEAD), False
            stream = io.BufferedReader(_Rewound(head, inner, stream), _BUFFER)
        refuse(head)
    except (ValueError, *DAMAGE) as error:
        stream.close()
        raise ValueError(f"{path}: {error}") from error
    except OSError as error:
        stream.close()
        raise _damaged(path, error) from error
    return Opened(stream, head, content_suffix(path), seekable)


def content_suffix(path: epath.Path) -> str:
    """The suffix of a name without that of a compression, in lower case: `.csv` of captions.CSV.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _damaged(path: epath.Path, error: OSError) -> Exception:
    """An error of a decompressor has no errno: it names the file then."""
    return error if error.errno else ValueError(f"{path}: {error}")


def _read(stream: Any, count: int) -> bytes:
    """Reads `count` bytes, or fewer at the end. A decompressor may return fewer before the end."""
    parts = []
    while count and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def refuse(head: bytes) -> None:
    """Checks that the first bytes of a file may begin a file of prompts.

    Raises:
        ValueError: they begin a kind of file that is not read. The error names the kind and what to do.
    """
    lowered = head[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for kind in REFUSED:
        found = head[kind.at : kind.at + len(kind.magic)]
        if found == kind.magic or (kind.magic[:1] == b"<" and lowered.startswith(kind.magic)):
            raise ValueError(f"{kind.name}, not prompts: {kind.remedy}")
    if head.startswith(_PICKLES):
        raise ValueError(f"a pickle, which could run code when it is read: {_AS_TABLE}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        raise ValueError("a safetensors file, not prompts: it holds weights")


def is_binary(opened: Opened) -> bool:
    """Returns True if the first bytes cannot be text in any encoding of one byte or of UTF-8."""
    head = opened.head
    controls = sum(head.count(bytes([code])) for code in range(32) if code not in b"\t\n\r\f\v\x1b")
    return b"\0" in head or controls > len(head) / 20
