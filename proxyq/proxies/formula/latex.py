"""Formulas for a paper: LaTeX by sympy, and by ourselves where sympy takes too long."""

import threading
from typing import Any

from proxyq.errors import MissingExtra, UsageError
from proxyq.proxies.formula.grammar import Node, is_constant
from proxyq.proxies.formula.text import number_text

SECONDS = 10.0
SYMBOLS = {
    "W": "W",
    "G": "G",
    "F": "F",
    "V": "V",
    "H": "H",
    "D": r"\Delta_{W}",
    "A": "A",
    "E": r"\Delta_{A}",
    "O": r"\epsilon",
    "R": r"\rho",
    "bits": "b",
    "weights": "n",
    "macs": "m",
}


def to_latex(node: Node, *, seconds: float = SECONDS) -> str:
    """LaTeX of a formula, in one line without dollar signs.

    Nothing is simplified: the operations are protected, and rules of algebra do not hold for
    them. When sympy is not done after `seconds`, or fails, `plain_latex` answers.

    **Raises** `MissingExtra` without sympy.
    """
    if not seconds > 0:
        raise UsageError(f"`seconds` must be positive, got {seconds}.")
    try:
        import sympy
    except ImportError:
        raise MissingExtra("sympy", "formula", "printing a formula as LaTeX") from None
    found: list[str] = []

    def work() -> None:
        try:
            found.append(sympy.latex(_expression(node, sympy), order="none", mul_symbol="dot"))
        except Exception:  # also of recursion: the answer below does without sympy
            return

    # The interpreter does not wait for a daemon: what takes too long is left behind.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else plain_latex(node)


def _expression(node: Node, sympy: Any) -> Any:
    """The sympy expression of a tree, with nothing evaluated."""
    if is_constant(node):
        whole = float(node.value).is_integer() and abs(node.value) < 1e15
        return sympy.Integer(int(node.value)) if whole else sympy.Float(repr(node.value))
    if not node.args:
        return sympy.Symbol(SYMBOLS[node.name])
    args = [_expression(arg, sympy) for arg in node.args]
    x, y = args[0], args[-1]
    plain = {"evaluate": False}
    minus_one = sympy.Integer(-1)
    match node.name:
        case "add":
            return sympy.Add(x, y, **plain)
        case "sub":
            return sympy.Add(x, sympy.Mul(minus_one, y, **plain), **plain)
        case "mul":
            return sympy.Mul(x, y, **plain)
        case "div":
            return sympy.Mul(x, sympy.Pow(y, minus_one, **plain), **plain)
        case "neg":
            return sympy.Mul(minus_one, x, **plain)
        case "invert":
            return sympy.Pow(x, minus_one, **plain)
        case "square":
            return sympy.Pow(x, sympy.Integer(2), **plain)
        case "sqrt":
            return sympy.Pow(x, sympy.Rational(1, 2), **plain)
        case "exp":
            return sympy.exp(x, **plain)
        case "log":
            return sympy.log(x, **plain)
        case "abslog":
            return sympy.log(sympy.Abs(x, **plain), **plain)
        case "abs":
            return sympy.Abs(x, **plain)
    return sympy.Function(node.name)(x)


def plain_latex(node: Node) -> str:
    """LaTeX by ourselves, with a parenthesis wherever one could be needed."""
    if is_constant(node):
        digits, _, power = number_text(node.value).partition("e")
        text = rf"{digits} \cdot 10^{{{int(power)}}}" if power else digits
        return rf"\left({text}\right)" if power or node.value < 0 else text
    if not node.args:
        return SYMBOLS[node.name]
    parts = [plain_latex(arg) for arg in node.args]
    x, y = parts[0], parts[-1]
    bracketed = rf"\left({x}\right)"
    match node.name:
        case "add":
            return rf"\left({x} + {y}\right)"
        case "sub":
            return rf"\left({x} - {y}\right)"
        case "mul":
            return (
                rf"{x} \cdot {y}" if node.args[1].name != "neg" else rf"{x} \cdot \left({y}\right)"
            )
        case "div":
            return rf"\frac{{{x}}}{{{y}}}"
        case "neg":
            return rf"-{bracketed}"
        case "invert":
            return rf"\frac{{1}}{{{x}}}"
        case "square":
            return rf"{bracketed}^{{2}}"
        case "sqrt":
            return rf"\sqrt{{{x}}}"
        case "exp":
            return rf"e^{{{x}}}"
        case "log":
            return rf"\log {bracketed}"
        case "abslog":
            return rf"\log \left|{x}\right|"
        case "abs":
            return rf"\left|{x}\right|"
    return rf"\operatorname{{{node.name}}}{bracketed}"
