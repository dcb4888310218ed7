# SPDX-License-Identifier: Apache-2.0
"""What teaches: a model in the step, several of them, or outputs computed once.

`forward`       a model that runs in the student's step; several as one
`store`         a teacher's outputs on disk, written once and read by many
`manifest`      what a store says of itself, so that it is not taken for another
`outputs`       what is stored of a batch, and how a step gets it back
`views`         of which views of the examples stored outputs are
`knowledge`     whether a teacher knows the labels: one that does not is refused
`fingerprints`  digests of models and of arrays
`programs`      what functions compute, so that two of them can be told apart
"""

from jaxdistill.teachers import fingerprints, store
from jaxdistill.teachers.forward import (
    Ensemble,
    MeanLogits,
    ensemble,
    live,
    mean_logits,
    with_classes,
    with_logits,
)
from jaxdistill.teachers.knowledge import TeacherError, check_knowledge, control
from jaxdistill.teachers.manifest import StoreError
from jaxdistill.teachers.outputs import StoredTeacher
from jaxdistill.teachers.views import StoredOutputs, View
