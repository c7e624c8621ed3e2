"""Experts: many domains on one base model, each an adapter; a router picks the one that answers."""
