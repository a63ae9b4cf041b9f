"""Queries and commands: what the command line, a console, the metrics and reports all call.

A query answers in numbers and milliseconds, unformatted, in frozen structs. A command appends one event, signed with the server's
key, with a reason. Nothing here formats text, times or tables, and nothing knows how it is shown.
"""
