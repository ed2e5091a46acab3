"""The executor process: weights, KV cache, streams, lanes. Knows slots, positions, tokens; never a request or text."""
