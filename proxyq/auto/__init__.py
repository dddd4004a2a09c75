"""Plans that are measured before they are believed: a portfolio, a judge, and refinement."""

from proxyq.auto.choose import HELD_BACK as HELD_BACK
from proxyq.auto.choose import check_effort as check_effort
from proxyq.auto.choose import choose as choose
from proxyq.auto.choose import improve as improve
from proxyq.auto.judge import Judge as Judge
from proxyq.auto.judge import halves as halves
from proxyq.auto.refine import refine as refine
