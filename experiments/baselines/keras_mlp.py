# SPDX-License-Identifier: Apache-2.0
"""The articles' job by Keras's own `Distiller`, on its JAX backend.

Its loss is given as a `KLDivergence` object: by the name "kl_divergence", the default,
it takes logits for probabilities and is no KL. Keras reads KERAS_BACKEND when it is
imported, so this module sets it first.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np

os.environ["KERAS_BACKEND"] = "jax"

import keras  # noqa: E402


def mlp(layers: Sequence[tuple[np.ndarray, np.ndarray]], *, trainable: bool):
    """A model of dense layers with these `(kernel, bias)`, ReLU between them."""
    stack = [keras.layers.Input((layers[0][0].shape[0],))]
    stack += [keras.layers.Dense(k.shape[1], "relu") for k, _ in layers[:-1]]
    stack.append(keras.layers.Dense(layers[-1][0].shape[1]))
    model = keras.Sequential(stack)
    model.set_weights([np.asarray(x) for layer in layers for x in layer])
    model.trainable = trainable
    return model


def distill(
    student,
    teacher,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    learning_rate: float,
    temperature: float,
    hard_weight: float,
) -> Callable[[], float]:
    """A function that trains the student for one epoch; the epoch's mean loss.

    The loss is `hard CE + (1 - hard) T^2 KL`.
    """
    kl = keras.losses.KLDivergence()
    soft = keras.distillation.LogitsDistillation(temperature=temperature, loss=kl)
    distiller = keras.distillation.Distiller(
        teacher, student, soft, student_loss_weight=hard_weight
    )
    distiller.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def epoch() -> float:
        history = distiller.fit(
            images, labels, batch_size=batch_size, epochs=1, verbose=0
        )
        return float(history.history["loss"][0])

    return epoch
