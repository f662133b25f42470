class DataError(ValueError):
    """Data that cannot be used. The message names the file, the item, and what to do."""
