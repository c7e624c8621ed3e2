"""Routers: which expert a question is for, how sure that is, and why. `opening.open_router` gives a library's."""
