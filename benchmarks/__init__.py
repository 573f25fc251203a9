"""Benchmarks: each is one command, measures against a named peer in the same run and writes one JSON result."""
