"""Where pictures come from beside uploads, folders and cameras, and where verdicts go."""
