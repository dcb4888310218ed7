# SPDX-License-Identifier: Apache-2.0
"""Weights and tokenizers of Hugging Face and PyTorch, as linen variables."""
