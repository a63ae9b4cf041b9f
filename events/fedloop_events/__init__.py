"""The log and what is in it: event types, envelope, the `EventLog` port and its adapters, blobs, signatures, projections."""
