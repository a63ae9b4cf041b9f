"""The gateway: a deployment's log and blobs over HTTPS, for devices that hold no connection to the broker."""

from fedloop_server.gateway.app import create_app
from fedloop_server.gateway.limits import Limits

__all__ = ["Limits", "create_app"]
