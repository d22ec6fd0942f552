"""One file per kernel: the Triton function and the wrapper that checks arguments and picks block sizes."""
