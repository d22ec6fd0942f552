"""How rules are matched and applied: the pattern language, the matcher, the engine, and explain."""
