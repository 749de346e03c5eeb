"""Carry out a plan: compute factors and integers, and replace modules. No other package replaces modules."""
