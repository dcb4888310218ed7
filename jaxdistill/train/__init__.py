# SPDX-License-Identifier: Apache-2.0
"""The training step, the loop around it, and what a run leaves on disk.

`step`        the pure train and eval steps, and the only reduction to a scalar
`recipe`      what a step is made of, kept with it
`loop`        `fit`: many steps, with evaluation, logs, checkpoints and resume
`intervals`   which steps are taken together
`identity`    what makes a training what it is, to which its checkpoints belong
`checkpoint`  Orbax checkpoints that know when they are damaged
`evaluation`  metrics on a data set, and `Evaluator`
`run_dir`     a run's directory, a command's settings and its errors
`saved`       a trained model and its module, below a run directory
`cost`        parameters, FLOPs, memory and time of a model
`memory`      what a batch needs on a device, told where it did not fit

Importing this folder does not import Orbax: the first checkpoint does.
"""

from jaxdistill.train import cost
from jaxdistill.train.checkpoint import CheckpointError, Checkpoints
from jaxdistill.train.evaluation import Evaluator, classification, language
from jaxdistill.train.intervals import interval
from jaxdistill.train.loop import NonFiniteLoss, begin, fit
from jaxdistill.train.memory import OutOfMemory
from jaxdistill.train.run_dir import (
    RunDir,
    RunError,
    environment,
    exit_with_message,
    parse,
    settings,
)
from jaxdistill.train.saved import load_model, save_model
from jaxdistill.train.step import (
    init_state,
    make_eval_step,
    make_train_step,
    scan_eval,
    scan_train,
)
