"""The commands of `emoshare`, one module each, imported after its arguments have been checked."""
