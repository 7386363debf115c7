# SPDX-License-Identifier: GPL-2.0-or-later
"""Moments of a machine: snapshots in memory and in files."""
