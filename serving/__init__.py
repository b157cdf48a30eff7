"""`emoshare serve`: the pipeline behind HTTP."""
