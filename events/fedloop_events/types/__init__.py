"""The event types: what each topic of the log can hold, a file for each topic.

Every type is frozen, refuses unknown fields, and bounds what it holds. A type's name carries its version
(`io.fedloop.<noun>.<verb>.v<n>`); `envelope` upcasts older versions. What a client signs names the deployment (`origin`), the
client and the client's own dense sequence number `seq`, so that a signed event cannot be replayed elsewhere. What the server
signs names its `epoch`: an event of an epoch that is not the latest one at its place in the log counts for nothing.
"""

from fedloop_events.types.audit import *  # noqa: F403
from fedloop_events.types.clients import *  # noqa: F403
from fedloop_events.types.feedback import *  # noqa: F403
from fedloop_events.types.fields import *  # noqa: F403
from fedloop_events.types.metrics import *  # noqa: F403
from fedloop_events.types.payload import *  # noqa: F403
from fedloop_events.types.quarantine import *  # noqa: F403
from fedloop_events.types.releases import *  # noqa: F403
from fedloop_events.types.rounds import *  # noqa: F403
from fedloop_events.types.scored import *  # noqa: F403
from fedloop_events.types.training import *  # noqa: F403
from fedloop_events.types.updates import *  # noqa: F403
