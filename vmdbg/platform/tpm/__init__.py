"""A small TPM 2.0: measurement and random numbers, without keys."""
