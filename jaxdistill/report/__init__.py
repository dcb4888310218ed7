# SPDX-License-Identifier: Apache-2.0
"""From a run's logs to tables and figures.

`tables`      a summary of results, its table, and a run's tables copied into pages
`figures`     curves, comparisons, heat maps and frontiers
`deployed`    the table of what exported models cost in their runtimes
`statistics`  means with their spread, paired differences, and the metrics compared
"""

from jaxdistill.report import figures
from jaxdistill.report.figures import markdown_table
from jaxdistill.report.statistics import holm, paired, spread
from jaxdistill.report.tables import (
    fill,
    save,
    summarize,
    table,
    write,
)
