"""Reading and writing files so that nothing is ever half-written or unpickled."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proxyq.errors import ProxyqError


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write `content` to `path`, either wholly or not at all.

    The bytes go to a temporary file in the same folder, which then replaces `path` in
    one step. An existing file keeps its content until that step.

    **Raises** `ProxyqError` when the folder is missing or not writable.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        # A replaced symbolic link would silently detach the file it points to.
        target = path.resolve() if path.is_symlink() else path
        if target.exists() and not target.is_file():
            raise PermissionError(1, "it is no regular file")  # replacing a device destroys it
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(13, "the file is read-only")
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{path.name}.")
        _unfinished.add(temporary)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files private
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise ProxyqError(
            f"cannot write {str(path)!r} ({error.strerror or error}): choose a file in a "
            "folder that exists and is writable."
        ) from error
    finally:
        _unfinished.discard(temporary or "")
    return path


_unfinished: set[str] = set()


def remove_unfinished() -> None:
    """Remove temporary files of writes that did not come to their end."""
    for name in list(_unfinished):
        with contextlib.suppress(OSError):
            os.unlink(name)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse early, before minutes of work, an output that could not be written."""
    path = Path(path)
    parent = path.resolve().parent
    if path.is_dir():
        raise ProxyqError(f"cannot write {str(path)!r}: it is a folder; name a file in it.")
    if path.exists() and not path.is_file():
        raise ProxyqError(f"cannot write {str(path)!r}: it is no regular file; name another.")
    if not parent.is_dir():
        raise ProxyqError(
            f"cannot write {str(path)!r}: the folder {str(parent)!r} does not exist; create it "
            "or choose another."
        )
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise ProxyqError(f"cannot write {str(path)!r}: it is not writable; choose another place.")


def check_folder(path: str | os.PathLike[str]) -> None:
    """Refuse early a folder in which no file could be written; one still to be made will do."""
    path = Path(path)
    if path.is_dir() and not os.access(path, os.W_OK):
        raise ProxyqError(f"cannot write into {str(path)!r}: it is not writable; choose another.")
    if path.exists() and not path.is_dir():
        raise ProxyqError(f"cannot write into {str(path)!r}: it is no folder; name another.")
    if not path.exists():
        check_writable(path)


def read_bytes(path: str | os.PathLike[str], what: str = "file") -> bytes:
    """The content of `path`; one sentence instead of a traceback where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ProxyqError(
            f"cannot read the {what} {str(path)!r} ({error.strerror or error})."
        ) from error


def read_json(path: str | os.PathLike[str], what: str = "file") -> Any:
    """The JSON value in `path`.

    **Raises** `ProxyqError` naming the line when it is not JSON (or cut short).
    """
    try:
        return json.loads(read_bytes(path, what).decode())
    except UnicodeDecodeError as error:
        raise ProxyqError(f"the {what} {str(path)!r} is not JSON: it is not UTF-8 text.") from error
    except json.JSONDecodeError as error:
        raise ProxyqError(
            f"the {what} {str(path)!r} is not valid JSON (line {error.lineno}: {error.msg}); "
            "it may be cut short: make it again."
        ) from error
    except RecursionError as error:
        raise ProxyqError(f"the {what} {str(path)!r} is nested too deeply.") from error
    except ValueError as error:  # Python's limit on the digits of a whole number
        raise ProxyqError(f"the {what} {str(path)!r} holds a number of too many digits.") from error


def digest_arrays(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever the order of the mapping."""
    hasher = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        hasher.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()
