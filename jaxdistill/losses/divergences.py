# SPDX-License-Identifier: Apache-2.0
"""What else than the forward KL tells two distributions over the classes apart."""

import jax.numpy as jnp

from jaxdistill.losses.logits import Logits, Values, tempered
from jaxdistill.losses.numerics import divergence
from jaxdistill.types import is_concrete


def reverse_kl(student: Logits, teacher: Logits, *, temperature=1.0) -> Values:
    """Temperature-scaled Kullback-Leibler divergence from student to teacher.

    `T^2 sum_c q[c] (log q[c] - log p[c])`, zero exactly when the two distributions are
    equal. It prefers one of the teacher's modes to covering them all. Student mass on a
    class that the teacher excludes (-inf) gives the true value, +inf; the gradient is
    then that of the other classes.

    Args:
      student: `[..., C]` logits of any float type.
      teacher: `[..., C]` logits; no gradient flows into them.
      temperature: `T > 0`, applied to both sides; may be traced.

    Returns:
      `[...]` values in nats times `T^2`, at least float32.

    Raises:
      ValueError: shapes differ, or the temperature is not above 0.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([jnp.log(3.0), 0.0])
    >>> print(f"{reverse_kl(student, teacher):.4f}")  # 1/2 log 2/3 + 1/2 log 2
    0.1438

    References:
      Gu et al. 2024, MiniLLM: Knowledge Distillation of Large Language Models,
      section 2.1.
    """
    log_q, log_p = tempered("reverse_kl", student, teacher, temperature)
    lost = (log_q > -jnp.inf) & (log_p == -jnp.inf)
    values = divergence(log_q, jnp.where(lost, log_q, log_p))
    # Added: a choice between the two would cut the gradient.
    return (values + jnp.where(lost.any(-1), jnp.inf, 0)) * temperature**2


def generalized_jsd(
    student: Logits, teacher: Logits, *, beta=0.5, temperature=1.0
) -> Values:
    """Generalized Jensen-Shannon divergence between teacher and student.

    `T^2 (beta KL(p || m) + (1 - beta) KL(q || m))` with `m = beta p + (1 - beta) q`:
    zero exactly when the two distributions are equal, never above `T^2 log 2`. Over
    `beta` it tends to the forward KL as `beta -> 0`, over `1 - beta` to the reverse KL
    as `beta -> 1`; the divergence itself tends to 0 at both ends.

    Args:
      student: `[..., C]` logits of any float type.
      teacher: `[..., C]` logits; no gradient flows into them.
      beta: the teacher's share of the mixture, `0 < beta < 1`; may be traced.
      temperature: `T > 0`, applied to both sides; may be traced.

    Returns:
      `[...]` values in nats times `T^2`, at least float32.

    Raises:
      ValueError: shapes differ, the temperature is not above 0, or `beta` is not
        between 0 and 1.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([9.0, -jnp.inf]), jnp.array([-jnp.inf, 9.0])
    >>> print(generalized_jsd(student, teacher))  # nothing in common: log 2
    0.6931472

    References:
      Agarwal et al. 2024, On-Policy Distillation of Language Models (GKD), equation 1.
    """
    if is_concrete(beta) and not 0 < beta < 1:
        raise ValueError(
            f"generalized_jsd: beta must lie between 0 and 1, got {beta}; at the ends "
            "use forward_kl or reverse_kl"
        )
    log_q, log_p = tempered("generalized_jsd", student, teacher, temperature)
    some = (log_p > -jnp.inf) | (log_q > -jnp.inf)
    log_m = jnp.where(
        some,
        jnp.logaddexp(
            jnp.log(beta) + jnp.where(some, log_p, 0),
            jnp.log1p(-beta) + jnp.where(some, log_q, 0),
        ),
        -jnp.inf,
    )
    mixed = beta * divergence(log_p, log_m) + (1 - beta) * divergence(log_q, log_m)
    return mixed * temperature**2


def total_variation(student: Logits, teacher: Logits, *, temperature=1.0) -> Values:
    """Total variation distance between the tempered distributions, times `T^2`.

    `T^2 / 2 sum_c |p[c] - q[c]|`: zero exactly when the two distributions are equal,
    `T^2` when they have no class in common.

    Args:
      student: `[..., C]` logits of any float type.
      teacher: `[..., C]` logits; no gradient flows into them.
      temperature: `T > 0`, applied to both sides; may be traced.

    Returns:
      `[...]` values, a probability times `T^2`, at least float32.

    Raises:
      ValueError: shapes differ, or the temperature is not above 0.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([jnp.log(3.0), 0.0])
    >>> print(total_variation(student, teacher).round(4))  # 3/4 - 1/2
    0.25

    References:
      Wen et al. 2023, f-Divergence Minimization for Sequence-Level Knowledge
      Distillation, section 3 (TVD).
    """
    log_q, log_p = tempered("total_variation", student, teacher, temperature)
    return jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1) / 2 * temperature**2
