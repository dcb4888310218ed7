# SPDX-License-Identifier: Apache-2.0
"""Students that compute in eight bits while they learn.

module = quantized(models.MLP((16, 10)))     # the same parameters
state = fit(init_state(rng, student(module), ...), ...)
model = models.trained(models.MLP((16, 10)), state)   # in float, for the export
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxdistill.runtimes import need


def quantized(module: nn.Module) -> Any:
    """The module, every product of its layers rounded to eight bits on both sides.

    Weights and what they are multiplied with are divided by their largest magnitude
    over the whole array, and rounded to 8-bit integers; the gradient of a product is
    that of what was not yet rounded (straight through). Sums, biases and what lies
    between two products stay as they are. A student so trained has met rounding to
    eight bits, but not quite that of `jaxdistill export --int8 static`: an ONNX file
    has a range for each channel of the weights, and rounds what comes in and out of a
    product by fixed ranges, not symmetric, of 256 training examples.

    Args:
      module: linen, of dense and convolutional layers.

    Returns:
      A module with the parameters and outputs of the given one. It is another each
      time: make it once, or its step compiles again.

    Raises:
      ArtefactError: qwix is not installed.

    References:
      Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference, section 3.
    """
    qwix = need("qwix", "quantize")
    rule = qwix.QtRule(
        weight_qtype=jnp.int8, act_qtype=jnp.int8, disable_channelwise_axes=True
    )
    return qwix.quantize_model(module, qwix.QtProvider([rule]))
