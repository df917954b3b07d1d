"""Every op that is checked and timed, in the order of the report."""

from scripts.bench.case import Case
from scripts.bench.forms import FORMS
from scripts.bench.ops import OWED
from scripts.bench.other_ops import OTHERS

CASES: tuple[Case, ...] = (*OWED, *FORMS, *OTHERS)
