"""Policies: which of the router's candidates a layer executes."""
