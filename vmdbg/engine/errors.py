"""What the engine raises."""


class EngineError(RuntimeError):
    """The engine cannot be trusted or cannot go on: the message names the cause and the remedy."""
