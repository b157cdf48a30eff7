"""The commands of `emoshare`: a module each, imported when its arguments are found to be right."""
