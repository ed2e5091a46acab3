"""The wire between Tandem's processes: message schema, frames, rings, doorbells, sockets, config, errors.

Imports nothing of the other folders and neither torch nor transformers.
"""
