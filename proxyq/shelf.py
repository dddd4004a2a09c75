"""Where the shelves are: folders of content without Python, `search/` and `proxies/`.

In a source checkout (also an editable install) they lie beside the package, at the top of the
repository; in a wheel they are inside it, under `proxyq/_shelf`, put there by `setup.py`.
"""

from pathlib import Path

from proxyq.errors import ProxyqError

SHELVES = ("search", "proxies")
_PACKAGE = Path(__file__).resolve().parent


def shelf(folder: str) -> Path:
    """The folder `search/...` or `proxies/...` of this installation.

    **Raises** `ProxyqError` when it is missing (a broken installation).
    """
    for root in (_PACKAGE / "_shelf", _PACKAGE.parent):
        found = root / folder
        if folder.split("/")[0] in SHELVES and found.is_dir():
            return found
    raise ProxyqError(f"the shelf {folder!r} is missing from this installation; install it again.")
