"""Conversations on the command line: segment files, speech detection, and files of predictions."""
