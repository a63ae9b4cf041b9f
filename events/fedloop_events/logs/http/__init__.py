"""The device's side of a gateway: the log and the blobs of a deployment over HTTPS, for who holds no broker connection."""

from fedloop_events.logs.http.log import GatewayLog

__all__ = ["GatewayLog"]
