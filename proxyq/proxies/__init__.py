"""Proxies: one file each, from recorded taps to scores."""

from proxyq.proxies._orthogonality import orthogonality as orthogonality
from proxyq.proxies._output_error import output_error as output_error
from proxyq.proxies._separability import separability as separability
from proxyq.proxies._sqnr import sqnr as sqnr
from proxyq.proxies._trivial import macs as macs
from proxyq.proxies._trivial import params as params
from proxyq.proxies._trivial import random as random
from proxyq.proxies._trivial import uniform as uniform
from proxyq.proxies._weight_mse import weight_mse as weight_mse
from proxyq.proxies.cost import COSTS as COSTS
from proxyq.proxies.cost import as_cost as as_cost
from proxyq.proxies.proxy import PROXIES as PROXIES
from proxyq.proxies.proxy import Proxy as Proxy
from proxyq.proxies.proxy import Scores as Scores
from proxyq.proxies.proxy import make_proxy as make_proxy
from proxyq.proxies.proxy import register as register
