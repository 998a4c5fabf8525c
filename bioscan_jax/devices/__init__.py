"""Devices: the mesh and its sharding rules, processes, signals, what is known of chips."""
