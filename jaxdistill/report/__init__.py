# SPDX-License-Identifier: Apache-2.0
"""From logs to tables and figures."""
