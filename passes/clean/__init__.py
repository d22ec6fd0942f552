"""One form for each meaning: canonical forms, dead code, constants, positions, scalars."""
