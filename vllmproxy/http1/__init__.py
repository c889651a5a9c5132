"""HTTP/1.1 on the wire, both ways: a strict server channel and a pooled client, on httptools (llhttp).

It knows nothing of keys, limits or vLLM: a request's head goes to a handler, bytes go to receivers.
"""
