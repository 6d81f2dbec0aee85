"""Rivals: how others keep the ratio of prefill to decode workers, each on our engine, with its known defects kept.

A rival is made of its constants, and called with what is seen once a tick; it keeps what it remembers itself. All of
them have a fixed number of workers here. Who adds and removes whole workers gets those that it would leave idle, and
pays for a start where one changes its pool (cluster/simulator/fleet.py), so that no rival is worse for our translation.
"""

from __future__ import annotations
