"""Python's own functions on sizes, which a graph with a symbolic batch calls."""

import math
import operator

from proxyq.model.torch_import.aten.table import register_aten

for _name in (
    "add sub mul floordiv truediv mod neg pow eq ne ge gt le lt and_ or_ getitem pos abs"
).split():
    register_aten(f"operator::{_name}")(getattr(operator, _name))
for _name in ("floor", "ceil", "trunc", "sqrt"):
    register_aten(f"math::{_name}")(getattr(math, _name))
register_aten("builtins::round", "torch::sym_round")(round)
register_aten("builtins::max", "torch::sym_max")(max)
register_aten("builtins::min", "torch::sym_min")(min)
register_aten("builtins::int", "torch::sym_int")(int)
register_aten("builtins::float", "torch::sym_float")(float)
register_aten("torch::sym_not", "operator::not_")(operator.not_)
