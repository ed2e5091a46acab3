"""The scheduler process: the only truth about every request. Imports `ipc` only; never torch or transformers."""
