# SPDX-License-Identifier: Apache-2.0
"""One step, several ways to run it: jit, a mesh, fsdp, pmap; several processes."""
