# SPDX-License-Identifier: Apache-2.0
"""A table of trainings: arms by seeds, each with its teacher and its controls.

`arm`         one line of the table: a network, what it learns, and from whom
`study`       trains arms on one task, in one resumable run
`comparison`  `compare`: all arms for all seeds, and the run's summary
`script`      flags that scripts share, how they begin and what they end with
`stores`      a study's examples with stored teacher outputs beside them
`sweep`       many students in one program: hyperparameters and seeds by vmap
"""

from jaxdistill.study import script, sweep
from jaxdistill.study.arm import Arm, few_labels
from jaxdistill.study.comparison import compare
from jaxdistill.study.study import Study
