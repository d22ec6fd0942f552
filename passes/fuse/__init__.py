"""Norms, rotary embedding, attention, masks and gated MLPs to one op each, and linear layers merged."""
