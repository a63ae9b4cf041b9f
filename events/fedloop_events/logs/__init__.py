"""The event log: one port, and its adapters for a file, for Kafka and for a gateway over HTTP."""
