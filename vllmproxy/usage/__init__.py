"""Reads token usage and model out of an answer on its way past: no I/O, nothing delayed, nothing changed."""
