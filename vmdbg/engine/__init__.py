"""The Unicorn engine: the only package that knows it."""
