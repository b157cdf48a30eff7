"""Conversations in the terminal: files of segments, speech that is found, and files of what was predicted."""
