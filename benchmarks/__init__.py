"""Speed, measured against its peers on the same guest in the same run: `python -m benchmarks.engine` and others."""
