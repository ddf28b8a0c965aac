"""Many adapters behind one address: one backbone in memory, the adapter of each request by its name."""
