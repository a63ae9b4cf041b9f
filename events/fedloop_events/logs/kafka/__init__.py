"""The event log on Apache Kafka.

How events look there is the CloudEvents Kafka protocol binding in binary mode
(https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md).
"""

from fedloop_events.logs.kafka.log import KafkaLog

__all__ = ["KafkaLog"]
