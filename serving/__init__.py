"""`emoshare serve`: the pipeline as an HTTP service."""
