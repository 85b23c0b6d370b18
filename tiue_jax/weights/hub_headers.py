"""Reads the small files of a hub repository and the headers of its weights, without a download of the weights."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tiue_jax.temporary import temporary_folder
from tiue_jax.weights import download, hub, lora_source

_FIRST = 100_000  # bytes that are asked for first; most headers are shorter
_LONGEST = 100_000_000  # bytes of a header, as in safetensors
_SMALL = (".json", ".txt", ".yaml")


@contextlib.contextmanager
def headers(name: str) -> Iterator[Path]:
    """Within it there is a folder like a repository's. Its weights have names, shapes and dtypes, and only zeros.

    The files of weights are sparse: they have their size and take no room.

    Args:
        name: a hub repository, an alias, or a file in a repository (owner/name/file.safetensors).

    Raises:
        OSError: the hub cannot be reached, or has no such repository.
        ValueError: the repository holds no model and no adapter, or a file has no header.
    """
    # imported here, since it takes half a second that files on this disk do not need
    from huggingface_hub import HfApi, hf_hub_download

    model = hub.known(name)
    repository, revision = model.sources[0] if model else ("/".join(name.split("/")[:2]), "main")
    file = None if model else "/".join(name.split("/")[2:]) or None
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # of the hub, its HTTP library, or the operating system
        raise OSError(f"hub {repository}: {download.reason_of(error)}") from error
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
    if file is not None:
        wanted = [file]
    else:
        try:
            wanted, _ = download.needed(sizes)
        except ValueError:
            wanted = [lora_source.choose(f"hub {repository}", list(sizes))]  # no config.json, so an adapter
    wanted += [lora_source.PEFT_CONFIG] if lora_source.PEFT_CONFIG in sizes else []
    if absent := [path for path in wanted if path not in sizes]:
        raise FileNotFoundError(f"hub {repository}: no file {absent[0]}")
    commit = info.sha or revision
    with temporary_folder(tempfile.gettempdir(), "tiue-jax") as folder:
        for path in dict.fromkeys(wanted):
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if path.endswith(_SMALL):
                    target.write_bytes(Path(hf_hub_download(repository, path, revision=commit)).read_bytes())
                else:
                    _write_header(repository, path, commit, sizes[path], target)
            except ValueError:
                raise
            except Exception as error:
                raise OSError(f"hub {repository}: {path}: {download.reason_of(error)}") from error
        hub.say(name, [f"hub {repository} at {commit}", "only the headers of the weights were read"])
        yield Path(folder) / file if file else Path(folder)


def _write_header(repository: str, path: str, commit: str, size: int, target: Path) -> None:
    """Writes a safetensors file with its header alone. ValueError if it has none."""
    start = _read(repository, path, commit, min(_FIRST, size))
    length = 8 + int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(size, _LONGEST):
        raise ValueError(f"hub {repository}: {path}: not a complete safetensors file")
    header = start[:length] if length <= len(start) else _read(repository, path, commit, length)
    with target.open("wb") as file:
        file.write(header)
        file.truncate(size)


def _read(repository: str, path: str, commit: str, count: int) -> bytes:
    """The first bytes of a file on the hub."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(repository, path, revision=commit)
    ranged = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}"}
    with get_session().stream("GET", url, headers=ranged, follow_redirects=True) as response:
        hf_raise_for_status(response)
        found = b""
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= count:  # also of a server that sends the whole file
                break
    return found[:count]
