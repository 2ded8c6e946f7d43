"""Requests: traces, what their prefixes share, where they are sent, how long they wait."""
