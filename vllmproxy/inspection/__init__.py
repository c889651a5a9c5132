"""What a request's body says of model, stream and tokens, and the few splices made in it: bytes in, values out."""
