"""The lake: the log's feedback, metrics, examples, rounds, releases and spends as Delta tables, for whoever analyses them.

It is a sink: nothing reads it to decide anything, and it can always be made again from the log (docs/lake.md).
"""
