"""Which training pays: arms of one recipe on equal tokens and equal time, over several seeds, with intervals.

`settings.py` says what is compared, `arms.py` makes the runs (`trl_arm.py` those of TRL), `curves.py` reads them,
`figures.py` does the statistics, `tables.py` and `sheets.py` write what people look at.
"""

from pertoken.compare.arms import compare
from pertoken.compare.settings import CompareConfig, Plan, load_comparison

__all__ = ["CompareConfig", "Plan", "compare", "load_comparison"]
