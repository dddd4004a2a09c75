"""Arrays of a NumPy archive, checked before they are unpacked."""

import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from proxyq.errors import ProxyqError, UsageError, reason
from proxyq.files import read_bytes

MOST_RATIO, LEAST_BYTES = 250, 1 << 27
"""An array that unpacks to more than so many times its bytes in the file, and to more than so many
bytes in all, is no data but made to fill memory."""
Header = tuple[tuple[int, ...], np.dtype]
"""Shape and type of an array."""


def read_arrays(
    path: Path, choose: Callable[[Mapping[str, Header]], Sequence[str]]
) -> dict[str, np.ndarray]:
    """The arrays that `choose` names, told what there are; only these are read.

    **Raises** `ProxyqError` where the file is damaged, holds Python objects, or unpacks to far
    more than it takes.
    """
    if not path.is_file():
        read_bytes(path, "data file")  # the common sentence for what cannot be read
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {
                entry.filename.removesuffix(".npy"): entry
                for entry in archive.infolist()
                if entry.filename.endswith(".npy")
            }
            headers, starts = {}, {}
            for key, entry in entries.items():
                headers[key], starts[key] = _header(archive.open(entry))
        if not headers:
            raise UsageError(f"the file {str(path)!r} holds no arrays.")
        chosen = choose(headers)
        for key in chosen:
            _check_bytes(key, entries[key], headers[key], starts[key], path)
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in chosen}
    except ProxyqError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds
        raise ProxyqError(
            f"the data file {str(path)!r} is not an intact .npz archive of plain arrays "
            f"({type(error).__name__}: {reason(error)}): make it again with `numpy.savez`."
        ) from error


def _header(file: IO[bytes]) -> tuple[Header, int]:
    """Shape and type of an array from its first bytes, and how many bytes these are."""
    with file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        return (shape, dtype), file.tell()


def _check_bytes(key: str, entry: zipfile.ZipInfo, header: Header, start: int, path: Path) -> None:
    """Refuse, before anything is unpacked, what is not there and what is there to fill memory."""
    shape, dtype = header
    if dtype.hasobject:
        raise ValueError(f"the array {key!r} holds Python objects, which are not unpickled")
    promised = start + math.prod(shape) * dtype.itemsize
    if promised != entry.file_size or entry.compress_size > path.stat().st_size:
        raise ProxyqError(
            f"the array {key!r} of {str(path)!r} is damaged: its shape {shape} takes "
            f"{promised:,} bytes, and there are {entry.file_size:,}; make the file again with "
            "`numpy.savez`."
        )
    if promised > max(LEAST_BYTES, MOST_RATIO * entry.compress_size):
        raise ProxyqError(
            f"the array {key!r} of {str(path)!r} unpacks to {promised:,} bytes from "
            f"{entry.compress_size:,}, which no data does: store it without compression, with "
            "`numpy.savez`, where this is meant."
        )
