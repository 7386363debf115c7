"""Boot protocols and image formats."""
