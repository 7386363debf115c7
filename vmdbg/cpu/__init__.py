"""What the processor does that the engine leaves to us: events, system instructions, task switches, I/O."""
