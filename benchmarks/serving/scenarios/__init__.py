"""Scenarios that gateways are tried in: floods, slow clients, dead upstreams, full tables."""
