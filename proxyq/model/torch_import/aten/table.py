"""The table from operator names to JAX functions."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from proxyq.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])

_TABLE: dict[str, Callable[..., Any]] = {}

# Where an operator says whether it is in training mode, by position: those that must not
# be there in evaluation, and what to say about them.
_TRAINING_FLAG = {
    "aten.dropout": (2, "drops activations at random"),
    "aten.native_dropout": (2, "drops activations at random"),
    "aten.alpha_dropout": (2, "drops activations at random"),
    "aten.feature_dropout": (2, "drops activations at random"),
    "aten.feature_alpha_dropout": (2, "drops activations at random"),
    "aten.batch_norm": (5, "updates the running statistics of a batch norm"),
    "aten._native_batch_norm_legit": (5, "updates the running statistics of a batch norm"),
    "aten._native_batch_norm_legit_functional": (
        5,
        "updates the running statistics of a batch norm",
    ),
}


def register_aten(*names: str, override: bool = False) -> Callable[[Function], Function]:
    """Decorator: this function computes the operator(s) `names` with JAX.

    A name is an ATen operator with or without its overload (`"relu"`, `"max.dim"`; the
    bare name serves every overload that has no entry of its own), or, for an operator of
    another library, `"library::operator"`. The function takes the operator's arguments as
    its schema orders them.

    **Raises** `UsageError` when a name is taken, unless `override` is true.

    Example:

        @register_aten("erfinv")
        def erfinv(x):
            return jax.scipy.special.erfinv(x)
    """

    def add(function: Function) -> Function:
        for name in names:
            key = name.replace("::", ".", 1)
            if "::" not in name:
                key = f"aten.{name.removeprefix('aten.')}"
            if key in _TABLE and not override:
                raise UsageError(
                    f"the operator {name!r} is registered already; pass `override=True` to "
                    "replace it."
                )
            _TABLE[key] = function
        return function

    return add


def find(operator: str) -> Callable[..., Any] | None:
    """The function for `namespace.name.overload`, or that for the name alone, or None."""
    if operator in _TABLE:
        return _TABLE[operator]
    # "aten.relu.default" has an overload, "operator.add" has none.
    base = operator.rsplit(".", 1)[0]
    return _TABLE.get(base) if "." in base else None


def complaint(operator: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why a node cannot be part of a pure function, or None."""
    base = operator.rpartition(".")[0]
    if base not in _TRAINING_FLAG or operator.endswith(".no_stats"):
        return None
    place, words = _TRAINING_FLAG[base]
    flag = args[place] if len(args) > place else kwargs.get("train", kwargs.get("training", False))
    if base == "aten.batch_norm" and (len(args) <= 3 or args[3] is None):
        return None  # without running statistics there is nothing to update
    return words if flag else None
