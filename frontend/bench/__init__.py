"""`engine-bench`: load for any server of the OpenAI API, and what its users would have seen.

A client like any other: it imports nothing of the engine but the clock. `workloads` says what is asked, `load` asks
it and takes times, `report` turns times into numbers and pictures, `cli` connects them.
"""
