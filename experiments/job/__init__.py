"""From a configuration to what trains: network, optimizer, method, steps."""
