"""The executor process: weights, KV cache, streams, lanes. Knows slots, positions and tokens; never a request or text."""
