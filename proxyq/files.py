"""Reading and writing files so that nothing is ever half-written or unpickled."""

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proxyq.errors import ProxyqError, shown

MOST_BYTES = 1 << 28
"""Of a JSON or TOML file: more than any that is written here, less than what fills a machine."""
MOST_LEVELS = 50
"""Of a JSON value: lists and objects within each other."""


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write `content` to `path`, either wholly or not at all.

    The bytes go to a temporary file in the same folder, which then replaces `path` in
    one step. An existing file keeps its content until that step.

    **Raises** `ProxyqError` when the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    write_together({path: content})
    return path


def write_together(
    contents: Mapping[Path, bytes | str], *, folder: str | os.PathLike[str] | None = None
) -> None:
    """Write files that belong together: none takes its place before all are on the disk.

    - `folder`: made first, where it is missing, and taken away again if the writing fails.

    **Raises** `ProxyqError` as `write_atomic`.
    """
    ready: list[tuple[str, Path]] = []
    with made_folder(folder):
        try:
            for path, content in contents.items():
                ready.append(_written(path, content))
            for path, (temporary, target) in zip(contents, list(ready), strict=True):
                try:
                    os.replace(temporary, target)
                except OSError as error:
                    raise cannot_write(path, error) from error
                ready.remove((temporary, target))
                _unfinished.discard(temporary)
        finally:
            # Here, not above: Ctrl-C and a lack of memory leave no file either.
            for temporary, _ in ready:
                _remove(temporary)


def _written(path: Path, content: bytes | str) -> tuple[str, Path]:
    """A temporary file with the content, on the disk, and the place that it is for."""
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
    except BaseException as error:
        if temporary is not None:
            _remove(temporary)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise
    return temporary, target


def _remove(temporary: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(temporary)
    _unfinished.discard(temporary)


@contextlib.contextmanager
def made_folder(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """A folder for the body, which goes again if it was not there and the body fails."""
    missing: list[Path] = []
    if folder is not None:
        whole = Path(folder)
        missing = [one for one in (whole, *whole.parents) if not one.exists()]
        try:
            whole.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
    try:
        yield
    except BaseException:
        for one in missing:
            with contextlib.suppress(OSError):
                one.rmdir()
        raise


def cannot_write(path: str | os.PathLike[str], error: OSError) -> ProxyqError:
    """The sentence for a file that the system did not take."""
    remedy = "choose a file in a folder that exists and is writable."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space or choose another place."
    elif error.errno == errno.EFBIG:
        remedy = "raise the limit on the size of files, or choose another place."
    return ProxyqError(f"cannot write {str(path)!r} ({error.strerror or error}): {remedy}")


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


def read_bytes(
    path: str | os.PathLike[str], what: str = "file", *, most: int | None = None
) -> bytes:
    """The content of `path`; one sentence instead of a traceback where it cannot be read.

    **Raises** `ProxyqError` also where there are more than `most` bytes. What is no regular file,
    such as a pipe or a device, may have no end: of that, `MOST_BYTES` are read unless told.
    """
    try:
        with open(path, "rb") as file:
            if most is None and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                most = MOST_BYTES
            content = file.read() if most is None else file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that holds a zero byte
        told = getattr(error, "strerror", None) or error
        raise ProxyqError(f"cannot read the {what} {str(path)!r} ({told}).") from error
    if most is not None and len(content) > most:
        raise ProxyqError(
            f"the {what} {str(path)!r} must have at most {most:,} bytes, and has more: give a "
            "file that proxyq wrote."
        )
    return content


def read_json(path: str | os.PathLike[str], what: str = "file", *, most: int = MOST_BYTES) -> Any:
    """The JSON value in `path`.

    **Raises** `ProxyqError` naming the line when it is not JSON (or cut short), and where it names
    a field twice, is nested deeper than `MOST_LEVELS`, or has more than `most` bytes.
    """
    file = f"the {what} {str(path)!r}"
    try:
        text = read_bytes(path, what, most=most).decode()
        value = json.loads(text, object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        raise ProxyqError(f"{file} is not JSON: it is not UTF-8 text.") from error
    except json.JSONDecodeError as error:
        raise ProxyqError(
            f"{file} is not valid JSON (line {error.lineno}: {error.msg}); "
            "it may be cut short: make it again."
        ) from error
    except RecursionError as error:
        raise ProxyqError(f"{file} is nested too deeply.") from error
    except _Twice as error:
        raise ProxyqError(f"{file} gives the field {error} twice: keep one.") from error
    except ValueError as error:  # Python's limit on the digits of a whole number
        raise ProxyqError(f"{file} holds a number of too many digits.") from error
    if deeper_than(value, MOST_LEVELS):
        raise ProxyqError(f"{file} is nested too deeply: {MOST_LEVELS} levels are the most.")
    if "\\ud" in text.lower():  # half of a pair, which no file can be written with again
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ProxyqError(f"{file} holds text that UTF-8 cannot write.") from None
    return value


class _Twice(ValueError):
    """A field that an object names twice; of which the last would count, unseen."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _Twice(shown(name))
            seen.add(name)
    return found


def deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects lie within each other more than `levels` deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [one for values in inner for one in values if isinstance(one, (dict, list))]
    return bool(level)


def digest_arrays(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever the order of the mapping."""
    hasher = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        hasher.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        hasher.update(array.reshape(-1).view(np.uint8).data)  # no copy of it
    return hasher.hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a value as JSON, whatever the order of its fields; what JSON lacks is its text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
