"""Recipes: published methods as data, one TOML file each on the shelf `search/recipes`.

A recipe says which proxy with which options, how scores become costs, bits of weights and
activations, solver, rounding, ties and pins. It holds no code; names of proxies, cost mappings
and solvers are looked up where they are used.
"""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from proxyq.errors import ProxyqError, UsageError, near, reason, shown
from proxyq.files import MOST_LEVELS, deeper_than, read_bytes
from proxyq.record_file import first_problem
from proxyq.search.allocate.build import AS_WEIGHTS
from proxyq.search.allocate.lp import ROUNDINGS
from proxyq.search.allocate.problem import check_widths
from proxyq.shelf import shelf

FOLDER = "search/recipes"
MAX_BYTES = 1_000_000


def _one_of_roundings(value: str | None) -> str | None:
    if value is not None and value not in ROUNDINGS:
        raise ValueError(f"unknown rounding {shown(value)}: {near(value[:80], ROUNDINGS)}")
    return value


def _activation_bits(value: int | list[int] | str | None) -> int | list[int] | str | None:
    if isinstance(value, str) and value != AS_WEIGHTS:
        raise ValueError(f"must be a bit-width, a list of them or 'weights', got {shown(value)}")
    if isinstance(value, int):
        check_widths([value], "`activation_bits`")
    elif isinstance(value, list):
        check_widths(value, "`activation_bits`")
    return value


Option = bool | int | float | str
Setting = int | float | list[int] | list[float]


class Recipe(BaseModel):
    """One published method.

    - `proxy`, `options`, `samples`: what is measured, and on how many images.
    - `cost`: how scores become costs; `linear-bits` is cost = -score × bits.
    - `activation_bits`: of all layers; a list: chosen beside the weights', from scores that hold
      a cost of them; `weights`: those of the layer's weights; left out: float.
    - `start`: a recipe on the shelf whose plan the solver starts from; `solving`: further
      arguments of the solver.
    - `outliers`: `erase` removes bit-widths whose cost is below that of the next higher one.
    - `ties`: `same-feature` (layers whose measured feature is one tensor share bits),
      `same-input` (layers that read one tensor do), or patterns as for `--tie`; `pins` as for
      `--pin`.
    - `correction`: what is corrected before the network is run quantized.
    - `note`: where this differs from the paper.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(min_length=1)
    title: str = ""
    reference: str = Field(min_length=1)
    proxy: str = Field(min_length=1)
    options: dict[str, Option] = {}
    samples: int = Field(32, ge=1)
    cost: str = "linear-bits"
    bits: Annotated[list[int], AfterValidator(lambda b: list(check_widths(b)))]
    activation_bits: Annotated[int | list[int] | str | None, AfterValidator(_activation_bits)] = (
        None
    )
    outliers: Literal["keep", "erase"] = "keep"
    solver: str = "auto"
    rounding: Annotated[str | None, AfterValidator(_one_of_roundings)] = None
    start: str | None = None
    solving: dict[str, Setting] = {}
    ties: list[str] = []
    pins: list[str] = []
    correction: Literal["auto", "none", "weights", "statistics"] = "none"
    note: str = ""

    def solver_options(self) -> dict[str, Any]:
        """Keyword arguments for `solve` beside the method."""
        return {**self.solving, **({} if self.rounding is None else {"rounding": self.rounding})}


def available_recipes() -> list[str]:
    """Names of the recipes on the shelf, sorted."""
    return sorted(file.stem for file in shelf(FOLDER).glob("*.toml"))


def load_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """A recipe from the shelf by name, or from a file (a path, or a name ending in `.toml`).

    **Raises** `UsageError` for an unknown name, with near misses; `ProxyqError` for a file that
    cannot be read or has a wrong field, which it names.
    """
    text = os.fspath(name_or_path)
    if text.endswith(".toml") or os.sep in text:
        return _read(Path(text))
    names = available_recipes()
    if text not in names:
        raise UsageError(f"unknown recipe {text!r}: {near(text, names)}")
    return _read(shelf(FOLDER) / f"{text}.toml")


def _read(path: Path) -> Recipe:
    try:
        data = tomllib.loads(read_bytes(path, "recipe", most=MAX_BYTES).decode())
    except UnicodeDecodeError as error:
        raise ProxyqError(f"the recipe {str(path)!r} is not UTF-8 text.") from error
    except RecursionError as error:
        raise ProxyqError(f"the recipe {str(path)!r} is nested too deeply.") from error
    except ValueError as error:  # its own kind, and Python's limit on the digits of a number
        raise ProxyqError(
            f"the recipe {str(path)!r} is not valid TOML: {reason(error)}."
        ) from error
    if deeper_than(data, MOST_LEVELS):
        raise ProxyqError(f"the recipe {str(path)!r} is nested too deeply.")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ProxyqError(
            f"the recipe {str(path)!r} has a bad field {first_problem(error)}."
        ) from None
