"""Formulas as text: `sum(square(D) * mean(square(G)))`.

    expression := term (("+" | "-") term)*
    term       := factor (("*" | "/") factor)*
    factor     := "-" factor | number | name | name "(" expression ("," expression)* ")"
                | "(" expression ")"

Names are those of `grammar.py`; `add`, `sub`, `mul`, `div` and `neg` may also be written as
functions. A minus before a number is part of the number. What is printed can be parsed, and gives
the same tree. The text is only ever compared with names, never run.
"""

import math
import re
from typing import NamedTuple, NoReturn

from proxyq.errors import UsageError, near
from proxyq.proxies.formula.grammar import (
    CONSTANT,
    MAX_DEPTH,
    MAX_NODES,
    OPERATIONS,
    STATISTICS,
    Node,
    is_constant,
)

MAX_CHARACTERS = 10_000
MAX_DIGITS = 32
SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_BINARY = {sign: name for name, sign in SIGNS.items()}
_LEVEL = {"add": 1, "sub": 1, "mul": 2, "div": 2}
_TOKEN = re.compile(
    r"(?P<space>[ \t\r\n]+)"
    r"|(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<sign>[-+*/(),])"
)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


def parse_formula(text: str) -> Node:
    """The tree that `text` says.

    **Raises** `UsageError`: one sentence with the character (counted from 1) where it is wrong.
    """
    if not isinstance(text, str):
        raise UsageError(f"a formula must be text, got {type(text).__name__}.")
    if len(text) > MAX_CHARACTERS:
        raise UsageError(
            f"a formula must have at most {MAX_CHARACTERS} characters, got {len(text)}."
        )
    return _Parser(_tokens(text)).whole()


def print_formula(node: Node) -> str:
    """The text of a tree, with as few parentheses as it takes."""
    if is_constant(node):
        return number_text(node.value)
    if not node.args:
        return node.name
    if node.name == "neg" and not is_constant(node.args[0]):
        # -2 is a number: the negative of a number is neg(2).
        inner = print_formula(node.args[0])
        return f"-({inner})" if _binds(node.args[0]) < 3 else f"-{inner}"
    if node.name not in SIGNS:
        return f"{node.name}({', '.join(map(print_formula, node.args))})"
    level = _LEVEL[node.name]
    left, right = map(print_formula, node.args)
    # a - b + c is (a - b) + c: at the same level only what stands on the right needs parentheses.
    if _binds(node.args[0]) < level:
        left = f"({left})"
    if _binds(node.args[1]) <= level:
        right = f"({right})"
    return f"{left} {SIGNS[node.name]} {right}"


def number_text(value: float) -> str:
    """The shortest text that reads back as the same number."""
    text = repr(value)
    return text.removesuffix(".0") if "e" not in text else text


def _binds(node: Node) -> int:
    """How firmly a node holds together as text: 3 for what needs no parentheses anywhere."""
    return _LEVEL.get(node.name, 3)


def _tokens(text: str) -> list[_Token]:
    tokens, position = [], 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            _wrong(f"unexpected {text[position]!r}", position)
        kind = str(found.lastgroup)
        if kind == "number" and len(found.group()) > MAX_DIGITS:
            _wrong(f"a number must have at most {MAX_DIGITS} characters", position)
        if kind != "space":
            tokens.append(_Token(kind, found.group(), position))
        position = found.end()
    return [*tokens, _Token("end", "", len(text))]


def _wrong(problem: str, start: int) -> NoReturn:
    raise UsageError(f"the formula is wrong at character {start + 1}: {problem.rstrip('.')}.")


class _Parser:
    """Reads tokens from left to right; `nested` counts what is open, so that no stack runs out."""

    def __init__(self, tokens: list[_Token]):
        self.tokens = tokens
        self.position = 0
        self.nodes = 0

    @property
    def next(self) -> _Token:
        return self.tokens[self.position]

    def take(self) -> _Token:
        self.position += 1
        return self.tokens[self.position - 1]

    def expect(self, sign: str) -> None:
        if self.next.text != sign:
            _wrong(f"expected {sign!r}, got {_shown(self.next)}", self.next.start)
        self.take()

    def node(self, token: _Token, name: str, *args: Node, value: float = 0.0) -> Node:
        # Counted before trees are joined: the sentence then points at the first that is too much.
        self.nodes += 1
        if self.nodes > MAX_NODES:
            _wrong(f"a formula must have at most {MAX_NODES} nodes", token.start)
        try:
            return Node(name, args, value)
        except UsageError as error:
            _wrong(str(error), token.start)

    def whole(self) -> Node:
        if self.next.kind == "end":
            _wrong("it is empty", 0)
        node = self.expression(1, 0)
        if self.next.kind != "end":
            _wrong(f"expected an operator or the end, got {_shown(self.next)}", self.next.start)
        return node

    def expression(self, level: int, nested: int) -> Node:
        """Operators that bind at least as firmly as `level`."""
        left = self.factor(nested)
        while self.next.kind == "sign" and self.next.text in _BINARY:
            if _LEVEL[_BINARY[self.next.text]] < level:
                break
            sign = self.take()
            right = self.expression(_LEVEL[_BINARY[sign.text]] + 1, nested)
            left = self.node(sign, _BINARY[sign.text], left, right)
        return left

    def factor(self, nested: int) -> Node:
        token = self.take()
        if nested > MAX_DEPTH:
            _wrong(f"a formula must be at most {MAX_DEPTH} levels deep: nest less", token.start)
        if token.text == "-":
            if self.next.kind == "number":
                number = self.take()
                return self.node(number, CONSTANT, value=-_number(number))
            return self.node(token, "neg", self.factor(nested + 1))
        if token.kind == "number":
            return self.node(token, CONSTANT, value=_number(token))
        if token.text == "(":
            inside = self.expression(1, nested + 1)
            self.expect(")")
            return inside
        if token.kind != "name":
            _wrong(f"expected a name, a number or '(', got {_shown(token)}", token.start)
        return self.named(token, nested)

    def named(self, token: _Token, nested: int) -> Node:
        if token.text not in OPERATIONS and token.text not in STATISTICS:
            called = self.next.text == "("
            kind, known = ("operation", OPERATIONS) if called else ("statistic", STATISTICS)
            name = token.text[:40]
            _wrong(f"unknown {kind} {name!r}: {near(name, list(known))}", token.start)
        if token.text in STATISTICS:
            if self.next.text == "(":
                _wrong(f"{token.text!r} is a statistic and takes no arguments", token.start)
            return self.node(token, token.text)
        if self.next.text != "(":
            _wrong(f"{token.text!r} must be followed by '('", token.start)
        self.take()
        args = [self.expression(1, nested + 1)]
        while self.next.text == ",":
            self.take()
            args.append(self.expression(1, nested + 1))
        self.expect(")")
        return self.node(token, token.text, *args)


def _number(token: _Token) -> float:
    value = float(token.text)
    if not math.isfinite(value):
        _wrong(f"a number must be finite, got {token.text}", token.start)
    return value


def _shown(token: _Token) -> str:
    return "the end" if token.kind == "end" else repr(token.text[:40])
