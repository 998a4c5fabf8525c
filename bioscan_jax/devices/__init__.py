"""Devices: the mesh and its sharding rules, processes, signals, chip specifications."""
