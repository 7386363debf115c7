# SPDX-License-Identifier: GPL-2.0-or-later
"""The test kit: what a debugging session has shown becomes a test that runs for ever."""
