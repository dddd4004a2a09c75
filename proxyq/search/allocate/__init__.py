"""Choosing a bit-width per layer: a problem, hard budgets, a solver, a plan."""

from proxyq.search.allocate.assignment import Assignment as Assignment
from proxyq.search.allocate.assignment import Status as Status
from proxyq.search.allocate.assignment import finish as finish
from proxyq.search.allocate.assignment import verify as verify
from proxyq.search.allocate.budget import Budget as Budget
from proxyq.search.allocate.budget import budget_steps as budget_steps
from proxyq.search.allocate.budget import parse_budget as parse_budget
from proxyq.search.allocate.budget import parse_budgets as parse_budgets
from proxyq.search.allocate.build import LayerLike as LayerLike
from proxyq.search.allocate.build import build_problem as build_problem
from proxyq.search.allocate.build import shared_by as shared_by
from proxyq.search.allocate.dispatch import SOLVERS as SOLVERS
from proxyq.search.allocate.dispatch import Solver as Solver
from proxyq.search.allocate.dispatch import solve as solve
from proxyq.search.allocate.dp import dp as dp
from proxyq.search.allocate.exhaustive import exhaustive as exhaustive
from proxyq.search.allocate.feasible import Reach as Reach
from proxyq.search.allocate.feasible import reachable as reachable
from proxyq.search.allocate.greedy import greedy as greedy
from proxyq.search.allocate.ilp import ilp as ilp
from proxyq.search.allocate.lp import lp as lp
from proxyq.search.allocate.outliers import without_outliers as without_outliers
from proxyq.search.allocate.problem import InfeasibleError as InfeasibleError
from proxyq.search.allocate.problem import Limit as Limit
from proxyq.search.allocate.problem import Pin as Pin
from proxyq.search.allocate.problem import Problem as Problem
