"""Routers and experts, however a model writes them, to `moe.route` and `moe.experts`."""
