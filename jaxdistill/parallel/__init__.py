# SPDX-License-Identifier: Apache-2.0
"""One step, several ways to run it, on devices of one process or of several.

`partitioner`  jit on one device, a mesh, fsdp or pmap; `choose` takes one by its name
`sharding`     where each array lies under fsdp
`lock`         one owner of a folder that is written
`sealed`       JSON files with a checksum inside
`processes`    what several processes do together, and what the first does alone
"""

from jaxdistill.parallel import processes
from jaxdistill.parallel.partitioner import (
    AXIS,
    Kind,
    Partitioner,
    choose,
    fsdp,
    jit,
    mesh,
    pmap,
)
from jaxdistill.parallel.sharding import cut_width
