# SPDX-License-Identifier: Apache-2.0
"""Which steps are taken together: between evaluations, and in a dispatch."""

from collections.abc import Iterator

from jaxdistill.data.stream import STEPS


def check_steps(steps: int, *intervals: int | None) -> None:
    """Raise ValueError at a number of steps that a training cannot have."""
    if not 0 <= steps <= STEPS:
        raise ValueError(
            f"a training takes 0 to {STEPS:,} steps, as many as an int32 counts, got "
            f"{steps:,}"
        )
    for every in intervals:
        if every is not None and every < 1:
            raise ValueError(
                "evaluate_every, checkpoint_every and steps_per_dispatch are at least "
                f"1, got {every}"
            )


def interval(steps: int, evaluations: int) -> int:
    """Steps between evaluations, of which there are about so many.

    As many as divide the steps, where a number up to half as many again, or more than
    half as many, does: one shorter stretch at the end would be one more program to
    compile.

    >>> interval(100, 10)
    10
    >>> interval(78, 5)  # six, and not four of 16 steps and one of 14
    13
    >>> interval(23, 4)
    6

    Raises:
      ValueError: fewer than 1 evaluation.
    """
    if evaluations < 1:
        raise ValueError(f"a training has at least 1 evaluation, got {evaluations}")
    evaluations = max(1, min(evaluations, steps))
    low, high = evaluations // 2 + 1, 3 * evaluations // 2
    for gap in range(min(evaluations, NEAR)):
        for n in (evaluations - gap, evaluations + gap):
            if low <= n <= high and steps % n == 0:
                return max(1, steps // n)
    return max(1, -(-steps // evaluations))


NEAR = 1000
"""How far from the number asked for another is looked for."""


def dispatches(
    done: int, total: int, every: int, most: int
) -> Iterator[tuple[int, int]]:
    """`(start, stop)` of the dispatches after step `done`.

    Each stretch of `every` steps is cut into equal parts, of two sizes at most, and of
    one where less than twice as many can be: the boundaries do not depend on where a
    run was interrupted, and little compiles late, the last stretch where it is shorter.
    A run that other boundaries interrupted goes on from there to the next.

    >>> list(dispatches(0, 10, 5, 3))
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    >>> list(dispatches(0, 12, 6, 4))
    [(0, 3), (3, 6), (6, 9), (9, 12)]
    >>> list(dispatches(4, 12, 6, 6))
    [(4, 6), (6, 12)]
    """
    parts = -(-every // most)
    parts = next((n for n in range(parts, 2 * parts) if every % n == 0), parts)
    for base in range(done - done % every, total, every):
        for i in range(parts):
            low, high = every * i // parts, every * (i + 1) // parts
            start, stop = max(base + low, done), min(base + high, total)
            if start < stop:
                yield start, stop
