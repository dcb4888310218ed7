# SPDX-License-Identifier: Apache-2.0
"""Many students in one program: a grid of hyperparameters and seeds, by vmap.

    trials = grid(temperature=[1.0, 4.0], learning_rate=[1e-3, 3e-3], seed=range(5))
    partitioner = choose(trials)
    students = train(trials, module, make_objective, make_optimizer,
                     partitioner=partitioner, ...)

A trial is a mapping of traced numbers. `make_objective(trial)` and
`make_optimizer(trial)` are called once, under vmap: one compilation serves the whole
grid. A small student leaves most of a device idle; thirty of them share one teacher,
one batch and one dispatch. What each trial has for itself (its labels, its teacher) is
`PerTrial`.
"""

from jaxdistill.study.sweep.devices import (
    Division,
    choose,
    compile_sweep,
    divide,
    group_for,
    use_cores,
)
from jaxdistill.study.sweep.steps import (
    in_groups,
    init_states,
    make_sweep_step,
    scan_sweep,
    select_trial,
    trial_state,
)
from jaxdistill.study.sweep.training import train
from jaxdistill.study.sweep.trials import PerTrial, Trial, grid, size, stack
