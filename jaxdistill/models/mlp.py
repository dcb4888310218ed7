# SPDX-License-Identifier: Apache-2.0
"""Multi-layer perceptrons."""

from flax import linen as nn

from jaxdistill.types import Outputs


class MLP(nn.Module):
    """Dense layers with ReLU between them; `MLP((512, 256, 10))` has two hidden layers.

    Attributes:
      features: widths of all layers but the input, a tuple whose last is the classes.
      input_dropout: dropout rate on the flattened input.
      dropout: dropout rate on each hidden layer.
    """

    features: tuple[int, ...]
    input_dropout: float = 0.0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, C]` and the hidden layers after ReLU, from inputs `[B, ...]`."""
        del mask  # no layer here looks across examples
        x = inputs.reshape(inputs.shape[0], -1)
        x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
        hiddens = []
        for width in self.features[:-1]:
            x = nn.relu(nn.Dense(width)(x))
            hiddens.append(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.features[-1])(x), tuple(hiddens))
