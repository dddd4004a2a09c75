"""Evolution of proxy formulas: typed trees, fitness on measured tables, the loop."""

from proxyq.search.evolve.fitness import Fold as Fold
from proxyq.search.evolve.loop import State as State
from proxyq.search.evolve.loop import evolve as evolve
from proxyq.search.evolve.settings import METHODS as METHODS
from proxyq.search.evolve.settings import Settings as Settings
from proxyq.search.evolve.settings import settings as settings
from proxyq.search.evolve.structures import STRUCTURES as STRUCTURES
