"""Exact expectation-maximisation: whole fits, single steps, and steps after every batch."""
