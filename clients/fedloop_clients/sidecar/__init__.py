"""The sidecar: a device's agent behind the HTTP interface that programs for OpenAI's models speak."""
