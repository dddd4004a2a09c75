"""torch and torchvision, imported when they are needed and not before."""

import importlib
import sys
from types import ModuleType
from typing import Any

from proxyq.errors import MissingExtra, ProxyqError, first_line

# torchvision's operators whose schemas it needs at import; without its compiled part
# (another build of torch beside it) nobody has declared them.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries: list[Any] = []  # a torch.library.Library withdraws its schemas when it dies


def import_torch() -> ModuleType:
    """torch, or `MissingExtra` with the install line."""
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtra("torch", "torch", "Reading a torch model") from error


def import_torchvision() -> ModuleType:
    """torchvision, also beside a torch that its compiled operators do not fit.

    A torchvision built for another torch fails at import with "operator torchvision::nms
    does not exist", although classifiers need no such operator. Then the missing schemas
    are declared (without an implementation) and the import is repeated.

    **Raises** `MissingExtra` when torchvision or torch is not installed, `ProxyqError`
    when it cannot be imported for another reason.
    """
    torch = import_torch()
    try:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
        # The failed import left half of the package behind.
        for name in [key for key in sys.modules if key.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                library.define(schema)
        _libraries.append(library)
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise MissingExtra("torchvision", "torch", "This model") from error
    except RuntimeError as error:
        raise ProxyqError(
            f"torchvision does not fit the installed torch ({first_line(error)}): install "
            "a matching pair."
        ) from error
