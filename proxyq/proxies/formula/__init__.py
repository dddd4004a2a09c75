"""Proxy formulas as data: trees, their text, their values for many at once, and their files."""

from proxyq.proxies.formula.canonical import canonical as canonical
from proxyq.proxies.formula.evaluate import GUARDED as GUARDED
from proxyq.proxies.formula.evaluate import TINY as TINY
from proxyq.proxies.formula.evaluate import evaluate as evaluate
from proxyq.proxies.formula.evaluate import totals as totals
from proxyq.proxies.formula.file import Formula as Formula
from proxyq.proxies.formula.file import available_formulas as available_formulas
from proxyq.proxies.formula.file import load_formula as load_formula
from proxyq.proxies.formula.grammar import OPERATIONS as OPERATIONS
from proxyq.proxies.formula.grammar import STATISTICS as STATISTICS
from proxyq.proxies.formula.grammar import Node as Node
from proxyq.proxies.formula.grammar import constant as constant
from proxyq.proxies.formula.grammar import rooted as rooted
from proxyq.proxies.formula.latex import to_latex as to_latex
from proxyq.proxies.formula.random import grow as grow
from proxyq.proxies.formula.statistics import Statistics as Statistics
from proxyq.proxies.formula.text import parse_formula as parse_formula
from proxyq.proxies.formula.text import print_formula as print_formula
