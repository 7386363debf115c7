"""Moments of a machine: snapshots in memory and in files."""
